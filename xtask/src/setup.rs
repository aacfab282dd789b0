//! Installs what is missing: a compiler and a linker for the BPF programs, and Debian packages.
//!
//! Packages with a service (containerd, nginx, PostgreSQL, Redis) are unpacked below the target directory and not
//! installed, so that no service starts and the machine's own containerd stays as it is.

pub(crate) mod for_tests;
pub(crate) mod kernels;
mod suite;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    preflight,
    process::{cargo, command, root, run, say, succeeds, target},
};

/// A Debian package, with its purpose or a file that it contains.
type Package = (&'static str, &'static str);

/// How much is needed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    /// What building ebb and the demo needs.
    Demo,
    /// What tests, benches and the image need as well.
    All,
}

/// bpf-linker's version. It must be built against the LLVM of the BPF compiler or a later one.
const BPF_LINKER: &str = "0.13.0";

/// Debian packages to install, with their purposes.
const PACKAGES: &[Package] = &[
    ("gcc", "linking"),
    ("libc6-dev", "linking"),
    ("protobuf-compiler", "compiling the CRI's protocol"),
    ("iproute2", "networks in tests"),
    ("libseccomp2", "runc"),
    ("libcrypt1", "nginx"),
    ("libpcre2-8-0", "nginx"),
    ("libssl3", "nginx"),
    ("zlib1g", "nginx"),
];

