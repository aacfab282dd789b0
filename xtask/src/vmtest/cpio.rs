//! A cpio archive in the format that the kernel unpacks at boot
//! (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

/// An archive in memory. Paths are relative to the guest's root.
#[derive(Default)]
pub(super) struct CpioArchive {
    bytes: Vec<u8>,
    entries: BTreeSet<PathBuf>,
}

impl CpioArchive {
    /// Adds a directory and its parents, unless it exists.
    pub(super) fn directory(&mut self, path: impl AsRef<Path>) {
        let path = path.as_ref();
        if path.as_os_str().is_empty() || self.entries.contains(path) {
            return;
        }
        self.add(path, DIRECTORY, &[]);
    }

    /// Adds a file with these permissions, unless the path exists.
    pub(super) fn file(&mut self, path: impl AsRef<Path>, permissions: u32, content: &[u8]) {
        if !self.entries.contains(path.as_ref()) {
            self.add(path.as_ref(), FILE | permissions, content);
        }
    }

    pub(super) fn symlink(&mut self, path: impl AsRef<Path>, target: &str) {
        self.add(path.as_ref(), SYMLINK, target.as_bytes());
    }

    /// Adds the trailer and returns the archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", 0, 0);
        self.bytes
    }

    fn add(&mut self, path: &Path, mode: u32, content: &[u8]) {
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.entries.insert(path.to_owned());
        self.header(&path.to_string_lossy(), mode, content.len());
        self.bytes.extend(content);
        self.pad();
    }

    fn header(&mut self, name: &str, mode: u32, size: usize) {
        let inode = self.entries.len();
        let length = name.len() + 1;
        // One link; owner, group, time and device numbers are 0.
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{length:08x}{0:08x}{name}\0",
            0, 1
        );
        self.bytes.extend(header.as_bytes());
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_parents_come_first() {
        let mut archive = CpioArchive::default();
        archive.file("a/b", 0o755, b"hello");
        archive.file("a/b", 0o755, b"again");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).unwrap();
        let starts: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(starts, [0, 112, 236]);
        let names: Vec<_> = starts
            .iter()
            .map(|at| text[at + 110..].split('\0').next().unwrap())
            .collect();
        assert_eq!(names, ["a", "a/b", "TRAILER!!!"]);
        assert_eq!(&text[112 + 54..112 + 62], "00000005");
        assert_eq!(&text[112 + 116..112 + 121], "hello");
    }
}
