//! The counters against the kernel's own tables, while connections open and close.
//!
//! One walk of a namespace adds up its flows by workload (`audit` in the programs), between two readings of the
//! counters. A workload that opened or closed a flow in between says nothing and is asked again; the counters
//! have totals, so an opening that made up for a close shows.
//!
//! One that stood still and differs may have a socket on its way out: the kernel takes a closing socket out of its
//! tables first and changes its state after that (`tcp_set_state` in net/ipv4/tcp.c), and lets other tasks run in
//! between (`local_bh_enable` at the end of `inet_put_port`). On a busy node the task that closes may then have to
//! wait for its turn. So the same difference has to be seen several times, over [`STANDING`]. Then the kernel is
//! right, and the difference is added where the programs count.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use ebb_common::{CORRECTIONS, Correction, Workload, WorkloadKey};
use serde::{Deserialize, Serialize};

use super::bytes::Bytes;
use crate::ids::{CgroupId, NetnsInode};

/// How often a namespace is walked at most.
pub(super) const WALKS: u32 = 10;

/// As many walks in a row have to show the same difference.
const AGREEING_WALKS: u32 = 3;

/// For so long they have to show it: longer than a runnable task waits for a CPU.
const STANDING: Duration = Duration::from_secs(1);

/// What an audit has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Workloads whose counters were compared, and agree now.
    pub workloads: u32,
    /// Inbound flows of the kernel's tables.
    pub flows: u64,
    /// By how many flows the counters were wrong. They are right now.
    pub drift: u64,
    /// Where they were wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drifted: Vec<Drifted>,
    /// Workloads that never stood still for long enough to be compared.
    pub moving: u32,
    /// Flows that can't be counted: the kernel has no memory for their record, or the map of workloads is full.
    pub uncounted: u64,
    /// Network namespaces that could not be entered, or whose last process is gone.
    pub unseen: u32,
}

/// A workload whose counters were wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drifted {
    /// Its cgroup.
    pub cgroup: CgroupId,
    /// Its network namespace.
    pub netns: NetnsInode,
    /// What was added to the inbound flows.
    pub inbound: i64,
}

impl Audit {
    /// Takes in what was found in another namespace.
    pub(super) fn add(&mut self, other: Self) {
        self.workloads += other.workloads;
        self.flows += other.flows;
        self.drift += other.drift;
        self.drifted.extend(other.drifted);
        self.moving += other.moving;
        self.uncounted += other.uncounted;
        self.unseen += other.unseen;
    }
}

/// The counters of some workloads at one moment.
pub(super) type Counters = HashMap<WorkloadKey, Workload>;

/// What one walk has seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Walked {
    /// Flows that are in the counters.
    flows: HashMap<WorkloadKey, i64>,
    /// Sockets that were not counted as what they are, by workload.
    disagreeing: HashMap<WorkloadKey, u64>,
}

impl Walked {
    /// Takes in what the program wrote: each an `ebb_common::Audited`.
    pub(super) fn add(&mut self, written: &[u8]) {
        let (all, _) = written.as_chunks::<{ size_of::<ebb_common::Audited>() }>();
        for one in all {
            self.one(Bytes(one));
        }
    }

    /// The workloads of what it has seen.
    pub(super) fn keys(&self) -> impl Iterator<Item = WorkloadKey> {
        self.flows.keys().chain(self.disagreeing.keys()).copied()
    }

    fn one(&mut self, mut b: Bytes<'_>) -> Option<()> {
        let key = WorkloadKey {
            cgroup: b.u64()?,
            netns: b.u32()?,
            zero: b.u32()?,
        };
        let (flow, agrees) = (b.u8()?, b.u8()?);
        if agrees == 0 {
            *self.disagreeing.entry(key).or_default() += 1;
        } else if flow != 0 {
            *self.flows.entry(key).or_default() += 1;
        }
        Some(())
    }
}

/// What a workload's counters lacked at several walks in a row.
#[derive(Clone, Copy, Debug)]
struct Lack {
    /// To be added to the inbound flows.
    inbound: i64,
    /// When the first of these walks was made.
    since: Duration,
    /// When the last one was.
    until: Duration,
    /// How many they are.
    walks: u32,
}