/// Packages to install that the demo does not need.
const MORE_PACKAGES: &[Package] = &[
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

/// Debian's Rust compiler with sources of `core`, for a machine whose rustup has none.
const BPF_RUST: &[Package] = &[
    ("rustc-web", "compiling the BPF programs"),
    ("cargo-web", "compiling the BPF programs"),
    ("rust-web-src", "compiling the BPF programs"),
];

const LLVM: &[Package] = &[("llvm-22-dev", "building bpf-linker")];

/// Packages to unpack, with a file of each.
const PARTS: &[Package] = &[
    ("containerd", "usr/bin/containerd"),
    ("runc", "usr/sbin/runc"),
    ("containernetworking-plugins", "usr/lib/cni/bridge"),
    ("nginx", "usr/sbin/nginx"),
    ("nginx-common", "etc/nginx/mime.types"),
    ("iptables", "usr/sbin/xtables-legacy-multi"),
    ("libxtables12", "usr/share/doc/libxtables12/copyright"),
    ("libip4tc2", "usr/share/doc/libip4tc2/copyright"),
    ("libip6tc2", "usr/share/doc/libip6tc2/copyright"),
];

/// Packages to unpack that the demo does not need.
const MORE_PARTS: &[Package] = &[
    ("postgresql-15", "usr/lib/postgresql/15/bin/postgres"),
    // redis-server is a link to a program in redis-tools.
    ("redis-tools", "usr/bin/redis-check-rdb"),
    ("redis-server", "usr/bin/redis-server"),
    // Tests verify the units with it and start the proxy as a unit would. None of its services runs.
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
    // The programs of a guest that boots another kernel.
    ("busybox-static", "bin/busybox"),
    // 19 MB, of which tests use promtool.
    ("prometheus", "usr/bin/promtool"),
    ("wrk", "usr/bin/wrk"),
    ("libluajit-5.1-2", "usr/share/doc/libluajit-5.1-2/copyright"),
    // Inits, runtimes and servers whose stops `ebb doctor` predicts.
    ("tini", "usr/bin/tini"),
    ("dumb-init", "usr/bin/dumb-init"),
    ("catatonit", "usr/bin/catatonit"),
    ("s6", "usr/bin/s6-svscan"),
    ("libs6-2.11", "usr/share/doc/libs6-2.11/copyright"),
    ("libexecline2.9", "usr/share/doc/libexecline2.9/copyright"),
    ("libskarnet2.13", "usr/share/doc/libskarnet2.13/copyright"),
    // A machine may have a nodejs that is not Debian's.
    ("nodejs/bookworm", "usr/bin/node"),
    ("libnode108", "usr/share/doc/libnode108/copyright"),
    ("libuv1", "usr/share/doc/libuv1/copyright"),
    ("libc-ares2", "usr/share/doc/libc-ares2/copyright"),
    ("libbrotli1", "usr/share/doc/libbrotli1/copyright"),
    ("libnghttp2-14", "usr/share/doc/libnghttp2-14/copyright"),
    ("php8.2-fpm", "usr/sbin/php-fpm8.2"),
    ("libargon2-1", "usr/share/doc/libargon2-1/copyright"),
    ("libsodium23", "usr/share/doc/libsodium23/copyright"),
    ("apache2-bin", "usr/sbin/apache2"),
    ("libapr1", "usr/share/doc/libapr1/copyright"),
    ("libaprutil1", "usr/share/doc/libaprutil1/copyright"),
    ("haproxy", "usr/sbin/haproxy"),
    ("liblua5.3-0", "usr/share/doc/liblua5.3-0/copyright"),
    (
        "libopentracing-c-wrapper0",
        "usr/share/doc/libopentracing-c-wrapper0/copyright",
    ),
    ("libopentracing1", "usr/share/doc/libopentracing1/copyright"),
    ("uwsgi-core", "usr/bin/uwsgi-core"),
    (
        "uwsgi-plugin-python3",
        "usr/lib/uwsgi/plugins/python311_plugin.so",
    ),
    // Its documentation is a link to that of another package.
    ("libpython3.11", "usr/share/lintian/overrides/libpython3.11"),
    ("libpcre3", "usr/share/doc/libpcre3/copyright"),
    ("libyajl2", "usr/share/doc/libyajl2/copyright"),
    ("libyaml-0-2", "usr/share/doc/libyaml-0-2/copyright"),
    ("ruby3.1", "usr/bin/ruby3.1"),
    ("libruby3.1", "usr/lib/ruby/3.1.0/socket.rb"),
    // Debian's JRE has the compiler, too: it runs a source file.
    (
        "openjdk-17-jre-headless",
        "usr/lib/jvm/java-17-openjdk-amd64/bin/java",
    ),
    ("rabbitmq-server", "usr/lib/rabbitmq/bin/rabbitmq-server"),
    ("erlang-asn1", "usr/share/doc/erlang-asn1"),
    ("erlang-base", "usr/bin/erl"),
    ("erlang-crypto", "usr/share/doc/erlang-crypto"),
    ("erlang-inets", "usr/share/doc/erlang-inets"),
    ("erlang-mnesia", "usr/share/doc/erlang-mnesia"),
    ("erlang-os-mon", "usr/share/doc/erlang-os-mon"),
    ("erlang-public-key", "usr/share/doc/erlang-public-key"),
    ("erlang-runtime-tools", "usr/share/doc/erlang-runtime-tools"),
    ("erlang-ssl", "usr/share/doc/erlang-ssl"),
    ("erlang-syntax-tools", "usr/share/doc/erlang-syntax-tools"),
    ("erlang-tools", "usr/share/doc/erlang-tools"),
    ("erlang-xmerl", "usr/share/doc/erlang-xmerl"),
];

/// Installs what is missing, naming it first. Returns fast if nothing is missing.
pub(crate) fn ensure(needs: Needs) -> Result<()> {
    preflight::check()?;
    let nightly = has_core_sources("nightly");
    let linker = has_linker();
    let mut packages: Vec<_> = PACKAGES.iter().collect();
    let mut parts: Vec<_> = PARTS.iter().collect();
    if needs == Needs::All {
        packages.extend(MORE_PACKAGES);
        parts.extend(MORE_PARTS);
    }
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
    unpack(&parts)
}

/// Whether a rustup toolchain exists and has the sources of `core`. ebpf/build checks the same.
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
        // Outside this workspace, whose cargo configuration must not apply.
        .current_dir("/"))
}

fn install(wanted: &[&Package]) -> Result<()> {
    // dpkg-query fails if it does not know a package, but lists the others.
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

fn unpack(wanted: &[&Package]) -> Result<()> {
    let parts = target().join("ebb-parts");
    let missing: Vec<_> = wanted
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
    // As root, apt drops to the user `_apt`, which may not write here. It still verifies the packages.
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
        // xtask's standard output is for results only.
        .stdout(std::io::stderr());
    apt
}
