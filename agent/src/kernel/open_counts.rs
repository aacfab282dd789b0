//! How many accepted connections of each workload are open.
//!
//! The programs count from the first opening or closing after the agent's start, so older connections are missing from
//! their counters. The number of open connections is what the last dump showed plus what was counted since.

use std::{
    collections::{HashMap, HashSet},
    sync::Mutex,
    time::Duration,
};

use ebb_common::{LIFETIMES_MS, TICK, Workload, WorkloadKey};
use ebb_core::{
    flow::{Origin, Sample, TcpState},
    ids::{CgroupId, NetnsInode},
};

use crate::linux::sync::lock;

/// Counters of one workload's accepted connections, as the BPF programs keep them. They start at the workload's first
/// opening or closing while the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkloadCount {
    /// The cgroup of the process that created the sockets.
    pub cgroup: CgroupId,
    /// Their network namespace.
    pub netns: NetnsInode,
    /// How many were opened.
    pub opened: u64,
    /// How many were closed, including those that are older than the agent.
    pub closed: u64,
    /// How many are open: those that the last dump of the namespace showed, plus what was counted since. Without a
    /// dump, connections that are older than the agent are missing.
    pub open: u64,
    /// Sum of the lifetimes of the connections in [`Self::lifetimes`].
    pub lifetime_sum: Duration,
    /// Histogram of the lifetimes of connections that were opened and closed while the agent ran. Bucket n has those
    /// that lasted at most [`LIFETIMES_MS`]`[n]` and longer than the bound before it; the last bucket has all longer
    /// ones.
    pub lifetimes: [u64; LIFETIMES_MS.len() + 1],
}

/// For each workload, how many open connections its counters miss: those that were open before the counters started.
#[derive(Debug, Default)]
pub(super) struct OpenCounts {
    uncounted: Mutex<HashMap<WorkloadKey, i64>>,
}

impl OpenCounts {
    /// The counts of all workloads, from the counters in the programs' map.
    pub(super) fn workloads(
        &self,
        mut counters: Vec<(WorkloadKey, Workload)>,
    ) -> Vec<WorkloadCount> {
        let keys = counters.iter().map(|(key, _)| *key).collect();
        let without = self.without_counters(&keys).into_iter();
        counters.extend(without.map(|key| (key, Workload::default())));
        counters
            .iter()
            .map(|(key, w)| WorkloadCount {
                cgroup: CgroupId(key.cgroup),
                netns: NetnsInode(key.netns),
                opened: w.opened,
                closed: w.closed(),
                open: self.open(key, w),
                lifetime_sum: Duration::from_nanos(w.lifetime_ticks.saturating_mul(TICK)),
                lifetimes: w.lifetimes,
            })
            .collect()
    }

    /// How many connections of a workload are open. 0 if the counters are ahead of the dump, so that the sum is
    /// negative.
    fn open(&self, key: &WorkloadKey, counters: &Workload) -> u64 {
        let uncounted = lock(&self.uncounted).get(key).copied().unwrap_or(0);
        u64::try_from(uncounted + balance(counters)).unwrap_or(0)
    }

    /// The workloads that earlier dumps have shown, each with empty counters.
    pub(super) fn known(&self) -> HashMap<WorkloadKey, Workload> {
        let uncounted = lock(&self.uncounted);
        let keys = uncounted.keys();
        keys.map(|key| (*key, Workload::default())).collect()
    }

    /// The workloads of a namespace that earlier dumps have shown.
    pub(super) fn known_in(&self, netns: NetnsInode) -> Vec<WorkloadKey> {
        let uncounted = lock(&self.uncounted);
        uncounted
            .keys()
            .filter(|k| k.netns == netns.0)
            .copied()
            .collect()
    }

    /// Forgets a workload whose counters are removed.
    pub(super) fn forget(&self, key: &WorkloadKey) {
        lock(&self.uncounted).remove(key);
    }

    /// Records the dump of a namespace. `before` and `after` are the counters of its workloads before and after the
    /// dump. If the counters of a known workload changed during the dump, its number stays: the dump may or may not
    /// show those connections.
    pub(super) fn record_dump(
        &self,
        netns: NetnsInode,
        samples: &[Sample],
        before: &HashMap<WorkloadKey, Workload>,
        after: impl Fn(&WorkloadKey) -> Option<Workload>,
    ) {
        let mut open: HashMap<WorkloadKey, i64> = HashMap::new();
        for sample in samples.iter().filter(|s| is_counted(s)) {
            *open.entry(key(sample.cgroup, netns)).or_default() += 1;
        }
        let keys: HashSet<_> = open.keys().chain(before.keys()).copied().collect();
        let mut uncounted = lock(&self.uncounted);
        for key in keys {
            let now = after(&key).unwrap_or_default();
            let quiet = before.get(&key).is_none_or(|before| *before == now);
            if quiet || !uncounted.contains_key(&key) {
                let open = open.get(&key).copied().unwrap_or(0);
                uncounted.insert(key, open - balance(&now));
            }
        }
    }

