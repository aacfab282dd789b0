//! The drain state machine: what happened and when in, what to do out. No I/O, no clock.
//!
//! ```text
//!            quiet, or settle_max            a look agrees
//!   Settle ───────────────────────► Drain ──────────────────► Released(drained)
//!     │  until: settled → drained     │
//!     ├───────────────────────────────┴── deadline ─────────► Released(deadline)
//!     ├── can't look ── settle_max ─────────────────────────► Released(untracked)
//!     └── somebody says so, the agent stops ────────────────► Released(manual, shutdown)
//! ```
//!
//! Edges are for speed: they say when it is worth looking. A drain is released as drained only by a look
//! that shows nothing in the way, and only if no flow is known to have opened since that look was begun.
//! What can't be seen is never taken for nothing.

mod event;
mod flows;
mod looks;
#[cfg(test)]
mod properties;
mod tally;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, time::Duration};

pub use self::event::{Action, Event, Subject};
use self::{
    flows::{NEVER, OpenFlows, Opened},
    looks::Looks,
    tally::Tally,
};
use super::{
    policy::{IdleFlows, Policy, Until},
    report::{Phase, Report},
};
use crate::{
    clock::{BootTime, millis},
    flow::{Flow, FlowState, Snapshot},
    hold::wire::ReleaseReason,
    ids::SocketCookie,
};

/// How long before the deadline to look once more, so that what is reported as cut is what is cut.
const FINAL_LOOK: Duration = Duration::from_millis(200);
/// How often to look while flows hold and nothing happens: for the report, and because flows that only a
/// look can tell to be exempt arrive as edges too.
const RESYNC: Duration = Duration::from_secs(5);
/// The shortest time between two looks that wait for flows to become idle.
const IDLE_FLOOR: Duration = Duration::from_millis(100);
/// The shortest time between two rounds of closing idle flows.
const CLOSE_PACE: Duration = Duration::from_millis(500);
/// When to look again at a flow that has been quiet for long enough, but has bytes in a queue or is not
/// accepted yet: it may become idle at any moment, without an edge.
const IDLE_STUCK: Duration = Duration::from_secs(1);

/// One drain.
#[derive(Debug)]
pub struct Machine {
    subject: Subject,
    policy: Policy,
    started: BootTime,
    deadline: BootTime,
    phase: Phase,
    /// The last new inbound flow, or the beginning.
    last_arrival: BootTime,
    /// The last moment at which a flow is known or suspected to have opened.
    last_open: Option<BootTime>,
    flows: OpenFlows,
    looks: Looks,
    untracked: Option<String>,
    /// The close edge after which nothing was in the way any more.
    emptied_by: Option<BootTime>,
    released: Option<(ReleaseReason, BootTime)>,
    /// Idle flows that are being told to close.
    closing: HashSet<SocketCookie>,
    /// Those that have been: what they do now is their owner's affair.
    told_to_close: HashSet<SocketCookie>,
    tally: Tally,
    revision: u64,
}

impl Machine {
    /// A drain that began at `started`, which is before `now` if an earlier hold of this pod is continued.
    /// It looks at the first [`step`](Self::step); nothing is assumed of the time between.
    pub fn new(
        subject: Subject,
        policy: Policy,
        started: BootTime,
        deadline: BootTime,
        now: BootTime,
    ) -> Self {
        Self {
            subject,
            policy,
            started,
            deadline,
            phase: Phase::Settle,
            last_arrival: now.max(started),
            last_open: None,
            flows: OpenFlows::default(),
            looks: Looks::wanted(),
            untracked: None,
            emptied_by: None,
            released: None,
            closing: HashSet::new(),
            told_to_close: HashSet::new(),
            tally: Tally::default(),
            revision: 0,
        }
    }

