//! Container images made from files of this machine, because there is no registry.

mod archive;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::helpers;
use crate::parts::Parts;
use archive::{Archive, ImageConfig, Layer};

/// The sandbox image.
pub const PAUSE: &str = "ebb.local/pause:1";
/// Debian's nginx with the stop signal of the official image, SIGQUIT.
///
/// Serves `/usr/share/nginx/html` on port 80. To configure it otherwise, mount a directory on `/etc/nginx/conf.d`.
pub const NGINX: &str = "ebb.local/nginx:1";
/// The stop signals of the images by [`host`].
pub const STOP_SIGNALS: [&str; 5] = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGWINCH"];
/// The programs of [`crate::fixture`].
pub const FIXTURE: &str = "ebb.local/fixture:1";

/// An image without programs that has this stop signal, one of [`STOP_SIGNALS`]. Mount the machine's `/usr` on its `/usr`.
pub fn host(stop_signal: &str) -> String {
    format!("ebb.local/host-{}:1", stop_signal.to_ascii_lowercase())
}

/// Directories that programs expect.
const DIRECTORIES: &[&str] = &[
    "dev", "etc", "proc", "run", "sys", "tmp", "usr/bin", "var/log",
];

/// Writes one archive with all images to `target`, for `ctr images import`.
///
/// The images include the calling executable, as fixture and pause program.
///
/// # Errors
/// If a file can't be read, or a shared library is missing.
pub fn build(parts: &Parts, target: &Path) -> Result<()> {
    let scratch = target.with_extension("d");
    fs::create_dir_all(&scratch)?;
    let mut archive = Archive::create(target)?;

    let programs = programs_layer(&scratch.join("programs"))?;
    archive.add(
        FIXTURE,
        &[&programs],
        &entry(&["/usr/bin", helpers::FIXTURE], &[], "SIGTERM"),
    )?;
    archive.add(
        PAUSE,
        &[&programs],
        &entry(&["/usr/bin", helpers::PAUSE], &[], "SIGTERM"),
    )?;
    let nginx = nginx_layer(parts, &scratch.join("nginx"))?;
    archive.add(
        NGINX,
        &[&nginx],
        &entry(&["/usr/sbin", "nginx"], &["-g", "daemon off;"], "SIGQUIT"),
    )?;
    let host_layer = host_layer(&scratch.join("host"))?;
    for signal in STOP_SIGNALS {
        archive.add(
            &host(signal),
            &[&host_layer],
            &entry(&["/usr/bin", "true"], &[], signal),
        )?;
    }

    archive.finish()?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

fn entry(program: &[&str; 2], arguments: &[&str], stop_signal: &'static str) -> ImageConfig {
    ImageConfig {
        entrypoint: vec![program.join("/")],
        arguments: arguments.iter().map(ToString::to_string).collect(),
        stop_signal,
    }
}

fn programs_layer(path: &Path) -> Result<Layer> {
    let executable = std::env::current_exe().context("can't find the path of this program")?;
    let mut layer = archive::LayerWriter::create(path)?;
    base(&mut layer)?;
    layer.file("usr/bin/ebb-node", &executable, 0o755)?;
    layer.link("usr/bin/ebb-fixture", "ebb-node")?;
    layer.link("usr/bin/ebb-pause", "ebb-node")?;
    libraries(&mut layer, &executable)?;
    layer.finish()
}

fn nginx_layer(parts: &Parts, path: &Path) -> Result<Layer> {
    let mut layer = archive::LayerWriter::create(path)?;
    base(&mut layer)?;
    for directory in [
        "etc/nginx/conf.d",
        "usr/sbin",
        "usr/share/nginx/html",
        "var/lib/nginx",
        "var/log/nginx",
    ] {
        layer.directory(directory)?;
    }
    layer.file("usr/sbin/nginx", &parts.nginx(), 0o755)?;
    layer.file("etc/nginx/mime.types", &parts.mime_types(), 0o644)?;
    layer.text("etc/nginx/nginx.conf", NGINX_CONF)?;
    layer.text("etc/nginx/conf.d/default.conf", NGINX_DEFAULT)?;
    layer.text("usr/share/nginx/html/index.html", "nginx in an ebb node\n")?;
    libraries(&mut layer, &parts.nginx())?;
    layer.finish()
}

fn host_layer(path: &Path) -> Result<Layer> {
    let mut layer = archive::LayerWriter::create(path)?;
    base(&mut layer)?;
    for directory in ["bin", "sbin", "lib", "lib64"] {
        layer.link(directory, &format!("usr/{directory}"))?;
    }
    layer.finish()
}

fn base(layer: &mut archive::LayerWriter) -> Result<()> {
    for directory in DIRECTORIES {
        layer.directory(directory)?;
    }
    layer.text(
        "etc/passwd",
        "root:x:0:0:root:/:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\n",
    )?;
    layer.text("etc/group", "root:x:0:\nwww-data:x:33:\n")?;
    layer.text(
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files\n",
    )
}

/// Adds the shared libraries that `program` needs, at their paths on this machine.
fn libraries(layer: &mut archive::LayerWriter, program: &Path) -> Result<()> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("can't start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(missing) = text.lines().find(|line| line.contains("not found")) {
        bail!(
            "{}: {}: run `cargo xtask setup`",
            program.display(),
            missing.trim()
        );
    }
    for library in library_paths(&text) {
        layer.file(
            &library.strip_prefix("/")?.to_string_lossy(),
            &library,
            0o755,
        )?;
    }
    Ok(())
}

/// The absolute paths in what ldd prints: `libc.so.6 => /lib/… (0x…)` and `/lib64/ld-… (0x…)`.
fn library_paths(text: &str) -> BTreeSet<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let path = line
                .split_once(" => ")
                .map_or(line, |(_, path)| path)
                .trim();
            path.starts_with('/')
                .then(|| path.split(" (").next())
                .flatten()
                .map(PathBuf::from)
        })
        .collect()
}

const NGINX_CONF: &str = "\
user www-data;
worker_processes 1;
error_log /dev/stderr notice;
pid /run/nginx.pid;
events { worker_connections 1024; }
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    access_log off;
    include /etc/nginx/conf.d/*.conf;
}
";

const NGINX_DEFAULT: &str = "\
server {
    listen 80;
    listen [::]:80;
    root /usr/share/nginx/html;
}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output_gives_libraries_and_loader_but_not_the_vdso() {
        let text = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x0)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(
            library_paths(text),
            expected.iter().map(PathBuf::from).collect()
        );
    }
}
