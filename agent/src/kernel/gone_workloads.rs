//! Finds the counters of workloads that are gone, so that they make room for others.
//!
//! A workload is gone when its cgroup is: ids of cgroups are not reused until the next boot. The list of pods does not
//! tell, because a pod may have connections before it is listed, and because the kernel gives the inode number of a
//! namespace to the next one.
//!
//! The counters of a gone workload are removed only after [`KEPT`] without a change. Until then a restarted container's
//! pod still knows how often clients connected to it, and the metrics have time to take in the last changes.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::Path,
    time::Duration,
};

use ebb_common::{Workload, WorkloadKey};
use ebb_core::clock::BootTime;

use super::{WorkloadCount, tracker::TrackerState};
use crate::linux::{cgroups::walk, sync::lock};

/// How long the counters of a gone workload are kept after their last change. A silence this long outweighs all gaps
/// between connections before it ([`ebb_common::Gap::usual`]). So a pod whose clients have been silent for this long
/// settles in the same way with and without the counters.
const KEPT: Duration = Duration::from_secs(20 * 60);

/// The workloads that were gone at the last check.
#[derive(Debug, Default)]
pub(super) struct GoneWorkloads {
    /// Their counters, and since when these have not changed.
    unchanged: HashMap<WorkloadKey, (Workload, BootTime)>,
}

impl GoneWorkloads {
    /// Takes in the counters of all workloads, and returns the workloads whose counters can be removed.
    fn check(
        &mut self,
        now: BootTime,
        workloads: impl IntoIterator<Item = (WorkloadKey, Workload)>,
        cgroups: &HashSet<u64>,
    ) -> Vec<WorkloadKey> {
        let before = std::mem::take(&mut self.unchanged);
        let mut removable = Vec::new();
        for (key, counters) in workloads {
            // A socket without a cgroup has 0.
            if key.cgroup == 0 || cgroups.contains(&key.cgroup) {
                continue;
            }
            let since = match before.get(&key) {
                Some((then, since)) if *then == counters => *since,
                _ => now,
            };
            if now.since(since) >= KEPT {
                removable.push(key);
            } else {
                self.unchanged.insert(key, (counters, since));
            }
        }
        removable
    }
}

impl TrackerState {
    /// The counters of all workloads, and their open connections.
    pub(super) fn counts(&self) -> Vec<WorkloadCount> {
        let counters = self.programs.all_counters(|_| true).unwrap_or_else(|e| {
            tracing::warn!("can't read the counters of connections: {e}");
            vec![]
        });
        self.open_counts.workloads(counters)
    }

    /// Removes the counters of workloads that are gone. Blocking.
    ///
    /// # Errors
    ///
    /// The counters or the tree of cgroups can't be read. Nothing was removed then.
    pub(super) fn remove_gone_workloads(&self, now: BootTime) -> io::Result<()> {
        let Some(root) = &self.cgroup_root else {
            return Ok(());
        };
        let mut workloads: HashMap<_, _> = self.open_counts.known();
        workloads.extend(self.programs.all_counters(|_| true)?);
        // After the counters, so that no cgroup is missing that was created before its workload was counted.
        let cgroups = all_cgroups(root)?;
        let gone = lock(&self.gone_workloads).check(now, workloads, &cgroups);
        for key in gone {
            self.programs.remove_counters(&key);
            self.open_counts.forget(&key);
        }
        Ok(())
    }
}

/// The ids of all cgroups of the node.
fn all_cgroups(root: &Path) -> io::Result<HashSet<u64>> {
    let mut ids = HashSet::from([fs::metadata(root)?.ino()]);
    walk(root, &mut |cgroup| {
        ids.insert(cgroup.ino());
        true
    })?;
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(cgroup: u64) -> WorkloadKey {
        WorkloadKey {
            cgroup,
            netns: 7,
            zero: 0,
        }
    }

    fn opened(n: u64) -> Workload {
        Workload {
            opened: n,
            ..Workload::default()
        }
    }

    fn minutes(n: u64) -> BootTime {
        BootTime::from_nanos(n * 60_000_000_000)
    }

    #[test]
    fn only_a_workload_whose_cgroup_is_gone_and_that_counts_nothing_any_more_is_removable() {
        let mut gone = GoneWorkloads::default();
        let existing = HashSet::from([1]);
        let mut check = |at, counted_by_2| {
            let workloads = [(0, 1), (1, 1), (2, counted_by_2)];
            let workloads = workloads.map(|(cgroup, n)| (key(cgroup), opened(n)));
            gone.check(minutes(at), workloads, &existing)
        };
        assert_eq!(check(0, 1), []);
        assert_eq!(check(19, 1), []);
        // Connections of a listener that another cgroup has inherited.
        assert_eq!(check(30, 2), []);
        assert_eq!(check(49, 2), []);
        assert_eq!(check(50, 2), [key(2)]);
    }

    #[test]
    fn after_a_silence_as_long_as_counters_are_kept_earlier_gaps_do_not_count() {
        let silence = u64::try_from(KEPT.as_nanos()).unwrap();
        let busy = (0..10_000).fold(ebb_common::Gap::default(), |gap, _| gap.with(10_000_000));
        let usual = Duration::from_nanos(busy.usual(silence, 2 * silence));
        // Settling takes a pod with a gap above two minutes for one without clients.
        assert!(usual > 8 * Duration::from_secs(120), "{usual:?}");
    }

    #[test]
    fn the_cgroups_of_the_node_include_the_root_and_all_below() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("kubepods/pod")).unwrap();
        let ids = all_cgroups(root.path()).unwrap();
        let ino = |p: &str| fs::metadata(root.path().join(p)).unwrap().ino();
        assert_eq!(ids, ["", "kubepods", "kubepods/pod"].map(ino).into());
        assert!(all_cgroups(&root.path().join("gone")).is_err());
    }
}