    /// Takes in what happened and says what to do now, if anything. Call it again no later than
    /// [`next_wake`](Self::next_wake).
    ///
    /// Edges must be given before a look that was begun after them: what the kernel had reported by then
    /// decides what a look is worth.
    pub fn step(&mut self, event: Event, now: BootTime) -> Option<Action> {
        if self.released.is_some() {
            return None;
        }
        let (mut agrees, mut looked) = (false, false);
        match event {
            Event::FlowOpened {
                cookie,
                local,
                remote,
                at,
            } => {
                self.opened(
                    cookie,
                    Opened {
                        local,
                        remote,
                        at: at.min(now),
                    },
                );
            }
            Event::FlowClosed { cookie, at } => self.closed(cookie, at.min(now)),
            Event::Looked(look) => {
                agrees = self.looked(look, now);
                looked = true;
            }
            Event::LookFailed(why) => self.look_failed(why, now),
            Event::IdleClosed(closed) => {
                // Those that had moved may become idle once more.
                self.closing.clear();
                self.tally.idle_closed += u32::try_from(closed.len()).unwrap_or(u32::MAX);
                self.told_to_close.extend(closed);
                self.revision += 1;
            }
            Event::Lost => {
                // A flow may have opened, and a look that was begun before now may have missed it.
                self.last_arrival = now;
                self.last_open = Some(now);
                self.looks.wanted = true;
            }
            Event::Untracked(why) => self.lose_sight(why),
            Event::Limit(limit) => {
                if limit < self.deadline {
                    self.deadline = limit;
                    self.revision += 1;
                }
            }
            Event::ReleaseNow => return Some(self.release(ReleaseReason::Manual, now)),
            Event::Shutdown => return Some(self.release(ReleaseReason::Shutdown, now)),
            Event::Tick => {}
        }
        match self.decide(agrees, now) {
            None if looked => self.idle_to_close(),
            action => action,
        }
    }

