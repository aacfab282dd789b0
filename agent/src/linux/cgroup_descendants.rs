//! Finds the cgroups that containers on the host's network have created below their own.
//!
//! A pod's scope lists the cgroups that existed when ebb read it from the runtime. systemd in a container creates
//! further cgroups as it starts services, and sockets in these belong to the pod, too.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::PathBuf,
    sync::Mutex,
};

use ebb_core::ids::CgroupId;

use super::cgroups::walk;
use crate::linux::sync::lock;

/// How many paths are cached. A node has fewer containers on the host's network.
const MAX_PATHS: usize = 1024;

/// Finds the descendants of cgroups by id.
#[derive(Debug)]
pub(crate) struct CgroupDescendants {
    /// The mount of cgroup v2.
    root: PathBuf,
    /// The paths of cgroups; `None` if the cgroup is gone. Ids are not reused until the next boot, because they
    /// contain a generation (`__kernfs_new_node` in fs/kernfs/dir.c), and cgroups of v2 can't be renamed.
    paths: Mutex<HashMap<CgroupId, Option<PathBuf>>>,
}

impl CgroupDescendants {
    /// `root` is the mount of cgroup v2.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            paths: Mutex::default(),
        }
    }

    /// These cgroups and all below them. A cgroup that is gone has none below it. Blocking.
    ///
    /// # Errors
    ///
    /// A directory can't be read.
    pub(crate) fn with_descendants(&self, cgroups: &[CgroupId]) -> io::Result<HashSet<CgroupId>> {
        let mut all: HashSet<_> = cgroups.iter().copied().collect();
        let mut paths = lock(&self.paths);
        self.locate(cgroups, &mut paths)?;
        for path in cgroups.iter().filter_map(|id| paths.get(id)?.as_deref()) {
            walk(path, &mut |cgroup| {
                all.insert(CgroupId(cgroup.ino()));
                true
            })?;
        }
        Ok(all)
    }

    /// Caches the paths of these cgroups. If one is not cached yet, visits all cgroups of the node.
    fn locate(
        &self,
        wanted: &[CgroupId],
        paths: &mut HashMap<CgroupId, Option<PathBuf>>,
    ) -> io::Result<()> {
        if paths.len() > MAX_PATHS {
            paths.clear();
        }
        for id in wanted {
            if let Some(path) = paths.get_mut(id) {
                path.take_if(|path| fs::metadata(path).is_ok_and(|found| found.ino() != id.0));
            }
        }
        let new: HashSet<_> = wanted.iter().filter(|id| !paths.contains_key(id)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let mut found = HashMap::new();
        walk(&self.root, &mut |cgroup| {
            let id = CgroupId(cgroup.ino());
            if new.contains(&id) {
                found.insert(id, cgroup.path());
            }
            true
        })?;
        paths.extend(new.into_iter().map(|id| (*id, found.remove(id))));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn id(path: &Path) -> CgroupId {
        CgroupId(fs::metadata(path).unwrap().ino())
    }

    #[test]
    fn cgroups_created_later_are_found_and_a_removed_cgroup_has_none_below() {
        let root = tempfile::tempdir().unwrap();
        let path = |p: &str| root.path().join(p);
        fs::create_dir_all(path("kubepods/pod/c1")).unwrap();
        fs::create_dir_all(path("kubepods/pod/c2/init")).unwrap();
        let cgroups = CgroupDescendants::new(root.path().into());
        let c1 = id(&path("kubepods/pod/c1"));
        let of_c1 = || cgroups.with_descendants(&[c1]).unwrap();
        assert_eq!(of_c1(), HashSet::from([c1]));
        fs::create_dir_all(path("kubepods/pod/c1/init/deep")).unwrap();
        let below = ["kubepods/pod/c1/init", "kubepods/pod/c1/init/deep"].map(|p| id(&path(p)));
        assert_eq!(of_c1(), HashSet::from([c1, below[0], below[1]]));
        fs::remove_dir_all(path("kubepods/pod/c1")).unwrap();
        assert_eq!(of_c1(), HashSet::from([c1]));
        let never = CgroupId(u64::MAX);
        let of_none = cgroups.with_descendants(&[never]).unwrap();
        assert_eq!(of_none, HashSet::from([never]));
    }

    #[test]
    fn a_hierarchy_that_can_not_be_read_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cgroups = CgroupDescendants::new(file.path().into());
        assert!(cgroups.with_descendants(&[CgroupId(1)]).is_err());
    }
}
