//! Finding the kubelet's cgroup, by which its probes are known.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use ebb_common::KUBELET_CGROUPS;

use super::cgroups::{is_cgroup2, walk};
use crate::{ids::CgroupId, lock::lock};

/// What its cgroup is called: systemd's unit, or what `--kubelet-cgroups` commonly says.
const NAMES: [&str; 2] = ["kubelet.service", "kubelet"];

/// How far below the root it may be: `/runtime.slice/kubelet.service`, and one level to spare.
const DEPTH: usize = 3;

/// No kubelet is in these, and what is in them is named by others.
const NOT_IN: [&str; 3] = ["kubepods", "user.slice", "machine.slice"];

/// Where the kubelet's cgroup is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeletCgroup {
    /// The mount of cgroup v2.
    pub root: PathBuf,
    /// The one cgroup, from the root, if it was named. It is all that counts then.
    pub named: Option<PathBuf>,
}

/// A cgroup found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Found {
    /// From the root.
    pub(super) path: PathBuf,
    pub(super) id: CgroupId,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotFound {
    #[error("{} is not cgroup v2", .0.display())]
    NotCgroup2(PathBuf),
    #[error("there is no cgroup {}", .0.display())]
    Named(PathBuf),
    #[error("no cgroup kubelet.service or kubelet near the top of {}", .0.display())]
    Nowhere(PathBuf),
}

impl KubeletCgroup {
    /// Finds it: the ids of these cgroups themselves, not of those below them, which are not the kubelet's (kind
    /// has its pods below `/kubelet`). Blocking, like all file access.
    pub(super) fn find(&self) -> Result<Vec<Found>, NotFound> {
        if !is_cgroup2(&self.root) {
            return Err(NotFound::NotCgroup2(self.root.clone()));
        }
        self.search()
    }

