//! Which processes of the node are in no pod: those with a cgroup outside `kubepods`, below which the kubelet keeps
//! all pods (`cmutil.NodeAllocatableRoot` and `defaultNodeAllocatableCgroupName` in `pkg/kubelet/cm`).

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::PathBuf,
    sync::Mutex,
};

use ebb_core::ids::CgroupId;

use crate::linux::{
    cgroups::{is_cgroup2, walk},
    sync::lock,
};

/// How many cgroups to cache. Few services of a node dial its pods.
const MAX_CACHED: usize = 1024;

/// Tells the cgroups of pods from those of node services.
#[derive(Debug)]
pub struct KubepodsCgroup {
    /// The mount of cgroup v2.
    root: PathBuf,
    /// Cgroups found outside `kubepods`. The kernel does not reuse an id before the next boot.
    outside: Mutex<HashSet<CgroupId>>,
}

impl KubepodsCgroup {
    /// `root` is the mount of cgroup v2.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            outside: Mutex::default(),
        }
    }

    /// Whether an earlier call found this cgroup outside `kubepods`.
    pub fn is_known_outside(&self, cgroup: CgroupId) -> bool {
        lock(&self.outside).contains(&cgroup)
    }

    /// Whether this cgroup exists and is outside `kubepods`; false if it is unknown or not found. On a node with
    /// cgroup v1, always true: all processes have the same cgroup id there, the kubelet too. Blocking: it may read
    /// the whole hierarchy.
    pub fn is_outside(&self, cgroup: Option<CgroupId>) -> bool {
        if !is_cgroup2(&self.root) {
            return true;
        }
        cgroup.is_some_and(|cgroup| self.find_outside(cgroup))
    }

    fn find_outside(&self, cgroup: CgroupId) -> bool {
        let mut found = fs::metadata(&self.root).is_ok_and(|root| root.ino() == cgroup.0);
        // A directory that can't be read counts as not found.
        let _ = walk(&self.root, &mut |entry| {
            if entry.file_name().to_string_lossy().contains("kubepods") {
                return false;
            }
            found |= entry.ino() == cgroup.0;
            !found
        });
        if found {
            let mut known = lock(&self.outside);
            if known.len() >= MAX_CACHED {
                known.clear();
            }
            known.insert(cgroup);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_below_kubepods_and_unknown_ones_are_not_outside() {
        let root = tempfile::tempdir().unwrap();
        let kubepods = KubepodsCgroup::new(root.path().into());
        let outside = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            let id = CgroupId(fs::metadata(path).unwrap().ino());
            let found = kubepods.find_outside(id);
            assert_eq!(kubepods.is_known_outside(id), found);
            found
        };
        for path in [
            "",
            "system.slice/kubelet.service",
            "kubelet",
            "user.slice/a/b",
        ] {
            assert!(outside(path), "{path}");
        }
        for path in [
            "kubepods/besteffort/podu1/c1/init",
            "kubepods.slice",
            "kubepods.slice/kubepods-burstable.slice/x.scope",
            // kind has its pods below the kubelet's cgroup.
            "kubelet/kubepods/podu1",
            "kubelet.slice/kubelet-kubepods.slice/kubepods-podu1.slice/c1",
        ] {
            assert!(!outside(path), "{path}");
        }
        assert!(!kubepods.find_outside(CgroupId(u64::MAX)));
    }

    #[test]
    fn without_cgroup_v2_every_process_counts_as_outside() {
        let root = tempfile::tempdir().unwrap();
        let kubepods = KubepodsCgroup::new(root.path().into());
        assert!(kubepods.is_outside(Some(CgroupId(1))) && kubepods.is_outside(None));
        assert!(!kubepods.is_known_outside(CgroupId(1)));
    }
}
