//! The cgroups that containers on the host's network have made below their own, whenever they did.
//!
//! A pod's list of cgroups is as old as the look at the runtime that it came from. systemd in a container makes
//! cgroups as it starts services, and the sockets made there are the pod's like all others.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::PathBuf,
    sync::Mutex,
};

use super::cgroups::walk;
use crate::{ids::CgroupId, lock::lock};

/// As many places are remembered. More than a node has containers on the host's network.
const PLACES: usize = 1024;

/// Finds cgroups by their ids, and what is below them.
#[derive(Debug)]
pub(super) struct Nested {
    /// The mount of cgroup v2.
    root: PathBuf,
    /// Where they are; `None`: nowhere any more. An id is not used again while the node is up: it has a generation
    /// in it (`__kernfs_new_node` in fs/kernfs/dir.c), and cgroups of v2 are not renamed.
    places: Mutex<HashMap<CgroupId, Option<PathBuf>>>,
}

impl Nested {
    /// `root` is the mount of cgroup v2.
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            root,
            places: Mutex::default(),
        }
    }

    /// These cgroups and all that are below them now. One that is gone has none. Blocking.
    ///
    /// # Errors
    ///
    /// A directory can't be read.
    pub(super) fn with_descendants(&self, cgroups: &[CgroupId]) -> io::Result<HashSet<CgroupId>> {
        let mut all: HashSet<_> = cgroups.iter().copied().collect();
        let mut places = lock(&self.places);
        self.locate(cgroups, &mut places)?;
        for path in cgroups.iter().filter_map(|id| places.get(id)?.as_deref()) {
            walk(path, &mut |cgroup| {
                all.insert(CgroupId(cgroup.ino()));
                true
            })?;
        }
        Ok(all)
    }

    /// Finds out where these are. Reads all directories of the hierarchy if one has never been asked for.
    fn locate(
        &self,
        wanted: &[CgroupId],
        places: &mut HashMap<CgroupId, Option<PathBuf>>,
    ) -> io::Result<()> {
        if places.len() > PLACES {
            places.clear();
        }
        for id in wanted {
            if let Some(place) = places.get_mut(id) {
                place.take_if(|path| fs::metadata(path).is_ok_and(|found| found.ino() != id.0));
            }
        }
        let new: HashSet<_> = wanted
            .iter()
            .filter(|id| !places.contains_key(id))
            .collect();
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
        places.extend(new.into_iter().map(|id| (*id, found.remove(id))));
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
    fn what_is_made_below_later_is_found_and_what_is_gone_has_nothing_below() {
        let root = tempfile::tempdir().unwrap();
        let path = |p: &str| root.path().join(p);
        fs::create_dir_all(path("kubepods/pod/c1")).unwrap();
        fs::create_dir_all(path("kubepods/pod/c2/init")).unwrap();
        let nested = Nested::new(root.path().into());
        let c1 = id(&path("kubepods/pod/c1"));
        let of_c1 = || nested.with_descendants(&[c1]).unwrap();
        assert_eq!(of_c1(), HashSet::from([c1]));
        fs::create_dir_all(path("kubepods/pod/c1/init/deep")).unwrap();
        let below = ["kubepods/pod/c1/init", "kubepods/pod/c1/init/deep"].map(|p| id(&path(p)));
        assert_eq!(of_c1(), HashSet::from([c1, below[0], below[1]]));
        fs::remove_dir_all(path("kubepods/pod/c1")).unwrap();
        assert_eq!(of_c1(), HashSet::from([c1]));
        let never = CgroupId(u64::MAX);
        let of_none = nested.with_descendants(&[never]).unwrap();
        assert_eq!(of_none, HashSet::from([never]));
    }

    #[test]
    fn a_hierarchy_that_can_not_be_read_is_no_hierarchy_without_cgroups() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let nested = Nested::new(file.path().into());
        assert!(nested.with_descendants(&[CgroupId(1)]).is_err());
    }
}
