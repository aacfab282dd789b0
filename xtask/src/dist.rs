//! `cargo xtask dist`: builds two static binaries and the image with them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::{
    process::{cargo, command, output, root, run, say, target},
    setup,
};

/// The image's name, as in deploy/daemonset.yaml.
const IMAGE: &str = concat!("docker.io/library/ebb:", env!("CARGO_PKG_VERSION"));

/// The binaries: the agent with the command line, and the CRI proxy.
const BINARIES: [&str; 2] = ["ebb", "ebb-cri-proxy"];

/// The largest size of a binary that is shipped.
const LARGEST: u64 = 15_000_000;

/// With glibc, and with relative relocations in their short form, which glibc knows since 2.36.
const STATIC_AND_SMALL: &str =
    "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs";

/// How to build.
#[derive(Args)]
pub(crate) struct DistOptions {
    /// Build the image that the tests run: with their own binaries, not optimised and with shared libraries.
    #[arg(long)]
    debug: bool,
}

/// Installs what is missing and builds binaries and image.
pub(crate) fn dist(options: &DistOptions) -> Result<()> {
    setup::ensure(setup::Needs::All)?;
    build(options.debug)
}

/// Builds binaries and image, and prints their paths. Assumes that nothing is missing.
pub(crate) fn build(debug: bool) -> Result<()> {
    let kind = if debug { "debug" } else { "release" };
    let dist = target().join("dist").join(kind);
    fs::create_dir_all(&dist).with_context(|| format!("making {}", dist.display()))?;
    let built = if debug {
        say("building the tests");
        // What the tests run anyway, so nothing is compiled twice.
        run(cargo().args(["test", "--workspace", "--locked", "--quiet", "--no-run"]))?;
        target().join("debug")
    } else {
        say("building the static binaries");
        build_static()?
    };
    for name in BINARIES {
        let size = fs::copy(built.join(name), dist.join(name))
            .with_context(|| format!("copying {name}"))?;
        ensure!(
            debug || size <= LARGEST,
            "{name} has {size} bytes, more than {LARGEST}: find what has made it larger"
        );
    }
    say("building the image");
    let archive = image(&dist, debug)?;
    for file in BINARIES
        .map(|name| dist.join(name))
        .iter()
        .chain([&archive])
    {
        let size = fs::metadata(file)?.len() / 1_000_000;
        let shown = file.strip_prefix(root()).unwrap_or(file);
        say(&format!("{} ({size} MB)", shown.display()));
    }
    Ok(())
}

/// Builds static binaries, glibc included, and returns their directory. With `--target`, cargo applies the flags to
/// neither build scripts nor macros, and uses a directory of its own, so other builds are not invalidated.
fn build_static() -> Result<PathBuf> {
    let about = output(command("rustc").arg("--version").arg("--verbose"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("rustc -vV names no host")?;
    let flags = format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        host.to_uppercase().replace('-', "_")
    );
    let mut build = cargo();
    build
        .args(["build", "--locked", "--quiet"])
        .args(BINARIES.iter().flat_map(|name| ["--package", name]))
        .args(["--target", host, "--profile", "dist"])
        .env(flags, STATIC_AND_SMALL);
    run(&mut build)?;
    Ok(target().join(host).join("dist"))
}

/// Builds an archive for `ctr images import` and `docker load`. With `shared`, the image also has the libraries that the
/// binaries load.
fn image(dist: &Path, shared: bool) -> Result<PathBuf> {
    let archive = dist.join("ebb-image.tar");
    let storage = dist.join("storage");
    // buildah refuses to overwrite an archive.
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
    let mut recipe = fs::read_to_string(root().join("deploy/Containerfile"))?;
    for name in BINARIES {
        fs::copy(dist.join(name), context.join(name))?;
        if shared {
            copy_libraries(&dist.join(name), &context.join("libraries"))?;
        }
    }
    if shared {
        recipe.push_str("COPY libraries /\n");
    }
    let file = context.join("Containerfile");
    fs::write(&file, recipe)?;
    run(buildah(&storage)?
        .args(["build", "--quiet", "--isolation", "chroot", "--tag", IMAGE])
        .arg("--file")
        .arg(&file)
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

/// Copies the shared libraries of a program, and the loader, to the same paths below `to`.
fn copy_libraries(program: &Path, to: &Path) -> Result<()> {
    let listed = output(command("ldd").arg(program))?;
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, and the loader without an arrow.
    let paths = listed.lines().filter_map(|line| {
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        path.split_whitespace()
            .next()
            .filter(|path| path.starts_with('/'))
    });
    for path in paths {
        let copy = to.join(path.trim_start_matches('/'));
        if let Some(directory) = copy.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::copy(path, &copy).with_context(|| format!("copying {path}"))?;
    }
    Ok(())
}

/// buildah from the unpacked packages, with its own storage and without overlayfs.
fn buildah(storage: &Path) -> Result<Command> {
    let parts = target().join("ebb-parts");
    fs::create_dir_all(storage).with_context(|| format!("making {}", storage.display()))?;
    // buildah does not start without a signature policy. Nothing is pulled, so there is no signature to check.
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
        // xtask's standard output is for results only.
        .stdout(std::io::stderr());
    Ok(buildah)
}
