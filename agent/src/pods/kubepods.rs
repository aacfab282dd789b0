//! Which processes of the node are in no pod, by where their cgroups are: the kubelet has all of its pods below
//! `kubepods` (`cmutil.NodeAllocatableRoot` and `defaultNodeAllocatableCgroupName` in `pkg/kubelet/cm`).

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::PathBuf,
    sync::Mutex,
};

use crate::{
    ids::CgroupId,
    kernel::cgroups::{is_cgroup2, walk},
    lock::lock,
};

/// As many are remembered. Few services of a node dial its pods.
const OUTSIDE: usize = 1024;

/// Tells the cgroups of pods from others.
#[derive(Debug)]
pub struct Kubepods {
    /// The mount of cgroup v2.
    root: PathBuf,
    /// Those that were found outside. An id is not used again while the node is up.
    outside: Mutex<HashSet<CgroupId>>,
}

impl Kubepods {
    /// `root` is the mount of cgroup v2.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            outside: Mutex::default(),
        }
    }

    /// Whether this cgroup was found to be outside before.
    pub fn is_known_outside(&self, cgroup: CgroupId) -> bool {
        lock(&self.outside).contains(&cgroup)
    }

    /// Whether this cgroup is there and outside of `kubepods`. One that is not known or not found is not. On a node
    /// with cgroup v1 all processes are in the same one, and so all are taken for outside: the kubelet
    /// is one of them. Blocking: it may read the whole hierarchy.
    pub fn is_outside(&self, cgroup: Option<CgroupId>) -> bool {
        if !is_cgroup2(&self.root) {
            return true;
        }
        cgroup.is_some_and(|cgroup| self.find_outside(cgroup))
    }

    fn find_outside(&self, cgroup: CgroupId) -> bool {
        let mut found = fs::metadata(&self.root).is_ok_and(|root| root.ino() == cgroup.0);
        // What can't be read is not found.
        let _ = walk(&self.root, &mut |entry| {
            if entry.file_name().to_string_lossy().contains("kubepods") {
                return false;
            }
            found |= entry.ino() == cgroup.0;
            !found
        });
        if found {
            let mut known = lock(&self.outside);
            if known.len() >= OUTSIDE {
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
    fn what_is_below_kubepods_is_a_pods_wherever_that_is_and_what_is_not_found_is_nobodys() {
        let root = tempfile::tempdir().unwrap();
        let kubepods = Kubepods::new(root.path().into());
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
    fn without_cgroup_v2_nobody_can_be_told_and_nobody_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let kubepods = Kubepods::new(root.path().into());
        assert!(kubepods.is_outside(Some(CgroupId(1))) && kubepods.is_outside(None));
        assert!(!kubepods.is_known_outside(CgroupId(1)));
    }
}
