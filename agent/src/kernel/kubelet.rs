//! Finds the kubelet's cgroup, by which ebb recognises its probes.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use ebb_core::ids::CgroupId;

use crate::linux::{
    cgroups::{is_cgroup2, walk},
    sync::lock,
};

/// Names of the kubelet's cgroup: that of the systemd unit, and the usual value of `--kubelet-cgroups`.
const NAMES: [&str; 2] = ["kubelet.service", "kubelet"];

/// How deep to search. `/runtime.slice/kubelet.service` is at 2; one level is added to be safe.
const MAX_DEPTH: usize = 3;

/// How many cgroups of these names count.
const MAX_FOUND: usize = 64;

/// Not searched: the kubelet is not in these, and pods and users choose the names in them.
const SKIPPED: [&str; 3] = ["kubepods", "user.slice", "machine.slice"];

/// Where to search for the kubelet's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeletCgroup {
    /// The mount of cgroup v2.
    pub root: PathBuf,
    /// The path of the cgroup below the root, if it is configured. Then ebb searches for no other.
    pub named: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct FoundCgroup {
    /// Below the root.
    path: PathBuf,
    id: CgroupId,
}

#[derive(Debug, thiserror::Error)]
enum NotFound {
    #[error("{} is not cgroup v2", .0.display())]
    NotCgroup2(PathBuf),
    #[error("there is no cgroup {}", .0.display())]
    Named(PathBuf),
    #[error("no cgroup kubelet.service or kubelet near the top of {}", .0.display())]
    Nowhere(PathBuf),
}

impl KubeletCgroup {
    /// Finds the kubelet's cgroups. Those below them are not the kubelet's: kind has its pods below `/kubelet`.
    /// Blocking.
    fn find(&self) -> Result<Vec<FoundCgroup>, NotFound> {
        if !is_cgroup2(&self.root) {
            return Err(NotFound::NotCgroup2(self.root.clone()));
        }
        self.search()
    }

    fn search(&self) -> Result<Vec<FoundCgroup>, NotFound> {
        if let Some(named) = &self.named {
            let relative = named.strip_prefix("/").unwrap_or(named);
            let path = self.root.join(relative);
            let id = id(&path).map_err(|_| NotFound::Named(path))?;
            let path = Path::new("/").join(relative);
            return Ok(vec![FoundCgroup { path, id }]);
        }
        let mut found = Vec::new();
        // The kubelet's cgroup is not in one that can't be read.
        let _ = walk(&self.root, &mut |entry| {
            let (name, at) = (entry.file_name(), entry.path());
            let (Some(name), Ok(path)) = (name.to_str(), at.strip_prefix(&self.root)) else {
                return false;
            };
            if NAMES.contains(&name) {
                let path = Path::new("/").join(path);
                found.extend(id(&at).map(|id| FoundCgroup { path, id }));
                return false;
            }
            path.components().count() < MAX_DEPTH && !SKIPPED.iter().any(|s| name.starts_with(s))
        });
        found.sort();
        found.truncate(MAX_FOUND);
        if found.is_empty() {
            return Err(NotFound::Nowhere(self.root.clone()));
        }
        Ok(found)
    }
}

/// A cgroup's id is the inode number of its directory.
fn id(dir: &Path) -> io::Result<CgroupId> {
    Ok(CgroupId(fs::metadata(dir)?.ino()))
}

/// The result of the last search; `None` before the first.
type KnownCgroups = Option<Vec<FoundCgroup>>;

