//! Forgetting the counters of pods that are gone, so that a long-lived agent does not fill the map.
//!
//! A deleted entry must not be one that a socket is about to count in, or that count would be lost. So only
//! workloads go that have no flow, whose namespace has no process, and that were so the last time too: what
//! a pod leaves unsent keeps its namespace and is still counted, and nothing new can begin there.

use std::collections::{HashMap, HashSet};

use ebb_common::{Workload, WorkloadKey};

use crate::ids::NetnsInode;

/// The workloads that seemed to be gone the last time, with their totals of that moment.
#[derive(Debug, Default)]
pub(super) struct Pruner {
    seen: HashMap<WorkloadKey, u64>,
}

impl Pruner {
    /// Which of `counts` are gone for good. `inhabited` are the namespaces that have a process.
    pub(super) fn gone(
        &mut self,
        counts: impl Iterator<Item = (WorkloadKey, Workload)>,
        inhabited: &HashSet<NetnsInode>,
    ) -> Vec<WorkloadKey> {
        let now: HashMap<_, _> = counts
            .filter(|(key, w)| {
                w.inbound == 0 && w.outbound == 0 && !inhabited.contains(&NetnsInode(key.netns))
            })
            .map(|(key, w)| (key, w.inbound_total))
            .collect();
        let (gone, seen) = now
            .into_iter()
            .partition(|(key, total)| self.seen.get(key) == Some(total));
        self.seen = seen;
        let gone: HashMap<_, _> = gone;
        gone.into_keys().collect()
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

    fn having(inbound: i64, inbound_total: u64) -> impl Iterator<Item = (WorkloadKey, Workload)> {
        let workload = Workload {
            inbound,
            outbound: 0,
            inbound_total,
        };
        std::iter::once((POD, workload))
    }

    #[test]
    fn a_workload_goes_when_it_was_empty_and_uninhabited_twice() {
        let (nobody, somebody) = (HashSet::new(), HashSet::from([NetnsInode(70)]));
        let mut pruner = Pruner::default();
        assert!(pruner.gone(having(0, 5), &somebody).is_empty());
        assert!(pruner.gone(having(0, 5), &nobody).is_empty());
        assert_eq!(pruner.gone(having(0, 5), &nobody), [POD]);
        assert!(pruner.gone(having(0, 5), &nobody).is_empty(), "made anew");
    }

    #[test]
    fn a_workload_stays_while_it_has_flows_or_had_some_in_between() {
        let nobody = HashSet::new();
        let mut pruner = Pruner::default();
        assert!(pruner.gone(having(1, 5), &nobody).is_empty());
        assert!(pruner.gone(having(0, 5), &nobody).is_empty());
        assert!(pruner.gone(having(0, 6), &nobody).is_empty());
        assert_eq!(pruner.gone(having(0, 6), &nobody), [POD]);
    }
}
