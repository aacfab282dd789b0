//! Writes files of the host atomically: a crash leaves the old file or the new one, never a part of it.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Component, Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use sha2::{Digest as _, Sha256};

/// Translates `path`, an absolute path on the host, into a path for this process, which sees the host's root
/// directory at `root`. Follows symbolic links as on the host, where an absolute target starts at `root`, except for
/// the last component. The file and its directories need not exist.
///
/// # Errors
///
/// A directory can't be read, or a symbolic link on the path leads nowhere.
pub(crate) fn resolve_in_nofollow(root: &Path, path: &Path) -> io::Result<PathBuf> {
    if root == Path::new("/") {
        return Ok(path.to_owned());
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return resolve_in(root, path);
    };
    match resolve_in(root, directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // A directory that does not exist may be created later.
            let at = resolve_in_nofollow(root, directory)?;
            match fs::symlink_metadata(&at) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(at.join(name)),
                Err(e) => Err(e),
                Ok(_) => Err(io::Error::other(format!(
                    "{} is a symbolic link that leads nowhere",
                    directory.display()
                ))),
            }
        }
        directory => Ok(directory?.join(name)),
    }
}

/// As [`resolve_in_nofollow`], but also follows a link in the last component, and the file must exist.
///
/// # Errors
///
/// A directory can't be read, or the file does not exist.
pub(crate) fn resolve_in(root: &Path, path: &Path) -> io::Result<PathBuf> {
    if root == Path::new("/") {
        return Ok(path.to_owned());
    }
    // The kernel's name of a file in another mount namespace is of no use in this one.
    if root.starts_with("/proc") {
        return resolve_by_components(root, path);
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, flags | OFlags::DIRECTORY, Mode::empty())?;
    let end = openat2(&top, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    fs::read_link(format!("/proc/self/fd/{}", end.as_raw_fd()))
}

/// As [`resolve_in`], for a root such as `/proc/1/root`: follows each link by hand, because the kernel would follow
/// absolute ones from this process's own root.
fn resolve_by_components(root: &Path, path: &Path) -> io::Result<PathBuf> {
    /// As many as the kernel follows (`MAXSYMLINKS`).
    const MOST_LINKS: usize = 40;
    let mut resolved = PathBuf::new();
    let mut todo: Vec<_> = components(path);
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        let next = root.join(&resolved).join(&name);
        if !fs::symlink_metadata(&next)?.is_symlink() {
            resolved.push(name);
            continue;
        }
        links += 1;
        if links > MOST_LINKS {
            return Err(rustix::io::Errno::LOOP.into());
        }
        let target = fs::read_link(&next)?;
        if target.is_absolute() {
            resolved.clear();
        }
        todo.extend(components(&target));
    }
    Ok(root.join(resolved))
}

/// The names in a path and its `..`, last first.
fn components(path: &Path) -> Vec<std::ffi::OsString> {
    let names = path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    names.rev().collect()
}

/// SHA-256 in hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Writes a file atomically, even if the machine crashes. Its directory must exist.
///
/// # Errors
///
/// A system call fails. The old file is then unchanged.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".ebb-new");
    replace(path, &directory.join(name), mode, |file| {
        file.write_all(bytes)?;
        file.sync_all()
    })?;
    sync(directory)
}

/// Writes a file that is only needed until the next boot, readable by its owner only. Atomic unless the machine
/// crashes. A process that is killed during the write leaves a file with the extension `tmp`.
///
/// # Errors
///
/// A system call fails. The old file is then unchanged.
pub(crate) fn write_for_this_boot(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("tmp");
    replace(path, &unfinished, 0o600, |file| file.write_all(bytes))
}

/// Writes `unfinished`, then renames it to `path`.
fn replace(
    path: &Path,
    unfinished: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let written = (|| {
        let mut file = File::create(unfinished)?;
        // A file that an interrupted write left behind may have another mode.
        file.set_permissions(Permissions::from_mode(mode))?;
        write(&mut file)?;
        fs::rename(unfinished, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(unfinished);
    }
    written
}

/// Removes a file or a symbolic link, if it exists.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => path.parent().map_or(Ok(()), |directory| {
            // The directory may be gone, too.
            sync(directory).or_else(|e| match e.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            })
        }),
    }
}

/// Removes a directory, if it exists and is empty.
pub(crate) fn remove_empty(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(e)
            if !matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Err(e)
        }
        _ => Ok(()),
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_no_other_file_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        write(&path, b"one", 0o644).unwrap();
        write(&path, b"two", 0o755).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(write(&path, b"one", 0o644).is_err());
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_of_the_host_are_followed_within_its_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(directory.path()).unwrap();
        let link = |target: &str, at: &str| {
            std::os::unix::fs::symlink(target, root.join(at)).unwrap();
        };
        fs::create_dir_all(root.join("run/there")).unwrap();
        fs::create_dir_all(root.join("var")).unwrap();
        link("/run", "var/run");
        link("../../../../run/there", "run/up");
        link("/usr/no-such-directory", "nowhere");
        let at =
            |path: &str| resolve_in_nofollow(&root, Path::new(path)).map_err(|e| e.to_string());
        for (path, is) in [
            ("/", ""),
            ("/run/there/x", "run/there/x"),
            ("/var/run/there/x", "run/there/x"),
            ("/var/run/new/er/x", "run/new/er/x"),
            ("/run/up/x", "run/there/x"),
            // The link itself.
            ("/var/run", "var/run"),
            ("/nowhere", "nowhere"),
        ] {
            let is = root.join(is);
            assert_eq!(at(path).as_deref(), Ok(&*is), "{path}");
        }
        for path in ["/nowhere/x", "/nowhere/x/y"] {
            let why = at(path).unwrap_err();
            assert!(
                why.starts_with("/nowhere is a symbolic link"),
                "{path}: {why}"
            );
        }
        let end = |path: &str| resolve_in(&root, Path::new(path)).map_err(|e| e.kind());
        assert_eq!(end("/var/run"), Ok(root.join("run")));
        assert_eq!(end("/nowhere"), Err(io::ErrorKind::NotFound));
    }

    #[test]
    fn digests_are_sha_256() {
        assert_eq!(
            digest(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
