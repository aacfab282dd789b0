//! Installing what is missing: a compiler for the BPF programs, a linker for them, Debian's runtime parts.
//!
//! Packages with a service in them (containerd, nginx, PostgreSQL, Redis) are unpacked below the target directory and not
//! installed: nothing is started on this machine, and one's own containerd is not touched.

pub(crate) mod for_tests;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    preflight,
    process::{cargo, command, root, run, say, succeeds, target},
};

/// bpf-linker's version; it must be built against the LLVM of the compiler it links for, or a later one.
const BPF_LINKER: &str = "0.13.0";

/// Debian packages to install, and what for.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "linking"),
    ("libc6-dev", "linking"),
    ("protobuf-compiler", "compiling the CRI's protocol"),
    ("iproute2", "networks in tests"),
    ("libseccomp2", "runc"),
    ("libcrypt1", "nginx"),
    ("libpcre2-8-0", "nginx"),
    ("libssl3", "nginx"),
    ("zlib1g", "nginx"),
    ("libgssapi-krb5-2", "PostgreSQL"),
    ("libicu72", "PostgreSQL"),
    ("libldap-2.5-0", "PostgreSQL"),
    ("liblz4-1", "PostgreSQL"),
    ("libpam0g", "PostgreSQL"),
    ("libpq5", "PostgreSQL"),
    ("libxml2", "PostgreSQL"),
    ("libzstd1", "PostgreSQL"),
    ("tzdata", "PostgreSQL"),
    ("libatomic1", "Redis"),
    ("libjemalloc2", "Redis"),
    ("liblzf1", "Redis"),
    ("libsystemd0", "PostgreSQL and Redis"),
];

/// Debian's Rust compiler with sources of `core`, for a machine whose rustup can't have them.
const BPF_RUST: &[(&str, &str)] = &[
    ("rustc-web", "compiling the BPF programs"),
    ("cargo-web", "compiling the BPF programs"),
    ("rust-web-src", "compiling the BPF programs"),
];

const LLVM: &[(&str, &str)] = &[("llvm-22-dev", "building bpf-linker")];

/// Packages to unpack, with a file that each brings.
const PARTS: &[(&str, &str)] = &[
    ("containerd", "usr/bin/containerd"),
    ("runc", "usr/sbin/runc"),
    ("containernetworking-plugins", "usr/lib/cni/bridge"),
    ("nginx", "usr/sbin/nginx"),
    ("nginx-common", "etc/nginx/mime.types"),
    ("iptables", "usr/sbin/xtables-legacy-multi"),
    ("libxtables12", "usr/share/doc/libxtables12/copyright"),
    ("libip4tc2", "usr/share/doc/libip4tc2/copyright"),
    ("libip6tc2", "usr/share/doc/libip6tc2/copyright"),
    ("postgresql-15", "usr/lib/postgresql/15/bin/postgres"),
    // The server is another name of a program in the tools.
    ("redis-tools", "usr/bin/redis-check-rdb"),
    ("redis-server", "usr/bin/redis-server"),
    // To check the units with, and to start the proxy as they would; nothing of it runs as a service.
    ("systemd", "usr/bin/systemd-analyze"),
    (
        "libsystemd-shared",
        "usr/share/doc/libsystemd-shared/copyright",
    ),
    ("libapparmor1", "usr/share/doc/libapparmor1/copyright"),
    ("libkmod2", "usr/share/doc/libkmod2/copyright"),
    ("buildah", "usr/bin/buildah"),
    ("libassuan0", "usr/share/doc/libassuan0"),
    ("libgpgme11", "usr/share/doc/libgpgme11"),
    ("libsubid4", "usr/share/doc/libsubid4"),
    ("wrk", "usr/bin/wrk"),
    ("libluajit-5.1-2", "usr/share/doc/libluajit-5.1-2/copyright"),
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

/// Whether a rustup toolchain exists and has the sources of `core`. The same question as in ebpf/build.
fn has_core_sources(toolchain: &str) -> bool {
    let sysroot = command("rustup")
        .args(["run", toolchain, "rustc", "--print", "sysroot"])
        .env_remove("RUSTUP_TOOLCHAIN")
        .output();
    sysroot.is_ok_and(|out| {
        out.status.success()
            && Path::new(String::from_utf8_lossy(&out.stdout).trim())
                .join("lib/rustlib/src/rust/library/core")
                .exists()
    })
}

fn has_linker() -> bool {
    let version = command("bpf-linker").arg("--version").output();
    version.is_ok_and(|out| {
        String::from_utf8_lossy(&out.stdout)
            .trim()
            .ends_with(BPF_LINKER)
    })
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

fn install(wanted: &[&(&str, &str)]) -> Result<()> {
    // Fails if one is unknown, and lists those that are known all the same.
    let known = command("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(wanted.iter().map(|(package, _)| package))
        .output()
        .context("starting dpkg-query")?;
    let known = String::from_utf8_lossy(&known.stdout);
    let is_installed = |package: &str| {
        let installed = format!("{package} installed");
        known.lines().any(|line| line == installed)
    };
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(package, _)| !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    say("installing Debian packages:");
    for (package, what_for) in &missing {
        eprintln!("      {package} ({what_for})");
    }
    apt_update()?;
    run(apt_get()
        .args(["install", "--yes", "--no-install-recommends"])
        .args(missing.iter().map(|(package, _)| package)))
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
