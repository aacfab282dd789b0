//! Carrying an audit out: walks, readings of the counters, corrections.

use std::{
    collections::HashSet,
    io,
    sync::{Arc, Mutex},
    thread::sleep,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, MapData};
use ebb_common::{Correction, Workload, WorkloadKey};

use super::{
    Netns,
    audit::{Audit, Comparison, Counters, WALKS, Walked},
    programs::{Inference, Programs, walk, walk_in_parts},
};
use crate::lock::lock;

/// Between two walks of a namespace: first so long, then twice as long, and so on.
const PAUSE: Duration = Duration::from_millis(5);

/// The longest pause. All of them together last longer than a difference has to stand (`audit::STANDING`).
const LONGEST_PAUSE: Duration = Duration::from_millis(640);

/// Repeated walks that would begin later are not made: who asks does not wait for ever.
const NO_MORE_AFTER: Duration = Duration::from_secs(4);

/// Who compares the counters with the kernel's tables. One audit at a time: the maps it needs are one each.
pub(super) struct Auditor {
    workloads: Arc<HashMap<MapData, WorkloadKey, Workload>>,
    pub(super) inference: Inference,
}

/// A namespace in the middle of its audit.
struct Audited<'a> {
    netns: &'a Netns,
    keys: HashSet<WorkloadKey>,
    begun: Instant,
    comparison: Comparison,
}

impl Auditor {
    pub(super) const fn new(
        workloads: Arc<HashMap<MapData, WorkloadKey, Workload>>,
        inference: Inference,
    ) -> Self {
        Self {
            workloads,
            inference,
        }
    }

    /// Compares the workloads of these namespaces that are `wanted`, and corrects their counters. Blocking. Waits
    /// for its `turn` before each walk; where it gets none, it ends with what it has seen.
    pub(super) fn audit<T>(
        &mut self,
        programs: &Mutex<Programs>,
        namespaces: &[&Netns],
        wanted: impl Fn(&WorkloadKey) -> bool,
        turn: impl Fn() -> Option<T>,
    ) -> Audit {
        let known: Vec<_> = self.workloads.keys().filter_map(Result::ok).collect();
        let of = |netns: &Netns| {
            let own = known.iter().filter(|key| key.netns == netns.inode().0);
            own.copied().collect()
        };
        let begun = Instant::now();
        let mut found = Audit::default();
        let mut left: Vec<_> = namespaces
            .iter()
            .map(|netns| Audited {
                netns,
                keys: of(netns),
                begun,
                comparison: Comparison::default(),
            })
            .collect();
        let mut pause = PAUSE;
        let mut wanted_still = true;
        for n in 0..WALKS {
            let mut again = Vec::new();
            for mut one in left {
                if n > 0 && begun.elapsed() > NO_MORE_AFTER {
                    again.push(one);
                    continue;
                }
                let Some(_turn) = turn() else {
                    wanted_still = false;
                    again.push(one);
                    continue;
                };
                match self.walk(programs, &mut one, &wanted) {
                    Ok(()) if one.comparison.is_settled() => found.add(one.comparison.end()),
                    Ok(()) => again.push(one),
                    Err(e) => {
                        tracing::debug!("network namespace {}: {e}", one.netns.inode().0);
                        found.unseen += 1;
                    }
                }
            }
            left = again;
            if left.is_empty() || !wanted_still {
                break;
            }
            sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        for one in left {
            found.add(one.comparison.end());
        }
        self.inference.clear();
        found
    }

    /// Walks a namespace once more, and corrects what is certain by now.
    fn walk(
        &mut self,
        programs: &Mutex<Programs>,
        one: &mut Audited<'_>,
        wanted: impl Fn(&WorkloadKey) -> bool,
    ) -> io::Result<()> {
        self.inference.prepare_to_audit(one.netns)?;
        let before = self.read(&one.keys);
        let link = lock(programs).iterator("audit").map_err(io::Error::other)?;
        let mut walked = Walked::default();
        walk_in_parts(link, one.netns, |part| walked.add(part))?;
        one.keys.extend(walked.keys());
        let after = self.read(&one.keys);
        let at = one.begun.elapsed();
        one.comparison.walked(at, &before, walked, &after, wanted);
        let corrections = one.comparison.corrections();
        if corrections.is_empty() {
            return Ok(());
        }
        // Settled only when another walk agrees.
        self.correct(programs, one.netns, &corrections)
    }

    /// Adds to the counters, as the programs do.
    pub(super) fn correct(
        &mut self,
        programs: &Mutex<Programs>,
        netns: &Netns,
        corrections: &[Correction],
    ) -> io::Result<()> {
        for (place, correction) in (0..).zip(corrections) {
            let set = self.inference.correct.set(place, correction, 0);
            set.map_err(io::Error::other)?;
        }
        let link = lock(programs)
            .iterator("correct")
            .map_err(io::Error::other)?;
        walk(link, netns).map(drop)
    }

    fn read(&self, keys: &HashSet<WorkloadKey>) -> Counters {
        let entry = |key: &WorkloadKey| Some((*key, self.workloads.get(key, 0).ok()?));
        keys.iter().filter_map(entry).collect()
    }
}
