//! What only tests need: later containerds, and a gRPC stack that is not Rust's.
//!
//! What can't be had is said and is no error here: the demo does without, and a test that needs it fails
//! and names it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{apt_get, install};
use crate::process::{command, root, run, say, target};

/// Debian suites with a later containerd than bookworm's. Only containerd is taken from them: its own
/// libraries are linked statically, whereas a later runc wants a later libc.
const SUITES: &[&str] = &["trixie", "forky"];

const PYTHON: &[(&str, &str)] = &[
    ("python3", "the CRI proxy under a foreign gRPC stack"),
    ("python3-pip", "installing grpcio below target/"),
];

/// gRPC's C core with its Python binding, for Debian 12's Python 3.11.
const GRPCIO: &str = "grpcio==1.74.0 \
    --hash=sha256:c98e0b7434a7fa4e3e63f250456eaef52499fba5ae661c58cc5b5477d11e7182";

/// Fetches what is missing. Does nothing, fast, where nothing is.
pub(crate) fn ensure() -> Result<()> {
    super::ensure()?;
    let parts = target().join("ebb-parts");
    for suite in SUITES {
        if let Err(error) = containerd(&parts, suite) {
            say(&format!(
                "no containerd of Debian {suite}: {error:#}. Its tests are going to fail"
            ));
        }
    }
    if let Err(error) = grpcio(&parts) {
        say(&format!(
            "no grpcio: {error:#}. The tests with a foreign gRPC stack are going to fail"
        ));
    }
    Ok(())
}

/// Unpacks a suite's containerd into `containerd-SUITE`. apt gets lists and sources of its own, so that
/// the machine's never hear of the suite.
fn containerd(parts: &Path, suite: &str) -> Result<()> {
    let home = parts.join(format!("containerd-{suite}"));
    if home.join("usr/bin/containerd").exists() {
        return Ok(());
    }
    say(&format!(
        "unpacking containerd of Debian {suite} into {}",
        home.strip_prefix(root()).unwrap_or(&home).display()
    ));
    let apt = parts.join(format!("apt-{suite}"));
    fs::create_dir_all(apt.join("lists/partial"))?;
    fs::create_dir_all(apt.join("cache/archives/partial"))?;
    fs::write(
        apt.join("debian.sources"),
        format!(
            "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: {suite}\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        ),
    )
    .context("writing apt's sources")?;
    let with_own_lists = || {
        let mut command = apt_get();
        for (option, path) in [
            ("Dir::Etc::sourcelist", apt.join("debian.sources")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::State::lists", apt.join("lists")),
            ("Dir::Cache", apt.join("cache")),
        ] {
            command.arg(format!("-o{option}={}", path.display()));
        }
        // As root, apt drops to the user `_apt`, who may not write here; what it fetches is still verified.
        command.args(["-oAPT::Sandbox::User=root", "-oAcquire::Languages=none"]);
        command.arg("-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false");
        command.current_dir(&apt);
        command
    };
    run(with_own_lists().args(["update", "--error-on=any"]))
        .context("reading the suite's index")?;
    run(with_own_lists().args(["download", &format!("containerd/{suite}")]))?;
    // Complete or not there.
    let unpacked = apt.join("unpacked");
    for entry in fs::read_dir(&apt)?.flatten() {
        if entry.path().extension().is_some_and(|e| e == "deb") {
            run(command("dpkg-deb")
                .arg("-x")
                .arg(entry.path())
                .arg(&unpacked))?;
        }
    }
    let _ = fs::remove_dir_all(&home);
    fs::rename(&unpacked, &home).with_context(|| format!("making {}", home.display()))?;
    fs::remove_dir_all(&apt).context("removing what was downloaded")
}

/// Installs grpcio into `python`, by the pip of Debian's Python and for it.
fn grpcio(parts: &Path) -> Result<()> {
    let home = parts.join("python");
    if home.join("grpc").exists() {
        return Ok(());
    }
    install(&PYTHON.iter().collect::<Vec<_>>())?;
    say("installing grpcio below target/ with pip");
    let unpacked = parts.join("python-new");
    let _ = fs::remove_dir_all(&unpacked);
    fs::create_dir_all(&unpacked)?;
    let requirements = unpacked.join("requirements.txt");
    fs::write(&requirements, GRPCIO)?;
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
    let _ = fs::remove_dir_all(&home);
    fs::rename(&unpacked, &home).with_context(|| format!("making {}", home.display()))
}
