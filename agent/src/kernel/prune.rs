//! Forgetting the counters of what is gone, so that a long-lived agent does not fill the map.
//!
//! A deleted entry must not be one that a socket is about to count in, or that count would be lost. So only
//! workloads go that have no flow and that nothing can begin in: whose namespace has no process, or whose cgroup
//! is gone; and that were so the last time too. What a pod leaves unsent keeps its namespace and is still counted: for
//! minutes. Where a namespace without a process has had the same flows for an hour, their ends were not counted, and
//! nobody can audit them: they are forgotten, as a drift.
//! (A listener that was handed to another cgroup outlives its own. An entry of its that goes is made anew.)

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::Path,
};

use ebb_common::{Workload, WorkloadKey};

use super::cgroups::walk;
use crate::ids::{CgroupId, NetnsInode};

/// The root of the cgroup v2 hierarchy (`cgroup_setup_root` in kernel/cgroup/cgroup.c).
const ROOT: u64 = 1;

/// All cgroups below `root`, itself included. `None` if that can't be told: `root` is not where the whole
/// hierarchy is mounted, or a directory can't be read.
pub(super) fn cgroups(root: &Path) -> Option<HashSet<CgroupId>> {
    (fs::metadata(root).ok()?.ino() == ROOT).then_some(())?;
    let mut found = HashSet::from([CgroupId(ROOT)]);
    walk(root, &mut |cgroup| {
        found.insert(CgroupId(cgroup.ino()));
        true
    })
    .ok()?;
    Some(found)
}

/// In so many passes in a row, ten minutes apart, the flows of a namespace without a process have to be the same to be
/// forgotten. What was left unsent is given up within minutes (`tcp_orphan_retries`).
const LEAKED_AFTER: u32 = 6;

/// The workloads that seemed to be gone the last time, as they were then, and how often they were so before.
#[derive(Debug, Default)]
pub(super) struct Pruner {
    seen: HashMap<WorkloadKey, (Workload, u32)>,
}

/// A workload that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) key: WorkloadKey,
    /// By how many flows its counter was wrong.
    pub(super) leaked: u64,
}

impl Pruner {
    /// Which of `counts` are gone for good. `inhabited` are the namespaces that have a process, `cgroups` all
    /// cgroups, if that is known.
    pub(super) fn gone(
        &mut self,
        counts: impl Iterator<Item = (WorkloadKey, Workload)>,
        inhabited: &HashSet<NetnsInode>,
        cgroups: Option<&HashSet<CgroupId>>,
    ) -> Vec<Gone> {
        let is_inhabited = |key: &WorkloadKey| inhabited.contains(&NetnsInode(key.netns));
        let is_gone = |key: &WorkloadKey| {
            // 0: the socket had no cgroup v2 to name.
            let no_cgroup =
                |all: &HashSet<_>| key.cgroup != 0 && !all.contains(&CgroupId(key.cgroup));
            !is_inhabited(key) || cgroups.is_some_and(no_cgroup)
        };
        let mut gone = Vec::new();
        let mut seen = HashMap::new();
        for (key, workload) in counts {
            let empty = workload.inbound == 0;
            let is_there = if empty {
                !is_gone(&key)
            } else {
                is_inhabited(&key)
            };
            if is_there {
                continue;
            }
            let before = self.seen.get(&key).filter(|(was, _)| *was == workload);
            let passes = before.map_or(0, |(_, passes)| *passes) + 1;
            if passes >= if empty { 2 } else { LEAKED_AFTER } {
                let leaked = workload.inbound.unsigned_abs();
                gone.push(Gone { key, leaked });
            } else {
                seen.insert(key, (workload, passes));
            }
        }
        self.seen = seen;
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: WorkloadKey = WorkloadKey {
        cgroup: 7,
        netns: 70,
        zero: 0,
    };

    const GONE: Gone = Gone {
        key: POD,
        leaked: 0,
    };

    fn having(inbound: i64, inbound_total: u64) -> impl Iterator<Item = (WorkloadKey, Workload)> {
        let workload = Workload {
            inbound,
            inbound_total,
        };
        std::iter::once((POD, workload))
    }

    #[test]
    fn a_workload_goes_when_it_was_empty_and_uninhabited_twice() {
        let (nobody, somebody) = (HashSet::new(), HashSet::from([NetnsInode(70)]));
        let mut pruner = Pruner::default();
        assert!(pruner.gone(having(0, 5), &somebody, None).is_empty());
        assert!(pruner.gone(having(0, 5), &nobody, None).is_empty());
        assert_eq!(pruner.gone(having(0, 5), &nobody, None), [GONE]);
        assert!(
            pruner.gone(having(0, 5), &nobody, None).is_empty(),
            "made anew"
        );
    }

    #[test]
    fn a_workload_of_an_inhabited_namespace_goes_with_its_cgroup() {
        let somebody = HashSet::from([NetnsInode(70)]);
        let (there, gone) = (HashSet::from([CgroupId(7)]), HashSet::from([CgroupId(8)]));
        let mut pruner = Pruner::default();
        let mut ask = |cgroups| pruner.gone(having(0, 5), &somebody, cgroups);
        assert!(ask(Some(&there)).is_empty() && ask(Some(&there)).is_empty());
        assert!(ask(Some(&gone)).is_empty());
        assert!(ask(None).is_empty(), "not known");
        assert!(ask(Some(&gone)).is_empty());
        assert_eq!(ask(Some(&gone)), [GONE]);
    }

    #[test]
    fn a_workload_stays_while_it_has_flows_or_had_some_in_between() {
        let nobody = HashSet::new();
        let mut pruner = Pruner::default();
        assert!(pruner.gone(having(1, 5), &nobody, None).is_empty());
        assert!(pruner.gone(having(0, 5), &nobody, None).is_empty());
        assert!(pruner.gone(having(0, 6), &nobody, None).is_empty());
        assert_eq!(pruner.gone(having(0, 6), &nobody, None), [GONE]);
    }

    #[test]
    fn flows_that_stay_the_same_for_an_hour_without_a_process_are_a_leak() {
        let (nobody, somebody) = (HashSet::new(), HashSet::from([NetnsInode(70)]));
        let no_cgroup = HashSet::new();
        let mut pruner = Pruner::default();
        // The cgroup alone says nothing: a listener may have been handed on.
        for _ in 0..10 {
            let gone = pruner.gone(having(2, 5), &somebody, Some(&no_cgroup));
            assert!(gone.is_empty());
        }
        // While something is counted it is no leak.
        for total in 5..20 {
            assert!(pruner.gone(having(2, total), &nobody, None).is_empty());
        }
        let found = (1..10).find_map(|pass| {
            let gone = pruner.gone(having(2, 19), &nobody, None);
            (!gone.is_empty()).then_some((pass, gone))
        });
        let leak = Gone {
            key: POD,
            leaked: 2,
        };
        assert_eq!(found, Some((LEAKED_AFTER - 1, vec![leak])));
    }

    #[test]
    fn what_is_not_the_root_of_all_cgroups_tells_nothing() {
        assert_eq!(cgroups(Path::new("/nowhere")), None);
        assert_eq!(cgroups(&std::env::temp_dir()), None);
    }
}
