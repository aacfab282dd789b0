//! The drains that are over.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use ebb_core::{
    clock::BootTime,
    drain_report::{ReleaseReason, Report},
    ids::PodUid,
};

use super::active::DrainId;

/// Drains that are over are kept for the CLI, and to answer late holds.
pub(super) const MAX_FINISHED: usize = 256;
/// For how long after a release a new hold of the pod gets the same answer. A StopContainer comes just after its preStop
/// wait, and the stops of a pod's containers come one just after the other. A hold that comes later, but before the
/// deadline, begins a new dump, because the earlier wait may have been requested by hand, or for the restart of a
/// container.
pub(super) const SAME_ANSWER: Duration = if cfg!(test) {
    Duration::from_millis(300)
} else {
    Duration::from_secs(5)
};

/// A drain that is over, with what a late hold needs of it.
pub(super) struct Finished {
    pub(super) id: DrainId,
    pub(super) deadline: BootTime,
    pub(super) released: BootTime,
    pub(super) report: Arc<Report>,
}

impl Finished {
    /// Whether its report is also the answer to a hold that comes at `now`.
    pub(super) fn answers(&self, now: BootTime) -> bool {
        now.since(self.released) <= SAME_ANSWER
    }
}

/// The last drains that are over, newest first.
#[derive(Default)]
pub(super) struct FinishedDrains {
    own: VecDeque<Finished>,
    /// Reports of earlier agents. They are only shown, and answer no hold.
    earlier: Vec<Arc<Report>>,
}

impl FinishedDrains {
    /// Adds the newest; the oldest is forgotten if there are too many.
    pub(super) fn push(&mut self, drain: Finished) {
        self.own.push_front(drain);
        self.own.truncate(MAX_FINISHED);
        self.forget_surplus();
    }

    /// Adds the reports of earlier agents, newest first.
    pub(super) fn restore(&mut self, earlier: Vec<Arc<Report>>) {
        self.earlier = earlier;
        self.forget_surplus();
    }

    /// Forgets the report of a drain that ended with its agent, because this agent goes on with it.
    pub(super) fn remove_first_part(&mut self, pod: &PodUid) {
        let is_first_part =
            |r: &Report| r.pod.uid == *pod && r.reason == Some(ReleaseReason::Shutdown);
        self.earlier.retain(|r| !is_first_part(r));
    }

    fn forget_surplus(&mut self) {
        self.earlier.truncate(MAX_FINISHED - self.own.len());
    }

    /// The last drain of this pod that is over.
    pub(super) fn last_of(&self, pod: &PodUid) -> Option<&Finished> {
        self.own.iter().find(|f| f.report.pod.uid == *pod)
    }

    pub(super) fn reports(&self) -> impl Iterator<Item = &Arc<Report>> {
        self.own.iter().map(|f| &f.report).chain(&self.earlier)
    }
}
