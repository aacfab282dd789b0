//! Compiles BPF programs from a build script, to embed them in a binary.
//!
//! This needs a compiler that can build `core` for the BPF target: rustup's nightly if it has the `rust-src`
//! component, else the toolchain `ebb-bpf` that `cargo xtask setup` links to Debian's rustc.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use aya_build::{Package, Toolchain, build_ebpf};

/// Compiles the package `name` in the directory `root` into `OUT_DIR`. Call it while the build script has one thread.
///
/// # Errors
///
/// No toolchain can build it, or the package does not compile.
pub fn compile(name: &str, root: &Path) -> Result<()> {
    println!("cargo:rerun-if-env-changed=RUSTC_BOOTSTRAP");
    let toolchain = if has_core_sources("nightly") {
        "nightly"
    } else {
        ensure!(
            has_core_sources("ebb-bpf"),
            "no installed Rust toolchain can compile BPF programs: run `cargo xtask setup`, \
             or `rustup component add rust-src --toolchain nightly`"
        );
        #[allow(unsafe_code, reason = "aya-build reads this from the environment only")]
        // SAFETY: the build script has one thread.
        unsafe {
            env::set_var("RUSTC_BOOTSTRAP", "1")
        };
        "ebb-bpf"
    };
    share_build_directory(name)?;
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

/// Makes all packages of a profile share one build directory, so that `core` and aya are compiled once. aya-build takes
/// one of its own for each package, below `OUT_DIR`; a link leads it to the shared one.
fn share_build_directory(name: &str) -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    // PROFILE/build/PACKAGE/out
    let profile = out
        .ancestors()
        .nth(3)
        .context("OUT_DIR is not below a build directory")?;
    let shared = profile.join("bpf");
    let own = out.join("aya-build/target").join(name);
    if own.is_symlink() {
        return Ok(());
    }
    if own.exists() {
        fs::remove_dir_all(&own)?;
    }
    fs::create_dir_all(&shared)?;
    fs::create_dir_all(own.parent().context("no parent directory")?)?;
    symlink(&shared, &own).with_context(|| format!("linking {}", own.display()))
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
