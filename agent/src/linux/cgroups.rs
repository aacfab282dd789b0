//! Walks the tree of cgroups, which may change during the walk.

use std::{
    fs::{self, DirEntry},
    io,
    path::Path,
};

/// `f_type` of a cgroup v2 file system (`CGROUP2_SUPER_MAGIC` in include/uapi/linux/magic.h).
const CGROUP2: i128 = 0x6367_7270;

/// Whether cgroup v2 is mounted at `path`.
pub(crate) fn is_cgroup2(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|s| i128::from(s.f_type) == CGROUP2)
}

/// Calls `visit` with every directory below `dir`, and descends into those for which it returns true.
///
/// # Errors
///
/// The first error of reading a directory, after all others have been visited. A directory that is removed during the
/// walk is not an error.
pub(crate) fn walk(dir: &Path, visit: &mut impl FnMut(&DirEntry) -> bool) -> io::Result<()> {
    // Reading a cgroup that is removed while it is open fails with ENODEV.
    let is_gone = |e: &io::Error| {
        e.kind() == io::ErrorKind::NotFound
            || e.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
    };
    let entries = match fs::read_dir(dir) {
        Err(e) if is_gone(&e) => return Ok(()),
        entries => entries?,
    };
    let mut outcome = Ok(());
    for entry in entries {
        let walked = match entry.and_then(|e| Ok((e.file_type()?.is_dir(), e))) {
            Ok((true, entry)) if visit(&entry) => walk(&entry.path(), visit),
            Ok(_) => Ok(()),
            Err(e) if is_gone(&e) => Ok(()),
            Err(e) => Err(e),
        };
        outcome = outcome.and(walked);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_visited_as_deep_as_the_visitor_says_and_files_are_not() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["a/b/c", "d/e"] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        fs::write(root.path().join("a/file"), "").unwrap();
        let mut seen = Vec::new();
        walk(root.path(), &mut |entry| {
            let name = entry.file_name().into_string().unwrap();
            let below = name != "b";
            seen.push(name);
            below
        })
        .unwrap();
        seen.sort();
        assert_eq!(seen, ["a", "b", "d", "e"]);
        walk(&root.path().join("gone"), &mut |_| true).unwrap();
        assert!(walk(&root.path().join("a/file"), &mut |_| true).is_err());
    }
}
