//! Compiles BPF programs, to be embedded in a binary; for build scripts.
//!
//! They need a compiler that can build `core` for the BPF target: rustup's nightly where it has the
//! `rust-src` component, else the toolchain `ebb-bpf` that `cargo xtask setup` links to Debian's rustc.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use aya_build::{Package, Toolchain, build_ebpf};

/// Compiles the package `name` in the directory `root` into `OUT_DIR`. To be called by a build script while it
/// has one thread.
///
/// # Errors
/// If no toolchain can, or the package does not compile.
pub fn compile(name: &str, root: &Path) -> Result<()> {
    println!("cargo:rerun-if-env-changed=RUSTC_BOOTSTRAP");
    let toolchain = if has_core_sources("nightly") {
        "nightly"
    } else {
        ensure!(
            has_core_sources("ebb-bpf"),
            "no Rust toolchain here can compile BPF programs: run `cargo xtask setup`, \
             or `rustup component add rust-src --toolchain nightly`"
        );
        #[allow(unsafe_code, reason = "aya-build takes this from the environment only")]
        // SAFETY: a build script with one thread.
        unsafe {
            std::env::set_var("RUSTC_BOOTSTRAP", "1")
        };
        "ebb-bpf"
    };
    build_ebpf(
        [Package {
            name,
            root_dir: root
                .to_str()
                .context("the path of BPF programs is not UTF-8")?,
            ..Package::default()
        }],
        Toolchain::Custom(toolchain),
    )
}

/// Whether the rustup toolchain `name` exists and has the sources of `core`.
fn has_core_sources(name: &str) -> bool {
    let sysroot = Command::new("rustup")
        .args(["run", name, "rustc", "--print", "sysroot"])
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN")
        .output();
    sysroot.is_ok_and(|out| {
        let root = String::from_utf8_lossy(&out.stdout);
        out.status.success()
            && Path::new(root.trim())
                .join("lib/rustlib/src/rust/library/core")
                .exists()
    })
}
