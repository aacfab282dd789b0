//! Files of the host, changed so that a crash leaves the old one or the new one, and never a half.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use sha2::{Digest as _, Sha256};

/// Where `path`, an absolute one of the host whose root directory is `root`, is for this process: the file itself,
/// which need not be there, or a symbolic link of that name. Links on the way to it are followed as on the host,
/// where an absolute one begins at `root`.
///
/// # Errors
///
/// The way can't be followed, or there is a link on it that leads nowhere.
pub fn under(root: &Path, path: &Path) -> io::Result<PathBuf> {
    if root == Path::new("/") {
        return Ok(path.to_owned());
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return followed(root, path);
    };
    match followed(root, directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // What is not there at all may come to be.
            let at = under(root, directory)?;
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

/// As [`under`], with the last link followed, too.
///
/// # Errors
///
/// The way can't be followed, or nothing is at its end.
pub fn followed(root: &Path, path: &Path) -> io::Result<PathBuf> {
    if root == Path::new("/") {
        return Ok(path.to_owned());
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, flags | OFlags::DIRECTORY, Mode::empty())?;
    let end = openat2(&top, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    fs::read_link(format!("/proc/self/fd/{}", end.as_raw_fd()))
}

/// The SHA-256 of some bytes, in hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Writes a file: all of it, or nothing, also if the machine stops. Its directory has to be there.
///
/// # Errors
///
/// The system's, after which the file is as it was.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
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

/// Writes a file that matters to this boot alone, for its owner: all of it, or nothing, unless the machine stops. A
/// process that is killed meanwhile leaves `path` with the extension `tmp`.
///
/// # Errors
///
/// The system's, after which the file is as it was.
pub fn write_for_this_boot(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("tmp");
    replace(path, &unfinished, 0o600, |file| file.write_all(bytes))
}

/// Puts a file in the place of another, once it is written.
fn replace(
    path: &Path,
    unfinished: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let written = (|| {
        let mut file = File::create(unfinished)?;
        // What is left of an interrupted write may have another one.
        file.set_permissions(Permissions::from_mode(mode))?;
        write(&mut file)?;
        fs::rename(unfinished, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(unfinished);
    }
    written
}

/// Removes a file or a symbolic link. One that is gone is no error.
///
/// # Errors
///
/// The system's.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => path.parent().map_or(Ok(()), |directory| {
            // It may be gone, too.
            sync(directory).or_else(|e| match e.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            })
        }),
    }
}

/// Removes a directory if it is empty.
///
/// # Errors
///
/// The system's, other than that it is not empty, or gone.
pub fn remove_empty(path: &Path) -> io::Result<()> {
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
    fn a_file_is_replaced_as_a_whole_with_its_mode_and_nothing_else_stays() {
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
    fn a_failed_write_leaves_the_old_file_and_nothing_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(write(&path, b"one", 0o644).is_err());
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_of_the_host_are_followed_within_it() {
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
        let at = |path: &str| under(&root, Path::new(path)).map_err(|e| e.to_string());
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
        let end = |path: &str| followed(&root, Path::new(path)).map_err(|e| e.kind());
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
