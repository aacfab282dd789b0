//! Closing idle flows: which, and how many at a time.
//!
//! Their clients come back to other pods. So that they do not all come at once, no more than [`A_ROUND`] are told
//! in a round, and the rounds are [`PACE`] apart.

use std::{collections::HashSet, time::Duration};

use super::{Action, Machine};
use crate::{
    clock::BootTime,
    drain::{policy::IdleFlows, report::Phase},
    flow::{Flow, FlowState, Snapshot},
    ids::SocketCookie,
};

/// So many idle flows are told to close at a time, at most.
pub(super) const A_ROUND: usize = 64;
/// The shortest time between two rounds.
pub(super) const PACE: Duration = Duration::from_millis(500);

/// The idle flows of a drain, and what has been done about them.
#[derive(Debug, Default)]
pub(super) struct Closing {
    /// A round is.
    under_way: bool,
    /// The earliest moment of the next one.
    next: Option<BootTime>,
    /// The last look has shown more than a round.
    more: bool,
    /// Those that have been told to close: what they do now is their owner's affair.
    told: HashSet<SocketCookie>,
    /// Those that had their turn. What had moved, or can't be told, waits until all others have had theirs.
    asked: HashSet<SocketCookie>,
}

impl Closing {
    /// A round has ended, with these told. Those that had moved may become idle once more.
    pub(super) fn ended(&mut self, told: Vec<SocketCookie>) {
        self.under_way = false;
        self.told.extend(told);
    }

    /// Whether there are more to close than one round could.
    pub(super) const fn more(&self) -> bool {
        self.more
    }

    /// The next round: those of `idle` that are to be closed now.
    fn round<'a>(&mut self, idle: impl Iterator<Item = &'a Flow>, now: BootTime) -> Vec<Flow> {
        let mut idle: Vec<_> = idle.filter(|f| !self.told.contains(&f.cookie)).collect();
        if self.next.is_some_and(|next| now < next) {
            self.more = !idle.is_empty();
            return vec![];
        }
        idle.sort_by_key(|f| self.asked.contains(&f.cookie));
        let fresh = idle.partition_point(|f| !self.asked.contains(&f.cookie));
        self.more = fresh > A_ROUND;
        if !self.more {
            self.asked.clear();
        }
        idle.truncate(A_ROUND);
        self.asked.extend(idle.iter().map(|f| f.cookie));
        if !idle.is_empty() {
            self.under_way = true;
            self.next = Some(now + PACE);
        }
        idle.into_iter().cloned().collect()
    }
}

impl Machine {
    pub(super) fn closes_idle(&self) -> bool {
        self.policy.idle_flows == IdleFlows::Close
    }

    /// The idle flows to close now: each is told once, one round at a time. Not before the settle phase is over, because
    /// clients that do not know better would only come back.
    pub(super) fn idle_to_close(&mut self, now: BootTime) -> Option<Action> {
        if self.phase != Phase::Drain || !self.closes_idle() || self.closing.under_way {
            return None;
        }
        let idle = self.tally.last_look().map(Snapshot::holding)?;
        let idle = self
            .closing
            .round(idle.filter(|f| f.state == FlowState::Idle), now);
        (!idle.is_empty()).then_some(Action::CloseIdle(idle))
    }
}
