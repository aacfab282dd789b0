//! The initramfs of a guest: the init script, programs with their libraries, kernel modules, and the command to run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{cpio::CpioArchive, modules::KernelModule};
use crate::process::{command, output, target};

const INIT: &str = include_str!("init.sh");

/// Links to busybox. `ip` and `ss` are iproute2's, as on the host.
const APPLETS: &[&str] = &[
    "cat", "insmod", "mkdir", "mount", "reboot", "sh", "sleep", "uname",
];

/// The guest's directory with files of the host's `target/ebb-parts`.
const PARTS: &str = "parts";

/// Builds an initramfs that mounts file systems, loads `modules` and runs `command`, a line of shell.
pub(super) fn build(
    programs: &[&Path],
    modules: &[KernelModule],
    command: &str,
) -> Result<Vec<u8>> {
    let mut image = Initramfs::default();
    for directory in ["dev", "proc", "sys", "run", "tmp", "var/lib"] {
        image.0.directory(directory);
    }
    image.0.file("init", 0o755, INIT.as_bytes());
    let command = format!("#!/bin/sh\n{command}\n");
    image.0.file("command", 0o755, command.as_bytes());
    image.file(&parts().join("bin/busybox"), "bin/busybox")?;
    for applet in APPLETS {
        image.0.symlink(format!("bin/{applet}"), "busybox");
    }
    image.program(Path::new("/usr/sbin/ip"), "usr/sbin/ip")?;
    image.program(Path::new("/usr/bin/ss"), "usr/bin/ss")?;
    image.iptables()?;
    for program in programs {
        image.program(program, path(program)?.trim_start_matches('/'))?;
    }
    let order: Vec<&str> = modules.iter().map(|m| m.name.as_str()).collect();
    image
        .0
        .file("modules/order", 0o644, order.join("\n").as_bytes());
    for KernelModule { name, content } in modules {
        image.0.file(format!("modules/{name}.ko"), 0o644, content);
    }
    Ok(image.0.finish())
}

/// The guest's path of a program in the initramfs.
pub(super) fn path(program: &Path) -> Result<String> {
    let name = program.file_name().context("a program without a name")?;
    Ok(format!("/ebb/{}", name.to_string_lossy()))
}

/// The environment variable that tells programs where unpacked packages are (`ebb_testkit::parts`).
pub(super) fn parts_variable() -> String {
    format!("EBB_PARTS=/{PARTS}")
}

fn parts() -> PathBuf {
    target().join("ebb-parts")
}

#[derive(Default)]
struct Initramfs(CpioArchive);

impl Initramfs {
    fn file(&mut self, from: &Path, to: impl AsRef<Path>) -> Result<()> {
        let content = fs::read(from).with_context(|| {
            format!(
                "reading {} (`cargo xtask setup` fetches it)",
                from.display()
            )
        })?;
        self.0.file(to, 0o755, &content);
        Ok(())
    }

    /// Adds a program and its libraries, at the paths where the dynamic linker looks for them.
    fn program(&mut self, from: &Path, to: impl AsRef<Path>) -> Result<()> {
        self.file(from, to)?;
        for library in libraries(command("ldd").arg(from))? {
            self.file(&library, library.strip_prefix("/")?)?;
        }
        Ok(())
    }

    /// Adds iptables without nftables, in the layout of `ebb_testkit::parts`.
    fn iptables(&mut self) -> Result<()> {
        let architecture = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        let from = parts().join(&architecture);
        let program = "usr/sbin/xtables-legacy-multi";
        let mut ldd = command("ldd");
        ldd.arg(parts().join(program)).env("LD_LIBRARY_PATH", &from);
        for library in libraries(&mut ldd)? {
            match library.strip_prefix(parts()) {
                Ok(path) => self.file(&library, Path::new(PARTS).join(path))?,
                Err(_) => self.file(&library, library.strip_prefix("/")?)?,
            }
        }
        self.file(&parts().join(program), Path::new(PARTS).join(program))?;
        for extension in ["libxt_MASQUERADE.so", "libxt_standard.so"] {
            let path = Path::new("xtables").join(extension);
            let to = Path::new(PARTS).join(&architecture).join(&path);
            self.file(&from.join(path), to)?;
        }
        Ok(())
    }
}

/// The paths that ldd prints: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, and the dynamic linker's own.
fn libraries(ldd: &mut Command) -> Result<Vec<PathBuf>> {
    Ok(paths(&output(ldd)?))
}

fn paths(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007fb9)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f5b)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f5c)\n";
        let found = paths(text);
        assert_eq!(
            found,
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
            .map(PathBuf::from)
        );
        assert!(paths("\tstatically linked\n").is_empty());
    }
}
