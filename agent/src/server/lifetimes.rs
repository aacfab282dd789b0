//! How long a pod's connections lasted, from the programs' counters.

use ebb_common::LIFETIMES_MS;
use ebb_core::scope::Scope;
use ebb_protocol::views::LifetimeBucket;
use tokio::task::spawn_blocking;

use crate::{
    kernel::{Tracker, WorkloadCount},
    pods::Pod,
};

/// The lifetimes of this pod's connections. Empty if none has ended.
pub(super) async fn of_pod(tracker: &Tracker, pod: &Pod) -> Vec<LifetimeBucket> {
    let tracker = tracker.clone();
    // Some system calls per workload of the node.
    let counts = spawn_blocking(move || tracker.counts()).await;
    sum(&counts.unwrap_or_default(), &pod.scope)
}

fn sum(counts: &[WorkloadCount], scope: &Scope) -> Vec<LifetimeBucket> {
    let is_own = |count: &&WorkloadCount| scope.contains(count.cgroup, count.netns);
    let mut sums = [0; LIFETIMES_MS.len() + 1];
    for count in counts.iter().filter(is_own) {
        for (sum, n) in sums.iter_mut().zip(count.lifetimes) {
            *sum += n;
        }
    }
    let bounds = LIFETIMES_MS.into_iter().map(Some).chain([None]);
    let buckets = bounds.zip(sums).filter(|(_, connections)| *connections > 0);
    buckets
        .map(|(at_most_ms, connections)| LifetimeBucket {
            at_most_ms,
            connections,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ebb_core::ids::{CgroupId, NetnsInode};

    use super::*;

    #[test]
    fn the_lifetimes_of_all_cgroups_of_a_pod_are_added() {
        let count = |cgroup, netns, bucket: usize| {
            let mut lifetimes = [0; LIFETIMES_MS.len() + 1];
            lifetimes[bucket] = 2;
            WorkloadCount {
                cgroup: CgroupId(cgroup),
                netns: NetnsInode(netns),
                opened: 2,
                closed: 2,
                open: 0,
                lifetime_sum: Duration::ZERO,
                lifetimes,
            }
        };
        let counts = [
            count(1, 7, 0),
            count(2, 7, 0),
            count(3, 7, 11),
            count(4, 8, 5),
        ];
        let pod = Scope::Netns {
            inode: NetnsInode(7),
            pid: 1,
        };
        let bucket = |at_most_ms, connections| LifetimeBucket {
            at_most_ms,
            connections,
        };
        assert_eq!(sum(&counts, &pod), [bucket(Some(10), 4), bucket(None, 2)]);
        let host = Scope::HostNetwork(vec![CgroupId(4)]);
        assert_eq!(sum(&counts, &host), [bucket(Some(30_000), 2)]);
        assert_eq!(sum(&counts, &Scope::Untracked("gVisor".into())), []);
    }
}
