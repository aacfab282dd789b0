//! Closing idle flows: which, and how many at a time.
//!
//! Their clients reconnect to other pods. To spread that load, a round closes no more than [`MAX_PER_ROUND`] flows, and
//! rounds are [`ROUND_INTERVAL`] apart.

use std::{collections::HashSet, time::Duration};

use crate::{
    clock::BootTime,
    flow::{Direction, Flow, FlowState, Snapshot},
    ids::SocketCookie,
};

/// The most idle flows that a round closes.
pub(super) const MAX_PER_ROUND: usize = 64;
/// The shortest time between two rounds.
pub(super) const ROUND_INTERVAL: Duration = Duration::from_millis(500);

/// The idle flows of a drain, and what has been done about them.
#[derive(Debug, Default)]
pub(super) struct Closing {
    /// A round is under way.
    under_way: bool,
    /// The earliest moment of the next one.
    next: Option<BootTime>,
    /// The last snapshot had more idle flows than a round closes.
    more: bool,
    /// The flows that were closed: the application ends them now.
    closed: HashSet<SocketCookie>,
    /// The flows that a round has tried. Those that had moved are tried again after all others.
    tried: HashSet<SocketCookie>,
}

impl Closing {
    /// A round has ended and closed these flows. Those that had moved may become idle again.
    pub(super) fn ended(&mut self, closed: Vec<SocketCookie>) {
        self.under_way = false;
        self.closed.extend(closed);
    }

    /// Whether there are more to close than one round could.
    pub(super) const fn more(&self) -> bool {
        self.more
    }

    /// The next round: the idle flows of `snapshot` to close now. Empty while a round is under way.
    pub(super) fn round(&mut self, snapshot: &Snapshot, now: BootTime) -> Vec<Flow> {
        if self.under_way {
            return vec![];
        }
        let is_idle = |f: &&Flow| {
            f.state == FlowState::Idle
                && f.direction == Direction::Inbound
                && !self.closed.contains(&f.cookie)
        };
        let mut idle: Vec<_> = snapshot.not_exempt().filter(is_idle).collect();
        if self.next.is_some_and(|next| now < next) {
            self.more = !idle.is_empty();
            return vec![];
        }
        idle.sort_by_key(|f| self.tried.contains(&f.cookie));
        let fresh = idle.partition_point(|f| !self.tried.contains(&f.cookie));
        self.more = fresh > MAX_PER_ROUND;
        if !self.more {
            self.tried.clear();
        }
        idle.truncate(MAX_PER_ROUND);
        self.tried.extend(idle.iter().map(|f| f.cookie));
        if !idle.is_empty() {
            self.under_way = true;
            self.next = Some(now + ROUND_INTERVAL);
        }
        idle.into_iter().cloned().collect()
    }
}
