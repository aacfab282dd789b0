//! Installing what is missing: a compiler for the BPF programs, a linker for them, Debian's runtime parts.
//!
//! Packages with a service in them (containerd, nginx) are unpacked below the target directory and not
//! installed: nothing is started on this machine, and one's own containerd is not touched.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    preflight,
    process::{cargo, command, output, root, run, say, succeeds, target},
};

/// bpf-linker's version; it must be built against the LLVM of the compiler it links for, or a later one.
const BPF_LINKER: &str = "0.13.0";

/// Debian packages to install: (package, a file it brings, what for).
const PACKAGES: &[(&str, &str, &str)] = &[
    ("gcc", "/usr/bin/cc", "linking"),
    ("libc6-dev", "/usr/include/stdlib.h", "linking"),
    (
        "protobuf-compiler",
        "/usr/bin/protoc",
        "compiling the CRI's protocol",
    ),
    ("iproute2", "/usr/sbin/ip", "networks for tests"),
    (
        "libseccomp2",
        "/usr/lib/x86_64-linux-gnu/libseccomp.so.2",
        "runc",
    ),
    (
        "libcrypt1",
        "/usr/lib/x86_64-linux-gnu/libcrypt.so.1",
        "nginx",
    ),
    ("libssl3", "/usr/lib/x86_64-linux-gnu/libssl.so.3", "nginx"),
    ("zlib1g", "/usr/lib/x86_64-linux-gnu/libz.so.1", "nginx"),
    (
        "libpcre2-8-0",
        "/usr/lib/x86_64-linux-gnu/libpcre2-8.so.0",
        "nginx",
    ),
];

/// Debian's Rust compiler with sources of `core`, for a machine whose rustup can't have them.
const BPF_RUST: &[(&str, &str, &str)] = &[
    ("rustc-web", "/usr/bin/rustc", "compiling the BPF programs"),
    ("cargo-web", "/usr/bin/cargo", "compiling the BPF programs"),
    (
        "rust-web-src",
        "/usr/lib/rustlib/src/rust/library/core/src/lib.rs",
        "compiling the BPF programs",
    ),
];

const LLVM: &[(&str, &str, &str)] = &[(
    "llvm-22-dev",
    "/usr/lib/llvm-22/bin/llvm-config",
    "building bpf-linker",
)];

/// Packages to unpack, with a file that each brings.
const PARTS: &[(&str, &str)] = &[
    ("containerd", "usr/bin/containerd"),
    ("runc", "usr/sbin/runc"),
    ("containernetworking-plugins", "usr/lib/cni/bridge"),
    ("nginx", "usr/sbin/nginx"),
    ("nginx-common", "etc/nginx/mime.types"),
];

/// Installs what is missing, naming it first. Does nothing, fast, where nothing is.
pub(crate) fn ensure() -> Result<()> {
    preflight::check()?;
    let nightly = has_core_sources("nightly");
    let linker = has_linker();
    let mut packages: Vec<_> = PACKAGES.iter().collect();
    if !nightly {
        packages.extend(BPF_RUST);
    }
    if !linker {
        packages.extend(LLVM);
    }
    install(&packages)?;
    if !nightly && !has_core_sources("ebb-bpf") {
        say("linking the rustup toolchain `ebb-bpf` to Debian's Rust in /usr");
        run(command("rustup").args(["toolchain", "link", "ebb-bpf", "/usr"]))?;
    }
    if !linker {
        install_linker()?;
    }
    unpack_parts()
}

/// Whether a rustup toolchain exists and has the sources of `core`. The same question as in agent/build.rs.
fn has_core_sources(toolchain: &str) -> bool {
    output(
        command("rustup")
            .args(["run", toolchain, "rustc", "--print", "sysroot"])
            .env_remove("RUSTUP_TOOLCHAIN")
            .stderr(std::process::Stdio::null()),
    )
    .is_ok_and(|sysroot| {
        Path::new(sysroot.trim())
            .join("lib/rustlib/src/rust/library/core")
            .exists()
    })
}

fn has_linker() -> bool {
    output(command("bpf-linker").arg("--version")).is_ok_and(|v| v.trim().ends_with(BPF_LINKER))
}

fn install_linker() -> Result<()> {
    say(&format!(
        "installing bpf-linker {BPF_LINKER} with cargo install (links the BPF programs; takes a minute or two)"
    ));
    let path = std::env::var("PATH").unwrap_or_default();
    run(cargo()
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked"])
        .args(["--no-default-features", "--features", "llvm-22"])
        .env("PATH", format!("/usr/lib/llvm-22/bin:{path}"))
        // Not in this workspace, whose settings are not bpf-linker's.
        .current_dir("/"))
}

fn install(wanted: &[&(&str, &str, &str)]) -> Result<()> {
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(_, file, _)| !Path::new(file).exists())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    say("installing Debian packages:");
    for (package, _, what_for) in &missing {
        eprintln!("      {package} ({what_for})");
    }
    apt_update()?;
    run(apt_get()
        .args(["install", "--yes", "--no-install-recommends"])
        .args(missing.iter().map(|(package, ..)| package)))
}

fn unpack_parts() -> Result<()> {
    let parts = target().join("ebb-parts");
    let missing: Vec<_> = PARTS
        .iter()
        .filter(|(_, file)| !parts.join(file).exists())
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    say(&format!(
        "unpacking Debian packages into {}: {}",
        parts.strip_prefix(root()).unwrap_or(&parts).display(),
        missing.join(", ")
    ));
    let downloads = parts.join("downloads");
    fs::create_dir_all(&downloads).with_context(|| format!("making {}", downloads.display()))?;
    apt_update()?;
    // As root, apt drops to the user `_apt`, who may not write here; the packages are still verified.
    run(apt_get()
        .args(["-o", "APT::Sandbox::User=root", "download"])
        .args(&missing)
        .current_dir(&downloads))?;
    for entry in fs::read_dir(&downloads)?.flatten() {
        run(command("dpkg-deb").arg("-x").arg(entry.path()).arg(&parts))?;
    }
    fs::remove_dir_all(&downloads).context("removing the downloaded packages")
}

fn apt_update() -> Result<()> {
    if succeeds(apt_get().args(["update", "--quiet"])) {
        return Ok(());
    }
    anyhow::bail!("apt-get update failed: check the network and /etc/apt")
}

fn apt_get() -> std::process::Command {
    let mut apt = command("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive")
        .args(["--quiet", "--quiet"])
        // Standard output belongs to the results of xtask's verbs.
        .stdout(std::io::stderr());
    apt
}