    fn search(&self) -> Result<Vec<Found>, NotFound> {
        if let Some(named) = &self.named {
            let relative = named.strip_prefix("/").unwrap_or(named);
            let path = self.root.join(relative);
            let id = id(&path).map_err(|_| NotFound::Named(path))?;
            let path = Path::new("/").join(relative);
            return Ok(vec![Found { path, id }]);
        }
        let mut found = Vec::new();
        // What can't be read is nobody's.
        let _ = walk(&self.root, &mut |entry| {
            let (name, at) = (entry.file_name(), entry.path());
            let (Some(name), Ok(path)) = (name.to_str(), at.strip_prefix(&self.root)) else {
                return false;
            };
            if NAMES.contains(&name) {
                let path = Path::new("/").join(path);
                found.extend(id(&at).map(|id| Found { path, id }));
                return false;
            }
            path.components().count() < DEPTH && !NOT_IN.iter().any(|not| name.starts_with(not))
        });
        found.sort();
        found.truncate(KUBELET_CGROUPS);
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

/// The cgroups last found, to tell when there is something to say.
#[derive(Debug, Default)]
pub(super) struct Known {
    last: Option<Vec<Found>>,
}

impl Known {
    /// Takes in the outcome of a search, and returns the ids if they are others than before. What changed is
    /// logged, once.
    pub(super) fn update(&mut self, found: Result<Vec<Found>, NotFound>) -> Option<Vec<CgroupId>> {
        let (found, why) = match found {
            Ok(found) => (found, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        if self.last.as_ref() == Some(&found) {
            return None;
        }
        match why {
            Some(why) => tracing::warn!(
                "the kubelet's probes count as connections: {why}; name its cgroup with --kubelet-cgroup"
            ),
            None => tracing::info!(
                cgroups = ?found.iter().map(|f| &f.path).collect::<Vec<_>>(),
                "what the kubelet dials is taken for a probe"
            ),
        }
        let ids = found.iter().map(|f| f.id).collect();
        self.last = Some(found);
        Some(ids)
    }
}

/// Searches, one at a time, and one that waits at most: who asks meanwhile has that one's outcome.
pub(super) struct Search {
    cgroup: KubeletCgroup,
    known: Mutex<Known>,
    waits: AtomicBool,
}

impl Search {
    pub(super) fn new(cgroup: KubeletCgroup) -> Self {
        Self {
            cgroup,
            known: Mutex::default(),
            waits: AtomicBool::new(false),
        }
    }

    /// Whether the caller is to see to a search. If not, somebody does already whose search has not begun.
    pub(super) fn is_due(&self) -> bool {
        !self.waits.swap(true, Ordering::SeqCst)
    }

    /// Searches, and hands the ids to `set` if they are others than before. What fails is done again by the next search.
    /// Blocking.
    pub(super) fn run(&self, set: impl FnOnce(&[CgroupId]) -> io::Result<()>) {
        // One at a time, so that the last one to end is not an old one.
        let mut known = lock(&self.known);
        self.waits.store(false, Ordering::SeqCst);
        if let Some(ids) = known.update(self.cgroup.find())
            && let Err(e) = set(&ids)
        {
            tracing::warn!("can't tell the kubelet's probes: {e}");
            known.last = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_who_ask_while_a_search_waits_are_one_search() {
        let search = Search::new(KubeletCgroup {
            root: "/nowhere".into(),
            named: None,
        });
        assert!(search.is_due());
        assert!((0..100).all(|_| !search.is_due()), "a search for each");
        search.run(|ids| {
            assert!(ids.is_empty());
            // It has begun: who asks now may know something newer.
            assert!(search.is_due());
            assert!(!search.is_due());
            Ok(())
        });
    }

    #[test]
    fn what_the_programs_could_not_be_told_they_are_told_by_the_next_search() {
        let search = Search::new(KubeletCgroup {
            root: "/nowhere".into(),
            named: None,
        });
        let told = std::cell::Cell::new(0);
        let tell = |answer: io::Result<()>| {
            search.run(|_| {
                told.set(told.get() + 1);
                answer
            });
            told.get()
        };
        assert_eq!(tell(Err(io::ErrorKind::Other.into())), 1);
        assert_eq!(tell(Ok(())), 2);
        assert_eq!(tell(Ok(())), 2, "nothing new");
    }

    /// A tree of directories, and what is found in it.
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
    fn it_is_found_where_distributions_put_it_and_not_what_is_below() {
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
    fn what_a_pod_or_a_user_calls_kubelet_is_not_it() {
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
    fn a_named_one_is_the_only_one_and_must_be_there() {
        let dirs = ["system.slice/k3s.service", "system.slice/kubelet.service"];
        for name in ["/system.slice/k3s.service", "system.slice/k3s.service"] {
            let found = paths(&dirs, Some(name));
            assert_eq!(found, Some(vec!["/system.slice/k3s.service".into()]));
        }
        assert_eq!(paths(&dirs, Some("/system.slice/rke2.service")), None);
    }

    #[test]
    fn only_cgroup_v2_has_cgroups_to_go_by() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("kubelet")).unwrap();
        let kubelet = KubeletCgroup {
            root: root.path().into(),
            named: None,
        };
        assert!(matches!(kubelet.find(), Err(NotFound::NotCgroup2(_))));
    }

    #[test]
    fn only_a_change_is_told() {
        let found = |id| {
            let (path, id) = ("/kubelet".into(), CgroupId(id));
            Ok(vec![Found { path, id }])
        };
        let nowhere = || Err(NotFound::Nowhere("/".into()));
        let mut known = Known::default();
        assert_eq!(known.update(nowhere()), Some(vec![]));
        assert_eq!(known.update(nowhere()), None);
        assert_eq!(known.update(found(1)), Some(vec![CgroupId(1)]));
        assert_eq!(known.update(found(1)), None);
        assert_eq!(
            known.update(found(2)),
            Some(vec![CgroupId(2)]),
            "a restarted service"
        );
        assert_eq!(known.update(nowhere()), Some(vec![]));
    }
}
