//! What a machine shows of its drain.

use super::{Machine, observation::Observation};
use crate::{
    clock::{BootTime, millis},
    drain_report::{LatePeer, Phase, ReleaseReason, Report},
};

impl Machine {
    /// Why it was released, if it was.
    pub fn released(&self) -> Option<ReleaseReason> {
        self.released.map(|(reason, _)| reason)
    }

    /// Whether it waits for its flows: the settle phase is over, and the drain is not released.
    pub fn is_in_drain_phase(&self) -> bool {
        self.phase == Phase::Drain
    }

    /// Whether settle is over and flows still arrive: a client or balancer still sends connections to the pod.
    pub fn still_arriving(&self) -> bool {
        self.settle.still_arriving()
    }

    /// The peers of these flows: those that connected within the last `quiet` before the settle phase ended, or later.
    pub fn still_connecting(&self) -> Vec<LatePeer> {
        self.stats.late_peers(self.settle.late_since())
    }

    /// Another number whenever the report has changed in more than its `held_ms`.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The report as of `now`, or of the release if that was earlier. `holds` is 0: the machine does not
    /// know them.
    pub fn report(&self, now: BootTime) -> Report {
        let would_release = self.observation.as_ref().and_then(|o| o.would_release);
        let end = self.released.or(would_release).map_or(now, |(_, at)| at);
        // Without a snapshot, counts from events are known, but a count of zero is not.
        let has_read = self.stats.last_taken_at().is_some();
        let known = |n: u32| (has_read || n > 0).then_some(n);
        let (cut, cut_total) = match self.released {
            // No stop follows, or none yet: the next agent continues the drain. So nothing is cut.
            None | Some((ReleaseReason::NotTerminating | ReleaseReason::Shutdown, _)) => {
                (Vec::new(), 0)
            }
            Some((_, at)) => {
                let ended = self.observation.iter().flat_map(Observation::cut);
                self.stats.cut(&self.flows, ended, at)
            }
        };
        let release_lag_us = self
            .released
            .filter(|(reason, _)| *reason == ReleaseReason::Drained)
            .and_then(|(_, at)| Some(at.since(self.emptied_by?)))
            .map(|lag| u64::try_from(lag.as_micros()).unwrap_or(u64::MAX));
        Report {
            pod: self.subject.pod.clone(),
            workload: self.subject.workload.clone(),
            started_at: self.subject.started_at.clone(),
            observed: self.observation.is_some(),
            traceparent: self.subject.traceparent.clone(),
            phase: self.phase,
            reason: self.released(),
            detail: self.untracked.clone(),
            until: self.policy.until,
            held_ms: millis(end.since(self.started)),
            deadline_ms: millis(self.deadline.at.since(self.started)),
            deadline_cause: self.deadline.cause,
            holds: 0,
            flows_at_start: self.stats.flows_at_start,
            flows_now: self.stats.flows_now,
            changes: self.stats.changes.clone(),
            arrived: known(self.stats.arrived),
            ended: known(self.stats.ended),
            idle_closed: self.stats.idle_closed,
            cut,
            cut_total: known(cut_total),
            late_peers: self.stats.late_peers(BootTime::default()),
            still_arriving: self.settle.still_arriving(),
            settle: Some(self.settle.report()),
            settled_ms: self.settled.map(|at| millis(at.since(self.started))),
            release_lag_us,
            released_by: self.released_by,
            dumps_ended: self.requests.dumps_ended,
            dumps: self.requests.reasons.clone(),
            lookups: self.requests.lookups,
            notified: self.notifying.notified.clone(),
            warnings: self.subject.warnings.clone(),
        }
    }
}