    /// The workloads that have open connections by a dump, but no counters.
    fn without_counters(&self, counted: &HashSet<WorkloadKey>) -> Vec<WorkloadKey> {
        let uncounted = lock(&self.uncounted);
        let open = uncounted.iter().filter(|(_, n)| **n > 0);
        let keys = open.map(|(key, _)| *key);
        keys.filter(|key| !counted.contains(key)).collect()
    }
}

/// Opened minus closed.
fn balance(counters: &Workload) -> i64 {
    counters
        .opened
        .wrapping_sub(counters.closed())
        .cast_signed()
}

/// Whether the programs count this connection as open.
fn is_counted(sample: &Sample) -> bool {
    sample.origin == Origin::Accepted
        && !matches!(sample.state, TcpState::Listen | TcpState::SynRecv)
}

fn key(cgroup: Option<CgroupId>, netns: NetnsInode) -> WorkloadKey {
    WorkloadKey {
        cgroup: cgroup.map_or(0, |id| id.0),
        netns: netns.0,
        zero: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::flow::sample::testing::sample;

    const NETNS: NetnsInode = NetnsInode(7);

    fn own() -> WorkloadKey {
        key(Some(CgroupId(1)), NETNS)
    }

    fn counters(opened: u64, closed: u64) -> Workload {
        Workload {
            opened,
            closed_unstamped: closed,
            ..Workload::default()
        }
    }

    fn samples(n: usize) -> Vec<Sample> {
        let one = Sample {
            cgroup: Some(CgroupId(1)),
            ..sample()
        };
        vec![one; n]
    }

    fn record_dump(counts: &OpenCounts, n: usize, before: Workload, after: Workload) {
        let before = HashMap::from([(own(), before)]);
        counts.record_dump(NETNS, &samples(n), &before, |_| Some(after));
    }

    #[test]
    fn open_is_what_the_last_dump_showed_plus_what_was_counted_since() {
        let counts = OpenCounts::default();
        assert_eq!(counts.open(&own(), &counters(3, 1)), 2, "without a dump");
        record_dump(&counts, 10, counters(3, 1), counters(3, 1));
        assert_eq!(counts.open(&own(), &counters(3, 1)), 10);
        assert_eq!(counts.open(&own(), &counters(5, 9)), 4);
        assert_eq!(counts.known_in(NETNS), [own()]);
    }

    #[test]
    fn a_dump_during_which_counters_change_is_used_only_if_it_is_the_first() {
        let counts = OpenCounts::default();
        record_dump(&counts, 10, counters(0, 0), counters(1, 0));
        assert_eq!(counts.open(&own(), &counters(1, 0)), 10);
        record_dump(&counts, 99, counters(1, 0), counters(2, 0));
        assert_eq!(counts.open(&own(), &counters(2, 0)), 11);
        record_dump(&counts, 8, counters(2, 0), counters(2, 0));
        assert_eq!(counts.open(&own(), &counters(2, 0)), 8);
    }

    #[test]
    fn a_workload_that_is_missing_from_the_dump_has_none_open() {
        let counts = OpenCounts::default();
        record_dump(&counts, 0, counters(1, 3), counters(1, 3));
        assert_eq!(counts.open(&own(), &counters(1, 3)), 0);
    }

    #[test]
    fn a_workload_without_counters_is_known_until_it_is_forgotten() {
        let counts = OpenCounts::default();
        counts.record_dump(NETNS, &samples(2), &HashMap::new(), |_| None);
        assert_eq!(counts.known(), HashMap::from([(own(), counters(0, 0))]));
        assert_eq!(counts.workloads(vec![])[0].open, 2);
        counts.forget(&own());
        assert_eq!(counts.known(), HashMap::new());
        assert_eq!(counts.workloads(vec![]), []);
    }

    #[test]
    fn more_closed_than_known_means_none_open() {
        assert_eq!(OpenCounts::default().open(&own(), &counters(1, 3)), 0);
    }
}
