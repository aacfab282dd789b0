//! The workloads whose edges are wanted, and how many edges the programs have counted for each.

use std::io;

use aya::maps::{Array, HashMap, MapData};
use ebb_common::{OPENING, Watch, WorkloadKey};

use crate::ids::WatchId;

/// The maps that say what is watched.
pub(super) struct Watches {
    /// See `maps::WATCHED` in the programs.
    watched: HashMap<MapData, WorkloadKey, Watch>,
    /// See `maps::WATCHES`.
    total: Array<MapData, u32>,
    last: WatchId,
}

impl Watches {
    /// Nothing is watched.
    pub(super) const fn new(
        watched: HashMap<MapData, WorkloadKey, Watch>,
        total: Array<MapData, u32>,
    ) -> Self {
        Self {
            watched,
            total,
            last: WatchId(0),
        }
    }

    /// Has the edges of workloads reported and counted, from none on.
    pub(super) fn begin(&mut self, keys: &[WorkloadKey]) -> io::Result<WatchId> {
        self.last = WatchId(self.last.0.checked_add(1).unwrap_or(1));
        let watch = Watch {
            edges: 0,
            number: self.last.0,
            zero: [0; 6],
        };
        for key in keys {
            self.watched
                .insert(key, watch, 0)
                .map_err(io::Error::other)?;
        }
        self.count()?;
        Ok(self.last)
    }

    /// Ends what [`Self::begin`] began.
    pub(super) fn end(&mut self, keys: &[WorkloadKey]) -> io::Result<()> {
        for key in keys {
            // It may never have been watched.
            let _ = self.watched.remove(key);
        }
        self.count()
    }

    /// How many edges there were, those that could not be reported included, and one for each flow that is
    /// about to have its first.
    pub(super) fn edges(&self, keys: &[WorkloadKey]) -> io::Result<u64> {
        keys.iter().try_fold(0, |sum, key| {
            let watch = self.watched.get(key, 0).map_err(io::Error::other)?;
            Ok(sum + watch.edges % OPENING + watch.edges / OPENING)
        })
    }

    fn count(&mut self) -> io::Result<()> {
        let total = u32::try_from(self.watched.keys().count()).unwrap_or(u32::MAX);
        self.total.set(0, total, 0).map_err(io::Error::other)
    }
}