    /// The latest moment of the next [`step`](Self::step); `None` once released.
    pub fn next_wake(&self) -> Option<BootTime> {
        if self.released.is_some() {
            return None;
        }
        let phase_end = if self.untracked.is_some() {
            Some(self.settle_limit())
        } else if self.phase == Phase::Settle {
            Some(self.settle_end())
        } else {
            None
        };
        [Some(self.deadline), phase_end, self.look_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// The latest moment of release.
    pub fn deadline(&self) -> BootTime {
        self.deadline
    }

    /// When the drain began.
    pub fn started(&self) -> BootTime {
        self.started
    }

    /// Its policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Why it was released, if it was.
    pub fn released(&self) -> Option<ReleaseReason> {
        self.released.map(|(reason, _)| reason)
    }

    /// Another number whenever the report has changed in more than its `held_ms`.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The report as of `now`, or of the release if that was earlier. `holds` is 0: the machine does not
    /// know them.
    pub fn report(&self, now: BootTime) -> Report {
        let end = self.released.map_or(now, |(_, at)| at);
        // What edges have told is known also without a look; that there was nothing is not.
        let looked = self.tally.looked_at().is_some();
        let known = |n: u32| (looked || n > 0).then_some(n);
        let (cut, cut_total) = match self.released {
            Some((_, at)) => self.tally.still_open(&self.flows, at),
            None => (Vec::new(), 0),
        };
        let release_lag_us = self
            .released
            .filter(|(reason, _)| *reason == ReleaseReason::Drained)
            .and_then(|(_, at)| Some(at.since(self.emptied_by?)))
            .map(|lag| u64::try_from(lag.as_micros()).unwrap_or(u64::MAX));
        Report {
            pod: self.subject.pod.clone(),
            started_at: self.subject.started_at.clone(),
            phase: self.phase,
            reason: self.released(),
            detail: self.untracked.clone(),
            until: self.policy.until,
            held_ms: millis(end.since(self.started)),
            deadline_ms: millis(self.deadline.since(self.started)),
            holds: 0,
            flows_at_start: self.tally.flows_at_start,
            flows_now: self.tally.flows_now,
            changes: self.tally.changes.clone(),
            arrived: known(self.tally.arrived),
            ended: known(self.tally.ended),
            idle_closed: self.tally.idle_closed,
            cut,
            cut_total: known(cut_total),
            late_peers: self.tally.late_peers(),
            release_lag_us,
            warnings: self.subject.warnings.clone(),
        }
    }

    fn opened(&mut self, cookie: SocketCookie, how: Opened) {
        self.last_open = self.last_open.max(Some(how.at));
        // A new flow carries a request before it is idle, so it can't be before this.
        let blocks_until = if self.idleness_matters() {
            how.at + self.policy.idle_after
        } else {
            NEVER
        };
        if self.flows.opened(cookie, how, blocks_until) {
            self.last_arrival = self.last_arrival.max(how.at);
            self.tally.arrival(how.remote);
            self.emptied_by = None;
            self.revision += 1;
        }
    }

    fn closed(&mut self, cookie: SocketCookie, at: BootTime) {
        let was_blocked = self.flows.blocked();
        if self.flows.closed(cookie, at) {
            self.tally.end(1);
            self.revision += 1;
        }
        if was_blocked && !self.flows.blocked() {
            self.emptied_by = Some(at);
        }
    }

    /// Takes in a look, and says whether it shows that nothing is in the way.
    fn looked(&mut self, look: Snapshot, now: BootTime) -> bool {
        self.looks.came_back(now, true);
        if self
            .tally
            .looked_at()
            .is_some_and(|last| look.taken_at < last)
        {
            return false;
        }
        let first = self.tally.looked_at().is_none();
        self.late_arrivals(&look);

        let holding: Vec<_> = look
            .holding()
            .map(|f| (f, self.blocks_until(f, look.taken_at)))
            .collect();
        let exempt: HashSet<_> = look
            .flows
            .iter()
            .filter(|f| f.exempt.is_some())
            .map(|f| f.cookie)
            .collect();
        let nothing_in_the_way = holding.iter().all(|(_, blocks)| blocks.is_none());
        let changed = self.flows.reconcile(look.taken_at, &holding, &exempt);
        self.tally.end(changed.vanished);
        if first {
            // They are among the flows at the start, and their edges came before the look did.
            self.tally.end(changed.just_closed);
        }
        if self.flows.blocked() {
            self.emptied_by = None;
        }

        let nothing_since = self.last_open.is_none_or(|opened| opened < look.taken_at);
        self.tally.look(look, now.since(self.started), self.phase);
        self.revision += 1;
        nothing_in_the_way && nothing_since
    }

    /// Counts the flows of a look that opened during the drain and whose edges are lost or late.
    fn late_arrivals(&mut self, look: &Snapshot) {
        for flow in look.holding().filter(|f| !f.older_than_agent) {
            let Some(age) = flow.age else { continue };
            let age = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
            let at = BootTime::from_nanos(look.taken_at.as_nanos().saturating_sub(age));
            let how = Opened {
                local: flow.local,
                remote: flow.remote,
                at,
            };
            if at > self.started {
                self.opened(flow.cookie, how);
            }
        }
    }

    /// Until when a flow blocks the release at the least, if no edge ends it; `None` if it does not.
    fn blocks_until(&self, flow: &Flow, taken_at: BootTime) -> Option<BootTime> {
        if !self.idleness_matters() {
            return Some(NEVER);
        }
        match until_idle(flow, self.policy.idle_after) {
            Some(left) => Some(taken_at + left),
            None if self.policy.until == Until::Idle => None,
            // It is told to close, and then its end is what counts.
            None => Some(NEVER),
        }
    }

    /// Whether a flow that becomes idle brings the drain forward.
    fn idleness_matters(&self) -> bool {
        self.policy.until == Until::Idle || self.closes_idle()
    }

    fn closes_idle(&self) -> bool {
        self.policy.idle_flows == IdleFlows::Close
    }

    /// The idle flows to close now: each is told once, one round at a time. Not before the settle phase is over, because
    /// clients that do not know better would only come back.
    fn idle_to_close(&mut self) -> Option<Action> {
        if self.phase != Phase::Drain || !self.closes_idle() || !self.closing.is_empty() {
            return None;
        }
        let idle = self.tally.last_look().map(Snapshot::holding)?;
        let idle: Vec<Flow> = idle
            .filter(|f| f.state == FlowState::Idle && !self.told_to_close.contains(&f.cookie))
            .cloned()
            .collect();
        self.closing.extend(idle.iter().map(|f| f.cookie));
        (!idle.is_empty()).then_some(Action::CloseIdle(idle))
    }

    fn look_failed(&mut self, why: String, now: BootTime) {
        self.looks.came_back(now, false);
        // What it was to find out is still to be found out.
        self.looks.wanted = true;
        if self.looks.given_up() {
            self.lose_sight(why);
        }
    }

    fn lose_sight(&mut self, why: String) {
        if self.untracked.is_none() {
            self.untracked = Some(why);
            self.revision += 1;
        }
    }

    fn decide(&mut self, agrees: bool, now: BootTime) -> Option<Action> {
        if now >= self.deadline {
            return Some(self.release(ReleaseReason::Deadline, now));
        }
        if self.untracked.is_some() {
            return (now >= self.settle_limit())
                .then(|| self.release(ReleaseReason::Untracked, now));
        }
        if self.phase == Phase::Settle && now >= self.settle_end() {
            if self.policy.until == Until::Settled {
                return Some(self.release(ReleaseReason::Drained, now));
            }
            self.enter(Phase::Drain, now);
            self.emptied_by = None;
            self.looks.wanted = true;
        }
        if self.phase == Phase::Drain && agrees {
            return Some(self.release(ReleaseReason::Drained, now));
        }
        if self.look_due().is_some_and(|due| due <= now) {
            self.looks.outstanding = true;
            self.looks.wanted = false;
            self.looks.final_asked |= now >= self.final_look();
            return Some(Action::Look);
        }
        None
    }

    fn enter(&mut self, phase: Phase, now: BootTime) {
        self.phase = phase;
        self.tally.change(now.since(self.started), phase);
        self.revision += 1;
    }

    fn release(&mut self, reason: ReleaseReason, now: BootTime) -> Action {
        self.released = Some((reason, now));
        self.enter(Phase::Released, now);
        Action::Release(reason)
    }

    fn settle_limit(&self) -> BootTime {
        self.started + self.policy.settle_max
    }

    fn settle_end(&self) -> BootTime {
        (self.last_arrival + self.policy.quiet).min(self.settle_limit())
    }

    fn final_look(&self) -> BootTime {
        let before = self.deadline.since(self.started).saturating_sub(FINAL_LOOK);
        self.started + before
    }

    /// When to look next; `None` while a look is under way, and when there is no use in one.
    fn look_due(&self) -> Option<BootTime> {
        if self.looks.outstanding || self.untracked.is_some() {
            return None;
        }
        let ended = self.looks.ended.unwrap_or(self.started);
        let soon = self.looks.not_before().unwrap_or(self.started);
        let due = if self.looks.wanted {
            Some(soon)
        } else if self.phase != Phase::Drain {
            None
        } else if let Some(until) = self.flows.blocked_until() {
            // To close them, each flow counts as it becomes idle; to be drained, all of them must be.
            let (until, floor) = if self.closes_idle() {
                (self.flows.next_idle().unwrap_or(until), CLOSE_PACE)
            } else {
                (until, IDLE_FLOOR)
            };
            Some(until.max(ended + floor).min(ended + RESYNC))
        } else {
            Some(soon)
        };
        let last = (!self.looks.final_asked).then(|| self.final_look());
        [due, last].into_iter().flatten().min()
    }
}

/// How long after a look the flow can be idle at the earliest; `None` if it is already.
///
/// Looking again at that moment misses nothing: a flow that has spoken meanwhile says so in the
/// next look, which moves its moment, so that the one at which it does become idle is met with no more
/// delay than [`IDLE_FLOOR`]. That holds for awaiting flows too: they must be answered first, and then be quiet
/// for all of `idle_after`.
fn until_idle(flow: &Flow, idle_after: Duration) -> Option<Duration> {
    match flow.state {
        FlowState::Idle => None,
        FlowState::Awaiting => Some(idle_after),
        FlowState::Flushing => Some(RESYNC),
        FlowState::Backlog | FlowState::Active | FlowState::HalfClosed => {
            let left = idle_after.saturating_sub(flow.quiet_for);
            Some(if left.is_zero() { IDLE_STUCK } else { left })
        }
    }
}
