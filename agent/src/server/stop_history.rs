//! The last stops of this node's pods and the decisions about them, for `ebb explain`.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
};

use ebb_protocol::views::StopView;

use tokio::sync::watch;

use crate::linux::sync::lock;

/// How many stops are remembered.
const REMEMBERED: usize = 256;

/// Identifies a remembered stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StopId(u64);

#[derive(Debug, Default)]
pub(super) struct StopHistory {
    recent: Mutex<Recent>,
    /// Grows with each change.
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Recent {
    last: u64,
    /// Oldest first.
    stops: VecDeque<(u64, StopView)>,
}

impl StopHistory {
    /// Remembers a stop, and forgets the oldest if there are too many.
    pub(super) fn remember(&self, stop: StopView) -> StopId {
        let mut recent = self.recent();
        recent.last += 1;
        let id = recent.last;
        if recent.stops.len() == REMEMBERED {
            recent.stops.pop_front();
        }
        recent.stops.push_back((id, stop));
        drop(recent);
        self.revision.send_modify(|n| *n += 1);
        StopId(id)
    }

    /// Adds stops that an earlier agent has recorded, newest first, before those of this agent.
    pub(super) fn restore(&self, earlier: Vec<StopView>) {
        let mut recent = self.recent();
        for stop in earlier {
            if recent.stops.len() == REMEMBERED {
                break;
            }
            // No release is recorded for it any more, so its id is that of no stop.
            recent.stops.push_front((0, stop));
        }
    }

    /// Tells of each change.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Records the release of a stop that was held.
    pub(super) fn released(&self, id: StopId, reason: &str, held_ms: u64) {
        let mut recent = self.recent();
        if let Some((_, stop)) = recent.stops.iter_mut().find(|(i, _)| *i == id.0) {
            stop.reason = Some(reason.into());
            stop.held_ms = Some(held_ms);
        }
        drop(recent);
        self.revision.send_modify(|n| *n += 1);
    }

    /// The stops of the pods for which `wanted` is true, newest first.
    pub(super) fn of(&self, wanted: impl Fn(&StopView) -> bool) -> Vec<StopView> {
        let recent = self.recent();
        let stops = recent.stops.iter().rev().map(|(_, stop)| stop);
        stops.filter(|stop| wanted(stop)).cloned().collect()
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        // A panic cannot leave a change half done.
        lock(&self.recent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::ids::{PodName, PodUid};

    fn stop(pod: &str) -> StopView {
        StopView::new(
            &PodName {
                uid: PodUid::new(pod),
                namespace: "shop".into(),
                name: pod.into(),
            },
            "StopContainer",
        )
    }

    #[test]
    fn the_last_stops_are_remembered_newest_first() {
        let history = StopHistory::default();
        for n in 0..300 {
            history.remember(stop(&format!("p{n}")));
        }
        let all = history.of(|_| true);
        assert_eq!(all.len(), REMEMBERED);
        assert_eq!(all[0].pod.name, "p299");
        assert_eq!(history.of(|s| s.pod.name == "p44").len(), 1);
        assert_eq!(history.of(|s| s.pod.name == "p43").len(), 0);
    }

    #[test]
    fn a_release_is_recorded_at_its_own_stop_and_ignored_if_that_is_forgotten() {
        let history = StopHistory::default();
        let first = history.remember(stop("a"));
        let second = history.remember(stop("a"));
        history.released(second, "drained", 7);
        let all = history.of(|_| true);
        assert_eq!(all[0].reason.as_deref(), Some("drained"));
        assert_eq!((all[0].held_ms, all[1].held_ms), (Some(7), None));
        for _ in 0..300 {
            history.remember(stop("b"));
        }
        history.released(first, "deadline", 9);
        assert!(history.of(|s| s.held_ms.is_some()).is_empty());
    }
}