impl Lack {
    const fn is_certain(&self) -> bool {
        self.walks >= AGREEING_WALKS
            && self.until.saturating_sub(self.since).as_nanos() >= STANDING.as_nanos()
    }
}

/// The audit of one namespace, walk by walk.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    lacking: HashMap<WorkloadKey, Lack>,
    /// Sockets that the last walk found miscounted.
    disagreeing: HashMap<WorkloadKey, u64>,
    moving: HashSet<WorkloadKey>,
    /// The counters were corrected since the last walk.
    corrected: bool,
    compared: usize,
    found: Audit,
}

impl Comparison {
    /// Takes in a walk, made between two readings of the counters, so long after the audit was begun. Only workloads
    /// that are `wanted` matter.
    pub(super) fn walked(
        &mut self,
        at: Duration,
        before: &Counters,
        walked: Walked,
        after: &Counters,
        wanted: impl Fn(&WorkloadKey) -> bool,
    ) {
        let keys = before.keys().chain(after.keys()).chain(walked.flows.keys());
        let keys: HashSet<_> = keys.chain(walked.disagreeing.keys()).copied().collect();
        let last = std::mem::take(&mut self.lacking);
        self.moving.clear();
        self.corrected = false;
        self.found.flows = 0;
        let keys = keys.into_iter().filter(|key| wanted(key));
        self.compared = keys
            .inspect(|key| {
                let (a, b) = (before.get(key), after.get(key));
                let now = b.copied().unwrap_or_default();
                let flows = walked.flows.get(key).copied().unwrap_or_default();
                self.found.flows += flows.unsigned_abs();
                if a.copied().unwrap_or_default() != now {
                    self.moving.insert(*key);
                    return;
                }
                let lack = flows - now.inbound;
                if lack != 0 {
                    let again = last.get(key).filter(|was| was.inbound == lack);
                    let now = Lack {
                        inbound: lack,
                        since: again.map_or(at, |was| was.since),
                        until: at,
                        walks: again.map_or(0, |was| was.walks) + 1,
                    };
                    self.lacking.insert(*key, now);
                }
            })
            .count();
        let disagreeing: HashMap<_, _> = walked
            .disagreeing
            .into_iter()
            .filter(|(key, _)| wanted(key))
            .collect();
        // Each was brought in line as it was seen; what is seen again could not be.
        for (key, before) in &self.disagreeing {
            let mended = before.saturating_sub(disagreeing.get(key).copied().unwrap_or(0));
            self.found.drift += mended;
        }
        self.disagreeing = disagreeing;
    }

    /// Nothing is left to be asked again.
    pub(super) fn is_settled(&self) -> bool {
        !self.corrected
            && self.lacking.is_empty()
            && self.moving.is_empty()
            && self.disagreeing.is_empty()
    }

    /// What is certain to be lacking now, to be added to the counters. At most [`CORRECTIONS`].
    pub(super) fn corrections(&mut self) -> Vec<Correction> {
        let certain: Vec<_> = self
            .lacking
            .iter()
            .filter(|(_, lack)| lack.is_certain())
            .map(|(key, lack)| (*key, lack.inbound))
            .take(CORRECTIONS)
            .collect();
        self.corrected = !certain.is_empty();
        let correct = certain.into_iter().map(|(key, inbound)| {
            self.lacking.remove(&key);
            self.found.drift += inbound.unsigned_abs();
            self.found.drifted.push(Drifted {
                cgroup: CgroupId(key.cgroup),
                netns: NetnsInode(key.netns),
                inbound,
            });
            Correction {
                cgroup: key.cgroup,
                netns: key.netns,
                used: 1,
                inbound,
            }
        });
        correct.collect()
    }

