//! What an idle flow means to a drain, and when a flow can become idle.

use std::time::Duration;

use super::{RESYNC, flows::NEVER};
use crate::{
    clock::BootTime,
    flow::{Direction, Flow, FlowState},
    policy::{IdleFlows, Policy, Until},
};

/// The shortest time between two snapshots that wait for flows to become idle.
pub(super) const MIN_IDLE_INTERVAL: Duration = Duration::from_millis(100);
/// When to look up again a flow that has been quiet for long enough, but has bytes in a queue or is not
/// accepted yet: it may become idle at any moment, without an event.
const IDLE_RECHECK: Duration = Duration::from_secs(1);

/// The settings of the policy about idle flows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idleness {
    until: Until,
    idle_flows: IdleFlows,
    /// The pod may live on, so its idle flows stay open.
    pub(super) may_live_on: bool,
    idle_after: Duration,
    peer_timeout: Duration,
}

impl Idleness {
    pub(super) const fn new(policy: &Policy) -> Self {
        Self {
            until: policy.until,
            idle_flows: policy.idle_flows,
            may_live_on: false,
            idle_after: policy.idle_after,
            peer_timeout: policy.peer_timeout,
        }
    }

    /// Whether idle flows are closed.
    pub(super) fn closes(self) -> bool {
        self.idle_flows == IdleFlows::Close && !self.may_live_on
    }

    /// Whether a flow that becomes idle brings the release nearer.
    fn matters(self) -> bool {
        self.until == Until::Idle || self.closes()
    }

    /// The earliest time at which a flow opened at `at` can stop blocking: it carries a request before it is idle.
    pub(super) fn new_blocks_until(self, at: BootTime) -> BootTime {
        if self.matters() {
            at + self.idle_after
        } else {
            NEVER
        }
    }

    /// The earliest time at which a flow of a snapshot can stop blocking, if no event ends it; `None` if it does not
    /// block.
    pub(super) fn blocks_until(self, flow: &Flow, taken_at: BootTime) -> Option<BootTime> {
        if flow.state == FlowState::Lost {
            return None;
        }
        let until = self.blocks_until_idle(flow, taken_at)?;
        // The peer may answer at any moment, and then it is not lost.
        let lost = flow.unanswered_for.map(|silent| {
            let left = self.peer_timeout.saturating_sub(silent);
            taken_at + left.max(MIN_IDLE_INTERVAL)
        });
        Some(lost.map_or(until, |lost| lost.min(until)))
    }

    fn blocks_until_idle(self, flow: &Flow, taken_at: BootTime) -> Option<BootTime> {
        // A dialled connection is often one of a pool, which never ends by itself. The pod closes it after its stop
        // signal.
        let is_dialled = flow.direction == Direction::Outbound;
        if !self.matters() && !is_dialled {
            return Some(NEVER);
        }
        match self.until_idle(flow) {
            Some(left) => Some(taken_at + left),
            None if self.until == Until::Idle || is_dialled => None,
            // ebb closes it, and its end is what counts.
            None => Some(NEVER),
        }
    }

    /// How long after a snapshot the flow can be idle at the earliest; `None` if it is already.
    ///
    /// A snapshot at that time misses nothing. If the flow has moved bytes meanwhile, that snapshot shows it and sets a
    /// later time. So a snapshot finds the flow idle at most [`MIN_IDLE_INTERVAL`] after it became idle. This holds for
    /// awaiting flows, too: the pod must first answer, and then be quiet for all of `idle_after`.
    fn until_idle(self, flow: &Flow) -> Option<Duration> {
        match flow.state {
            FlowState::Idle | FlowState::Lost => None,
            FlowState::Awaiting => Some(self.idle_after),
            FlowState::Flushing => Some(RESYNC),
            FlowState::Backlog | FlowState::Active | FlowState::HalfClosed => {
                let left = self.idle_after.saturating_sub(flow.quiet_for);
                Some(if left.is_zero() { IDLE_RECHECK } else { left })
            }
        }
    }
}
