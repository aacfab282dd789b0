//! What is deployed: one static binary, and the image around it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    process::{cargo, command, output, root, run, say, target},
    setup,
};

/// The image's name; the one in deploy/daemonset.yaml.
const IMAGE: &str = concat!("docker.io/library/ebb:", env!("CARGO_PKG_VERSION"));

/// How to build it.
#[derive(Args)]
pub(crate) struct Options {
    /// Unoptimised, as the tests have it.
    #[arg(long)]
    debug: bool,
}

/// Builds binary and image, and says where they are.
pub(crate) fn dist(options: &Options) -> Result<()> {
    setup::ensure()?;
    build(options.debug)
}

/// As [`dist`], with all that is needed already there.
pub(crate) fn build(debug: bool) -> Result<()> {
    let kind = if debug { "debug" } else { "release" };
    let dist = target().join("dist").join(kind);
    fs::create_dir_all(&dist).with_context(|| format!("making {}", dist.display()))?;
    say(&format!("building the static binary ({kind})"));
    let binary = dist.join("ebb");
    fs::copy(binary_of(debug)?, &binary).context("copying the binary")?;
    say("building the image");
    let archive = image(&dist)?;
    for file in [&binary, &archive] {
        let size = fs::metadata(file)?.len() / 1_000_000;
        let shown = file.strip_prefix(root()).unwrap_or(file);
        say(&format!("{} ({size} MB)", shown.display()));
    }
    Ok(())
}

/// A binary that needs no library: glibc can be linked into it, too. With `--target`, the flags are not for build
/// scripts and macros, so that these are the ones that are there for other builds; and what the flags are for has
/// a directory of its own.
fn binary_of(debug: bool) -> Result<PathBuf> {
    let about = output(command("rustc").arg("--version").arg("--verbose"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("rustc does not tell its host")?;
    let flags = format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        host.to_uppercase().replace('-', "_")
    );
    let mut build = cargo();
    build
        .args(["build", "--locked", "--quiet", "--package", "ebb"])
        .args(["--target", host])
        .env(flags, "-C target-feature=+crt-static -C strip=debuginfo");
    if !debug {
        build.arg("--release");
    }
    run(&mut build)?;
    let profile = if debug { "debug" } else { "release" };
    Ok(target().join(host).join(profile).join("ebb"))
}

/// An archive that `ctr images import` and `docker load` take.
fn image(dist: &Path) -> Result<PathBuf> {
    let archive = dist.join("ebb-image.tar");
    let storage = dist.join("storage");
    // It refuses to write over one.
    for path in [&archive, &storage] {
        let gone = if path.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
        match gone {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
    }
    let context = dist.join("context");
    fs::create_dir_all(&context)?;
    fs::copy(dist.join("ebb"), context.join("ebb"))?;
    run(buildah(&storage)?
        .args(["build", "--quiet", "--isolation", "chroot", "--tag", IMAGE])
        .args(["--file", "deploy/Containerfile"])
        .arg(&context))?;
    run(buildah(&storage)?
        .args(["push", "--quiet", IMAGE])
        .arg(format!("docker-archive:{}:{IMAGE}", archive.display())))?;
    for directory in [storage, context] {
        fs::remove_dir_all(&directory)
            .with_context(|| format!("removing {}", directory.display()))?;
    }
    Ok(archive)
}

/// buildah from the unpacked parts, with storage of its own and without overlays.
fn buildah(storage: &Path) -> Result<Command> {
    let parts = target().join("ebb-parts");
    fs::create_dir_all(storage).with_context(|| format!("making {}", storage.display()))?;
    // Nothing is pulled, so there is no signature to check. It won't start without a policy, though.
    let policy = storage.join("policy.json");
    fs::write(&policy, r#"{"default": [{"type": "reject"}]}"#)
        .with_context(|| format!("writing {}", policy.display()))?;
    let mut libraries = Vec::new();
    for entry in fs::read_dir(parts.join("usr/lib"))?.flatten() {
        if entry.file_name().to_string_lossy().ends_with("-linux-gnu") {
            libraries.push(entry.path());
        }
    }
    let mut buildah = command(parts.join("usr/bin/buildah"));
    buildah
        .env("LD_LIBRARY_PATH", std::env::join_paths(libraries)?)
        .args(["--storage-driver", "vfs", "--root"])
        .arg(storage.join("root"))
        .arg("--runroot")
        .arg(storage.join("run"))
        .arg("--signature-policy")
        .arg(policy)
        // Standard output belongs to the results of xtask's verbs.
        .stdout(std::io::stderr());
    Ok(buildah)
}