/// Stores the result of a search. If it differs from the last one, logs it and returns true.
fn update(known: &mut KnownCgroups, found: Result<Vec<FoundCgroup>, NotFound>) -> bool {
    let (found, why) = match found {
        Ok(found) => (found, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    if known.as_ref() == Some(&found) {
        return false;
    }
    match why {
        Some(why) => tracing::warn!(
            "the kubelet's probes count as connections: {why}; name its cgroup with --kubelet-cgroup"
        ),
        None => tracing::info!(
            cgroups = ?found.iter().map(|f| &f.path).collect::<Vec<_>>(),
            "connections that the kubelet dials count as probes"
        ),
    }
    *known = Some(found);
    true
}

/// Searches for the kubelet's cgroup. One search runs at a time and at most one waits; its result serves all callers
/// that asked for a search in the meantime.
pub(super) struct KubeletSearch {
    cgroup: KubeletCgroup,
    /// Locked while a search runs, so that an older search can't overwrite the result of a newer one.
    searching: Mutex<()>,
    known: Mutex<KnownCgroups>,
    is_waiting: AtomicBool,
}

impl KubeletSearch {
    pub(super) fn new(cgroup: KubeletCgroup) -> Self {
        Self {
            cgroup,
            searching: Mutex::default(),
            known: Mutex::default(),
            is_waiting: AtomicBool::new(false),
        }
    }

    /// Whether the caller must start a search. If not, one is already waiting to start.
    pub(super) fn is_due(&self) -> bool {
        !self.is_waiting.swap(true, Ordering::SeqCst)
    }

    /// Searches, and stores the result. Blocking.
    pub(super) fn run(&self) {
        let _searching = lock(&self.searching);
        self.is_waiting.store(false, Ordering::SeqCst);
        let found = self.cgroup.find();
        update(&mut lock(&self.known), found);
    }

    /// The kubelet's cgroups by the last search.
    pub(super) fn cgroups(&self) -> HashSet<CgroupId> {
        let known = lock(&self.known);
        known.iter().flatten().map(|found| found.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_share_the_search_that_is_waiting() {
        let search = KubeletSearch::new(KubeletCgroup {
            root: "/nowhere".into(),
            named: None,
        });
        assert!(search.is_due());
        assert!((0..100).all(|_| !search.is_due()), "one search per caller");
        search.run();
        assert!(search.cgroups().is_empty());
        // That search has started, so it may miss a newer cgroup: another one is due.
        assert!(search.is_due());
        assert!(!search.is_due());
    }

    /// What a search finds in a tree of these directories.
    fn paths(dirs: &[&str], named: Option<&str>) -> Option<Vec<String>> {
        let root = tempfile::tempdir().unwrap();
        for dir in dirs {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        let kubelet = KubeletCgroup {
            root: root.path().into(),
            named: named.map(Into::into),
        };
        let found = kubelet.search().ok()?;
        for found in &found {
            let at = root.path().join(found.path.strip_prefix("/").unwrap());
            assert_eq!(found.id, id(&at).unwrap());
        }
        Some(found.iter().map(|f| f.path.display().to_string()).collect())
    }

    #[test]
    fn the_cgroup_is_found_where_distributions_put_it_and_those_below_are_not() {
        for dir in [
            "kubelet",
            "kubelet.service",
            "system.slice/kubelet.service",
            "kubelet.slice/kubelet.service",
            "a.slice/a-b.slice/kubelet.service",
        ] {
            let dirs = [dir, &format!("{dir}/kubelet"), "system.slice/sshd.service"];
            assert_eq!(paths(&dirs, None), Some(vec![format!("/{dir}")]));
        }
    }

    #[test]
    fn cgroups_of_pods_and_users_do_not_count_whatever_their_name() {
        let dirs = [
            "kubepods.slice/kubelet",
            "kubepods/kubelet.service",
            "kubepods.slice/kubepods-pod1.slice/kubelet",
            "user.slice/user-1.slice/kubelet.service",
            "a.slice/b.slice/c.slice/kubelet.service",
            "system.slice/kubelet-helper.service",
        ];
        assert_eq!(paths(&dirs, None), None);
    }

    #[test]
    fn a_configured_cgroup_is_the_only_one_and_must_exist() {
        let dirs = ["system.slice/k3s.service", "system.slice/kubelet.service"];
        for name in ["/system.slice/k3s.service", "system.slice/k3s.service"] {
            let found = paths(&dirs, Some(name));
            assert_eq!(found, Some(vec!["/system.slice/k3s.service".into()]));
        }
        assert_eq!(paths(&dirs, Some("/system.slice/rke2.service")), None);
    }

    #[test]
    fn a_directory_that_is_not_cgroup_v2_is_not_searched() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("kubelet")).unwrap();
        let kubelet = KubeletCgroup {
            root: root.path().into(),
            named: None,
        };
        assert!(matches!(kubelet.find(), Err(NotFound::NotCgroup2(_))));
    }

    #[test]
    fn only_a_change_is_logged() {
        let found = |id| {
            let (path, id) = ("/kubelet".into(), CgroupId(id));
            Ok(vec![FoundCgroup { path, id }])
        };
        let nowhere = || Err(NotFound::Nowhere("/".into()));
        let mut known = None;
        assert!(update(&mut known, nowhere()));
        assert!(!update(&mut known, nowhere()));
        assert!(update(&mut known, found(1)));
        assert!(!update(&mut known, found(1)));
        assert!(update(&mut known, found(2)), "a restarted service");
        assert_eq!(known.as_ref().map(|k| k[0].id), Some(CgroupId(2)));
        assert!(update(&mut known, nowhere()));
    }
}
