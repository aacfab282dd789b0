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
//!
//! A look is a walk, or lookups of the few flows that matter: those believed open, and those whose end only
//! an edge has told. Lookups build on a walk, and count only if no edge since is outstanding or lost.

mod closing;
mod due;
mod event;
mod flows;
mod looks;
mod lookups;
#[cfg(test)]
mod properties;
mod tally;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, time::Duration};

pub use self::event::{Action, Ends, Event, Subject};
use self::{
    closing::Closing,
    flows::{NEVER, OpenFlows, Opened},
    looks::Looks,
    tally::Tally,
};
use super::{
    policy::{Policy, Until},
    report::{LatePeer, LookKind, Phase, ReleaseReason, Report},
};
use crate::{
    clock::{BootTime, millis},
    flow::{Flow, FlowState, Since, Snapshot},
    ids::SocketCookie,
};

/// As many flows as are looked up one by one at most; with more, a walk.
const FEW: usize = 32;
/// How long before the deadline to look once more, so that what is reported as cut is what is cut.
const FINAL_LOOK: Duration = Duration::from_millis(200);
/// How often to look while flows hold and nothing happens: for the report, and because flows that only a
/// look can tell to be exempt arrive as edges too.
const RESYNC: Duration = Duration::from_secs(5);
/// The shortest time between two looks that wait for flows to become idle.
const IDLE_FLOOR: Duration = Duration::from_millis(100);
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
    /// Settle is over, and flows still arrive.
    still_arriving: bool,
    /// The last moment at which a flow is known or suspected to have opened.
    last_open: Option<BootTime>,
    flows: OpenFlows,
    looks: Looks,
    untracked: Option<String>,
    /// The close edge after which nothing was in the way any more.
    emptied_by: Option<BootTime>,
    released: Option<(ReleaseReason, BootTime)>,
    /// The look that released it.
    released_by: Option<LookKind>,
    closing: Closing,
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
            still_arriving: false,
            last_open: None,
            flows: OpenFlows::default(),
            looks: Looks::wanted(),
            untracked: None,
            emptied_by: None,
            released: None,
            released_by: None,
            closing: Closing::default(),
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
        let (mut agrees, mut looked) = (None, false);
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
                self.looks.walked(now, Some(look.taken_at));
                agrees = self.looked(look, now).then_some(LookKind::Walk);
                looked = true;
            }
            Event::LookFailed(why) => self.look_failed(why, now),
            Event::LookedUp(found) => {
                looked = true;
                agrees = self.looked_up(found, now).then_some(LookKind::Lookup);
            }
            Event::Outdated => self.looks.outdated(now),
            Event::Unclear => self.looks.unclear(now),
            Event::IdleClosed(closed) => {
                self.tally.idle_closed += u32::try_from(closed.len()).unwrap_or(u32::MAX);
                self.closing.ended(closed);
                self.revision += 1;
            }
            Event::Lost => {
                // A flow may have opened, and a look that was begun before now may have missed it.
                self.last_arrival = now;
                self.last_open = Some(now);
                self.looks.lost(now);
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
            None if looked => self.idle_to_close(now),
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
        let look = self.look_due().map(|due| due.at);
        [Some(self.deadline), phase_end, look]
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

    /// Whether settle is over and flows still arrive: somebody has not heard yet that the pod is going.
    pub fn still_arriving(&self) -> bool {
        self.still_arriving
    }

    /// The peers that make it so: those who had not been quiet for `quiet` when settle was over, or came later.
    pub fn still_connecting(&self) -> Vec<LatePeer> {
        let quiet = self.policy.quiet;
        let limit = self.settle_limit().since(BootTime::default());
        let before_limit = BootTime::default() + limit.saturating_sub(quiet);
        // Where settle ended before its limit, it was quiet until the last arrival.
        self.tally.late_peers(before_limit.min(self.last_arrival))
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
            late_peers: self.tally.late_peers(BootTime::default()),
            still_arriving: self.still_arriving,
            release_lag_us,
            released_by: self.released_by,
            walks: self.looks.walks,
            lookups: self.looks.lookups,
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
            self.still_arriving |= self.phase == Phase::Drain && how.at >= self.settle_end();
            self.last_arrival = self.last_arrival.max(how.at);
            self.tally.arrival(how.remote, how.at);
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
        self.looks.wanted |= self.flows.are_many_closed();
    }

    /// Takes in a look, and says whether it shows that nothing is in the way.
    fn looked(&mut self, look: Snapshot, now: BootTime) -> bool {
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
        nothing_in_the_way && nothing_since && changed.missed == 0
    }

    /// Counts the flows of a look that opened during the drain and whose edges are lost or late.
    fn late_arrivals(&mut self, look: &Snapshot) {
        let unknown = look.holding().any(|f| f.since == Since::Unknown);
        let last = self.tally.last_look().filter(|_| unknown);
        let seen: Option<HashSet<_>> =
            last.map(|last| last.flows.iter().map(|f| f.cookie).collect());
        let is_new = |cookie| seen.as_ref().is_some_and(|seen| !seen.contains(&cookie));
        for flow in look.holding() {
            let at = match (flow.since, flow.age) {
                (Since::Opening, Some(age)) => {
                    let age = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
                    BootTime::from_nanos(look.taken_at.as_nanos().saturating_sub(age))
                }
                // Its record is lost, and with it when it opened: after the look before this one.
                (Since::Unknown, _) if is_new(flow.cookie) && !self.flows.contains(flow.cookie) => {
                    look.taken_at
                }
                _ => continue,
            };
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

    fn look_failed(&mut self, why: String, now: BootTime) {
        self.looks.walked(now, None);
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

    fn decide(&mut self, agrees: Option<LookKind>, now: BootTime) -> Option<Action> {
        if now >= self.deadline {
            return Some(self.release(ReleaseReason::Deadline, now));
        }
        if self.untracked.is_some() {
            return (now >= self.settle_limit())
                .then(|| self.release(ReleaseReason::Untracked, now));
        }
        if self.phase == Phase::Settle && now >= self.settle_end() {
            self.still_arriving = self.last_arrival > self.started
                && self.last_arrival + self.policy.quiet > self.settle_limit();
            if self.policy.until == Until::Settled {
                return Some(self.release(ReleaseReason::Drained, now));
            }
            // The picture of this phase comes with its first look.
            self.phase = Phase::Drain;
            self.revision += 1;
            self.emptied_by = None;
            self.looks.wanted = true;
        }
        if self.phase == Phase::Drain && agrees.is_some() {
            self.released_by = agrees;
            return Some(self.release(ReleaseReason::Drained, now));
        }
        self.look_due()
            .filter(|due| due.at <= now)
            .map(|due| self.look(due.kind, now))
    }

    fn look(&mut self, kind: LookKind, now: BootTime) -> Action {
        self.looks.outstanding = true;
        self.looks.wanted = false;
        if kind == LookKind::Lookup
            && let Some(flows) = self.flows.to_look_up(FEW)
        {
            return Action::LookUp(flows);
        }
        self.looks.final_asked |= now >= self.final_look();
        Action::Look
    }

    fn release(&mut self, reason: ReleaseReason, now: BootTime) -> Action {
        self.released = Some((reason, now));
        self.phase = Phase::Released;
        self.tally.end_of(&self.flows, now.since(self.started));
        self.revision += 1;
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
