//! What became of the stops of this node's pods: a bounded memory, for `ebb explain`.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
};

use crate::{lock::lock, report::view::StopView};

/// How many are remembered.
const REMEMBERED: usize = 256;

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JudgementId(u64);

/// The last stops and what was decided about them.
#[derive(Debug, Default)]
pub struct Judgements {
    recent: Mutex<Recent>,
}

#[derive(Debug, Default)]
struct Recent {
    last: u64,
    /// Oldest first.
    stops: VecDeque<(u64, StopView)>,
}

impl Judgements {
    /// Remembers a stop, and forgets the oldest if there are too many.
    pub(crate) fn remember(&self, stop: StopView) -> JudgementId {
        let mut recent = self.recent();
        recent.last += 1;
        let id = recent.last;
        if recent.stops.len() == REMEMBERED {
            recent.stops.pop_front();
        }
        recent.stops.push_back((id, stop));
        JudgementId(id)
    }

    /// A stop that was held is released.
    pub(crate) fn released(&self, id: JudgementId, reason: &str, held_ms: u64) {
        let mut recent = self.recent();
        if let Some((_, stop)) = recent.stops.iter_mut().find(|(i, _)| *i == id.0) {
            stop.reason = Some(reason.into());
            stop.held_ms = Some(held_ms);
        }
    }

    /// The stops of the pods for which `wanted` is true, newest first.
    pub fn of(&self, wanted: impl Fn(&StopView) -> bool) -> Vec<StopView> {
        let recent = self.recent();
        let stops = recent.stops.iter().rev().map(|(_, stop)| stop);
        stops.filter(|stop| wanted(stop)).cloned().collect()
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        // Whole after every call, also one that panicked.
        lock(&self.recent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{PodName, PodUid};

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
    fn the_last_ones_are_remembered_newest_first() {
        let judgements = Judgements::default();
        for n in 0..300 {
            judgements.remember(stop(&format!("p{n}")));
        }
        let all = judgements.of(|_| true);
        assert_eq!(all.len(), REMEMBERED);
        assert_eq!(all[0].pod.name, "p299");
        assert_eq!(judgements.of(|s| s.pod.name == "p44").len(), 1);
        assert_eq!(judgements.of(|s| s.pod.name == "p43").len(), 0);
    }

    #[test]
    fn a_release_is_added_to_its_own_stop_even_if_that_is_forgotten() {
        let judgements = Judgements::default();
        let first = judgements.remember(stop("a"));
        let second = judgements.remember(stop("a"));
        judgements.released(second, "drained", 7);
        let all = judgements.of(|_| true);
        assert_eq!(all[0].reason.as_deref(), Some("drained"));
        assert_eq!((all[0].held_ms, all[1].held_ms), (Some(7), None));
        for _ in 0..300 {
            judgements.remember(stop("b"));
        }
        judgements.released(first, "deadline", 9);
        assert!(judgements.of(|s| s.held_ms.is_some()).is_empty());
    }
}
