//! The watched workloads, and how many events the programs have sent of each.

use std::io;

use aya::maps::{Array, HashMap, MapData};
use ebb_common::{WorkloadKey, WorkloadWatch};
use ebb_core::{ids::WatchId, scope::Scope};

/// The maps that tell the programs which workloads are watched.
pub(super) struct Watches {
    /// `maps::WATCHED` of the programs.
    watched: HashMap<MapData, WorkloadKey, WorkloadWatch>,
    /// `maps::WATCHED_COUNT`.
    total: Array<MapData, u32>,
    last: WatchId,
}

impl Watches {
    pub(super) const fn new(
        watched: HashMap<MapData, WorkloadKey, WorkloadWatch>,
        total: Array<MapData, u32>,
    ) -> Self {
        Self {
            watched,
            total,
            last: WatchId(0),
        }
    }

    /// Makes the programs send and count the events of these workloads. The count starts at 0.
    pub(super) fn begin(&mut self, keys: &[WorkloadKey]) -> io::Result<WatchId> {
        self.last = WatchId(self.last.0.checked_add(1).unwrap_or(1));
        let watch = WorkloadWatch {
            sent: 0,
            number: self.last.0,
            zero: 0,
        };
        for key in keys {
            self.watched
                .insert(key, watch, 0)
                .map_err(io::Error::other)?;
        }
        self.update_total()?;
        Ok(self.last)
    }

    /// Undoes [`Self::begin`].
    pub(super) fn end(&mut self, keys: &[WorkloadKey]) -> io::Result<()> {
        for key in keys {
            // The workload may not be watched.
            let _ = self.watched.remove(key);
        }
        self.update_total()
    }

    /// How many events were sent, including those that the full ring buffer dropped.
    pub(super) fn sent(&self, keys: &[WorkloadKey]) -> io::Result<u64> {
        keys.iter().try_fold(0, |sum, key| {
            let watch = self.watched.get(key, 0).map_err(io::Error::other)?;
            Ok(sum + watch.sent)
        })
    }

    fn update_total(&mut self) -> io::Result<()> {
        let total = u32::try_from(self.watched.keys().count()).unwrap_or(u32::MAX);
        self.total.set(0, total, 0).map_err(io::Error::other)
    }
}

/// The keys of a scope in `maps::WATCHED`.
pub(super) fn watch_keys(scope: &Scope) -> io::Result<Vec<WorkloadKey>> {
    match scope {
        Scope::Netns { inode, .. } => Ok(vec![WorkloadKey {
            cgroup: 0,
            netns: inode.0,
            zero: 0,
        }]),
        Scope::HostNetwork(cgroups) => Ok(cgroups
            .iter()
            .map(|c| WorkloadKey {
                cgroup: c.0,
                netns: 0,
                zero: 0,
            })
            .collect()),
        Scope::Untracked(why) => Err(io::Error::other(why.clone())),
    }
}
