//! New connections per second, from the programs' counters at two times. This needs no dump.

use std::{collections::HashMap, sync::Arc, time::Duration};

use ebb_core::{
    ids::{CgroupId, NetnsInode},
    scope::Scope,
};
use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{Instant, sleep},
};

use crate::kernel::Tracker;

/// A rate over a shorter time is too coarse.
const SHORTEST: Duration = Duration::from_millis(500);

/// A rate over a longer time is not current.
const LONGEST: Duration = Duration::from_secs(60);

/// How many connections each workload has accepted, by cgroup and network namespace.
type OpenedCounts = HashMap<(CgroupId, NetnsInode), u64>;

/// Measures rates since the last call.
pub(super) struct Rates {
    tracker: Tracker,
    last: Mutex<Option<Reading>>,
}

#[derive(Debug)]
struct Reading {
    at: Instant,
    opened: OpenedCounts,
    rate: Arc<Rate>,
}

/// How many connections were accepted, and in how long.
#[derive(Debug, Default)]
pub(super) struct Rate {
    opened: OpenedCounts,
    over: Duration,
}

impl Rates {
    pub(super) fn new(tracker: Tracker) -> Self {
        Self {
            tracker,
            last: Mutex::default(),
        }
    }

    /// The rate since the last call, if that was recent. Otherwise this takes half a second to measure it.
    pub(super) async fn now(&self) -> Arc<Rate> {
        let mut last = self.last.lock().await;
        let age = last.as_ref().map(|last| last.at.elapsed());
        match (&*last, age) {
            (Some(last), Some(age)) if age < SHORTEST && !last.rate.over.is_zero() => {
                return Arc::clone(&last.rate);
            }
            (Some(_), Some(age)) if age <= LONGEST => sleep(SHORTEST.saturating_sub(age)).await,
            _ => {
                *last = Some(Reading {
                    at: Instant::now(),
                    opened: opened(&self.tracker).await,
                    rate: Arc::default(),
                });
                sleep(SHORTEST).await;
            }
        }
        let (at, opened) = (Instant::now(), opened(&self.tracker).await);
        let rate = Arc::new(match &*last {
            Some(before) => Rate::between(&before.opened, &opened, at - before.at),
            None => Rate::default(),
        });
        *last = Some(Reading {
            at,
            opened,
            rate: Arc::clone(&rate),
        });
        rate
    }
}

async fn opened(tracker: &Tracker) -> OpenedCounts {
    let tracker = tracker.clone();
    // Some system calls per workload of the node.
    let counts = spawn_blocking(move || tracker.counts()).await;
    let counts = counts.unwrap_or_default().into_iter();
    counts.map(|c| ((c.cgroup, c.netns), c.opened)).collect()
}

impl Rate {
    fn between(before: &OpenedCounts, now: &OpenedCounts, over: Duration) -> Self {
        let since = |key, now: u64| now.saturating_sub(before.get(key).copied().unwrap_or(0));
        Self {
            opened: now.iter().map(|(key, n)| (*key, since(key, *n))).collect(),
            over,
        }
    }

    /// The new connections of a pod per second; `None` if ebb can't see them.
    pub(super) fn of(&self, scope: &Scope) -> Option<f64> {
        if matches!(scope, Scope::Untracked(_)) || self.over.is_zero() {
            return None;
        }
        let own = self
            .opened
            .iter()
            .filter(|((cgroup, netns), _)| scope.contains(*cgroup, *netns));
        let opened: u64 = own.map(|(_, n)| n).sum();
        Some(opened as f64 / self.over.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(all: &[(u64, u32, u64)]) -> OpenedCounts {
        let all = all.iter();
        all.map(|(cgroup, netns, n)| ((CgroupId(*cgroup), NetnsInode(*netns)), *n))
            .collect()
    }

    #[test]
    fn a_rate_counts_the_pods_namespace_or_cgroups() {
        let before = opened(&[(1, 1, 100), (2, 1, 5), (3, 9, 0)]);
        let now = opened(&[(1, 1, 110), (2, 1, 5), (3, 9, 4), (4, 9, 6)]);
        let rate = Rate::between(&before, &now, Duration::from_secs(2));
        let pod = Scope::Netns {
            inode: NetnsInode(1),
            pid: 1,
        };
        assert_eq!(rate.of(&pod), Some(5.0));
        let host = Scope::HostNetwork(vec![CgroupId(3), CgroupId(4)]);
        assert_eq!(rate.of(&host), Some(5.0));
        assert_eq!(rate.of(&Scope::Untracked("a VM".into())), None);
        assert_eq!(Rate::default().of(&pod), None);
    }
}