    /// What was found in all.
    pub(super) fn end(mut self) -> Audit {
        let unsure = self.moving.len() + self.lacking.len();
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.found.moving = number(unsure);
        self.found.workloads = number(self.compared.saturating_sub(unsure));
        self.found.uncounted = self.disagreeing.values().sum();
        self.found
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

    fn counters(inbound: i64, inbound_total: u64) -> Counters {
        let workload = Workload {
            inbound,
            inbound_total,
        };
        Counters::from([(POD, workload)])
    }

    fn seen(inbound: i64, disagreeing: u64) -> Walked {
        let disagreeing = Some((POD, disagreeing)).filter(|(_, n)| *n > 0);
        Walked {
            flows: HashMap::from([(POD, inbound)]),
            disagreeing: disagreeing.into_iter().collect(),
        }
    }

    fn walk(c: &mut Comparison, before: &Counters, walked: Walked, after: &Counters) {
        walk_at(c, 0, before, walked, after);
    }

    fn walk_at(c: &mut Comparison, ms: u64, before: &Counters, walked: Walked, after: &Counters) {
        c.walked(Duration::from_millis(ms), before, walked, after, |_| true);
    }

    #[test]
    fn what_agrees_is_settled_at_once() {
        let mut c = Comparison::default();
        walk(&mut c, &counters(2, 9), seen(2, 0), &counters(2, 9));
        assert!(c.is_settled() && c.corrections().is_empty());
        let found = c.end();
        assert_eq!((found.workloads, found.flows, found.drift), (1, 2, 0));
    }

    #[test]
    fn what_moved_is_no_drift_even_if_the_number_is_the_same_again() {
        let mut c = Comparison::default();
        for total in 9..20 {
            let (before, after) = (counters(2, total), counters(2, total + 1));
            walk(&mut c, &before, seen(5, 0), &after);
            assert!(!c.is_settled() && c.corrections().is_empty());
        }
        let found = c.end();
        assert_eq!((found.moving, found.drift, found.workloads), (1, 0, 0));
    }

    #[test]
    fn a_difference_is_a_drift_once_it_was_the_same_three_times_for_a_second() {
        let mut c = Comparison::default();
        let now = counters(5, 9);
        for (ms, flows) in [(0, 3), (600, 2), (1200, 2), (1600, 2)] {
            assert!(c.corrections().is_empty());
            walk_at(&mut c, ms, &now, seen(flows, 0), &now);
        }
        let corrections = c.corrections();
        assert_eq!(corrections.len(), 1);
        assert_eq!(corrections[0].inbound, -3);
        walk(&mut c, &counters(2, 9), seen(2, 0), &counters(2, 9));
        assert!(c.is_settled());
        let found = c.end();
        assert_eq!((found.drift, found.moving, found.workloads), (3, 0, 1));
        assert_eq!(found.drifted.len(), 1);
    }

    #[test]
    fn a_socket_whose_close_takes_a_while_is_no_drift() {
        let mut c = Comparison::default();
        let now = counters(1, 9);
        for ms in [0, 5, 15, 35, 75, 155, 315, 635, 995] {
            walk_at(&mut c, ms, &now, seen(0, 0), &now);
            assert!(!c.is_settled() && c.corrections().is_empty());
        }
        walk_at(&mut c, 1300, &counters(0, 9), seen(0, 0), &counters(0, 9));
        assert!(c.is_settled());
        assert_eq!(c.end().drift, 0);
    }

    #[test]
    fn few_walks_make_no_drift_however_far_apart() {
        let mut c = Comparison::default();
        let now = counters(1, 9);
        for ms in [0, 3000] {
            walk_at(&mut c, ms, &now, seen(0, 0), &now);
            assert!(c.corrections().is_empty());
        }
    }

    #[test]
    fn miscounted_sockets_are_a_drift_when_mended_and_uncounted_if_they_can_not_be() {
        let mut c = Comparison::default();
        walk(&mut c, &counters(1, 1), seen(1, 3), &counters(3, 3));
        assert!(!c.is_settled());
        for _ in 0..3 {
            walk(&mut c, &counters(3, 3), seen(3, 1), &counters(3, 3));
        }
        let found = c.end();
        assert_eq!((found.drift, found.uncounted, found.flows), (2, 1, 3));
    }

    #[test]
    fn what_the_program_writes_is_added_up_by_workload() {
        let mut bytes = Vec::new();
        for (flow, agrees) in [(1, 1), (1, 1), (1, 0), (0, 0)] {
            bytes.extend(7u64.to_ne_bytes());
            bytes.extend(70u32.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend([flow, agrees, 0, 0, 0, 0, 0, 0]);
        }
        let mut walked = Walked::default();
        walked.add(&bytes);
        assert_eq!(walked.flows[&POD], 2);
        assert_eq!(walked.disagreeing[&POD], 2);
    }
}
