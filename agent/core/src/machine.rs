//! The drain state machine. It takes events and the time, and returns the next action. No I/O, no clock.
//!
//! ```text
//!            silence, or settle_max        a snapshot agrees
//!   Settle ───────────────────────► Drain ──────────────────► Released(drained)
//!     │  until: settled → drained     │
//!     │  nothing listens → drained    │
//!     ├───────────────────────────────┴── deadline ─────────► Released(deadline)
//!     ├── no dump possible ── settle_max ───────────────────► Released(untracked)
//!     └── `ebb release`, the agent stops ───────────────────► Released(manual, shutdown)
//! ```
//!
//! Events are for speed: they show when to ask for a snapshot. The machine releases a drain as drained only after a
//! snapshot that shows no flow in the way, and only if no flow is known to have opened since that snapshot was begun.
//! Unknown never counts as zero.
//!
//! A snapshot is a dump, or a round of lookups of the few flows that matter: those that the machine counts as open, and
//! those whose end only an event has reported. Lookups build on a dump, and count only if no event since is outstanding
//! or lost.

mod closing;
mod event;
mod flows;
mod idleness;
mod lookups;
mod notifying;
mod observation;
#[cfg(test)]
mod properties;
mod report;
mod requests;
mod schedule;
mod settle;
mod stats;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, time::Duration};

pub use self::event::{Action, Deadline, Event, FlowEndpoints, Subject};
use self::{
    closing::Closing,
    flows::{Announced, OpenFlows},
    idleness::Idleness,
    notifying::Notifying,
    observation::Observation,
    requests::Requests,
    schedule::{Due, Schedule},
    settle::Settle,
    stats::DrainStats,
};
use crate::{
    clock::BootTime,
    drain_report::{DeadlineCause, DumpReason, Phase, ReleaseReason, ReleasedBy},
    flow::{Age, Direction, Flow, Snapshot},
    ids::SocketCookie,
    notification::Notified,
    policy::{DrainMode, Policy, PortsInUse, Until},
};

/// The most flows that are looked up one by one, which is one request to the kernel. With more, a dump is made.
const MAX_LOOKUPS: usize = 64;
/// How long before the deadline the last dump is made, so that the report names the flows that are cut.
const FINAL_DUMP: Duration = Duration::from_millis(200);
/// How often a dump is made while flows hold and nothing happens: for the report, and because events also arrive of
/// flows that only a dump shows to be exempt.
const RESYNC: Duration = Duration::from_secs(5);

/// One drain.
#[derive(Debug)]
pub struct Machine {
    subject: Subject,
    policy: Policy,
    started: BootTime,
    deadline: Deadline,
    phase: Phase,
    settle: Settle,
    settled: Option<BootTime>,
    idleness: Idleness,
    /// The last moment at which a flow is known or suspected to have opened.
    last_open: Option<BootTime>,
    flows: OpenFlows,
    requests: Requests,
    untracked: Option<String>,
    /// Why the pod may have connections that no snapshot shows.
    hidden: Option<String>,
    /// The policy's ports have been compared with those that the pod uses.
    ports_known: bool,
    /// The close event after which nothing was in the way any more.
    emptied_by: Option<BootTime>,
    released: Option<(ReleaseReason, BootTime)>,
    /// The snapshot that released it.
    released_by: Option<ReleasedBy>,
    closing: Closing,
    notifying: Notifying,
    /// If ebb holds nothing, and only observes.
    observation: Option<Observation>,
    stats: DrainStats,
    revision: u64,
}

impl Machine {
    /// A drain that began at `started`, which is before `now` if an earlier hold of this pod is continued.
    /// The first [`step`](Self::step) asks for a dump; nothing is assumed of the time between.
    pub fn new(
        subject: Subject,
        policy: Policy,
        started: BootTime,
        deadline: Deadline,
        now: BootTime,
    ) -> Self {
        let is_observed = policy.drain == DrainMode::Observe;
        let policy = match is_observed {
            true => policy.for_observation(),
            false => policy,
        };
        // No event tells of dialled flows.
        let dumps_only = !policy.outbound.is_ignore();
        Self {
            settle: Settle::new(&policy, started, now),
            settled: None,
            idleness: Idleness::new(&policy),
            subject,
            policy,
            started,
            deadline,
            phase: Phase::Settle,
            last_open: None,
            flows: OpenFlows::default(),
            requests: Requests::wanted(dumps_only),
            untracked: None,
            hidden: None,
            ports_known: false,
            emptied_by: None,
            released: None,
            released_by: None,
            closing: Closing::default(),
            notifying: Notifying::default(),
            observation: is_observed.then(Observation::default),
            stats: DrainStats::default(),
            revision: 0,
        }
    }

    /// Takes an event, and returns the next action, if there is one. Call it again no later than
    /// [`next_wake`](Self::next_wake).
    ///
    /// Pass events before a snapshot that was begun after them: the machine checks a snapshot against the events that
    /// the kernel had reported by then.
    pub fn step(&mut self, event: Event, now: BootTime) -> Option<Action> {
        if self.released.is_some() {
            return None;
        }
        let over_at = self.observation.as_ref().and_then(Observation::over_at);
        if let Some(over_at) = over_at {
            return self.linger(event, over_at, now);
        }
        let (mut agrees, mut has_read) = (None, false);
        match event {
            Event::FlowOpened {
                cookie,
                local,
                remote,
                at,
            } => {
                self.opened(
                    cookie,
                    Announced {
                        local,
                        remote,
                        at: at.min(now),
                    },
                );
            }
            Event::FlowClosed { cookie, at } => self.closed(cookie, at.min(now)),
            Event::Dumped(snapshot) => {
                self.requests.dumped(now, Some(snapshot.taken_at));
                // No flow holds, and none can arrive, unless the pod passes traffic on that ebb does not see.
                let is_worker = snapshot.listens == Some(false)
                    && !snapshot.not_exempt().any(Flow::holds)
                    && self.hidden.is_none();
                agrees = self.take_in(snapshot, now).then_some(ReleasedBy::Dump);
                has_read = true;
                if is_worker && agrees.is_some() && self.phase == Phase::Settle {
                    self.settle.nothing_listens();
                }
            }
            Event::DumpFailed(why) => self.dump_failed(why, now),
            Event::LookedUp(found) => {
                has_read = true;
                agrees = self.looked_up(found, now).then_some(ReleasedBy::Lookup);
            }
            Event::Arrivals(arrivals) => {
                if self.phase == Phase::Settle {
                    self.settle.learn(arrivals);
                    self.revision += 1;
                }
            }
            Event::Outdated => self.requests.outdated(now),
            Event::Unclear(why) => self.requests.unclear(why, now),
            Event::IdleClosed(closed) => {
                self.stats.idle_closed += u32::try_from(closed.len()).unwrap_or(u32::MAX);
                self.closing.ended(closed);
                self.revision += 1;
            }
            Event::Stopping(is_stopping) => self.notifying.is_stopping = is_stopping,
            Event::MayLiveOn(may_live_on) => {
                let before = std::mem::replace(&mut self.idleness.may_live_on, may_live_on);
                // The flows of the last snapshot may be idle by now.
                if before && self.idleness.closes() {
                    self.requests.want(DumpReason::Idle);
                }
            }
            Event::Notified(outcome) => {
                self.notifying.ended(outcome);
                self.revision += 1;
            }
            Event::Lost => {
                // A flow may have opened, and a snapshot that was begun before now may have missed it.
                self.settle.may_have_arrived(now);
                self.last_open = Some(now);
                self.requests.lost(now);
            }
            // Flows that were seen do not end because events do: dumps show them until the deadline.
            Event::Untracked(_) if self.flows.blocked() => self.requests.without_events(),
            Event::Untracked(why) => self.lose_sight(why),
            Event::Hidden(why) => self.hidden = Some(why),
            Event::PortsInUse(used) => self.fit_ports(&used),
            Event::Exited(exits) => {
                if self.observation.is_some() {
                    return Some(self.exited(&exits, now));
                }
            }
            // The pod is removed once its containers have exited, which ends the drain.
            Event::Limit(limit)
                if self.observation.is_some() && limit.cause == DeadlineCause::Removed => {}
            Event::Limit(limit) => {
                if limit.at < self.deadline.at {
                    self.deadline = limit;
                    self.revision += 1;
                }
            }
            Event::Release(reason) => return Some(self.release(reason, now)),
            Event::Tick => {}
        }
        match self.decide(agrees, now) {
            None if has_read => self.idle_to_close(now),
            action => action,
        }
    }

    /// The latest moment of the next [`step`](Self::step); `None` once released.
    pub fn next_wake(&self) -> Option<BootTime> {
        if self.released.is_some() {
            return None;
        }
        let over_at = self.observation.as_ref().and_then(Observation::over_at);
        if over_at.is_some() {
            return over_at;
        }
        let phase_end = if self.untracked.is_some() {
            Some(self.settle.limit())
        } else if self.phase == Phase::Settle {
            Some(self.settle.end())
        } else {
            None
        };
        let request = self.next_request().map(|due| due.at);
        [Some(self.deadline.at), phase_end, request]
            .into_iter()
            .flatten()
            .min()
    }

    /// The latest moment of release.
    pub fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// When the drain began.
    pub fn started(&self) -> BootTime {
        self.started
    }

    /// The policy, adapted to the ports that the pod uses.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The notifications that were sent to the application.
    pub fn notified(&self) -> &Notified {
        &self.notifying.notified
    }

    /// An earlier drain of the same end of the pod has sent these notifications. They are not sent again.
    pub fn set_notified(&mut self, notified: Notified) {
        self.notifying.notified = notified;
    }

    /// A call with this trace has joined. The first call with a trace counts.
    pub fn join_trace(&mut self, traceparent: Option<String>) {
        let own = &mut self.subject.traceparent;
        *own = own.take().or(traceparent);
    }

    /// Whether it still needs [`Event::PortsInUse`].
    pub const fn wants_ports(&self) -> bool {
        !self.ports_known
    }

    /// What is wrong with the pod's annotations.
    pub fn warnings(&self) -> &[String] {
        &self.subject.warnings
    }

    fn opened(&mut self, cookie: SocketCookie, how: Announced) {
        self.last_open = self.last_open.max(Some(how.at));
        if self
            .flows
            .opened(cookie, how, self.idleness.new_blocks_until(how.at))
        {
            self.settle.arrival(how.at, self.phase == Phase::Drain);
            self.stats.arrival(how.remote, how.at);
            self.emptied_by = None;
            self.revision += 1;
        }
    }

    fn closed(&mut self, cookie: SocketCookie, at: BootTime) {
        let was_blocked = self.flows.blocked();
        self.observe_close(cookie, at);
        if self.flows.closed(cookie, at) {
            self.stats.flows_ended(1);
            self.revision += 1;
        }
        if was_blocked && !self.flows.blocked() {
            self.emptied_by = Some(at);
        }
        if self.flows.are_many_closed() {
            self.requests.want(DumpReason::ManyFlows);
        }
    }

    /// Takes in a snapshot. True if it shows that no flow is in the way.
    fn take_in(&mut self, snapshot: Snapshot, now: BootTime) -> bool {
        if self
            .stats
            .last_taken_at()
            .is_some_and(|last| snapshot.taken_at < last)
        {
            return false;
        }
        let first = self.stats.last_taken_at().is_none();
        self.late_arrivals(&snapshot);

        let not_exempt: Vec<_> = snapshot
            .not_exempt()
            .map(|f| (f, self.idleness.blocks_until(f, snapshot.taken_at)))
            .collect();
        let exempt: HashSet<_> = snapshot
            .flows
            .iter()
            .filter(|f| f.exempt.is_some())
            .map(|f| f.cookie)
            .collect();
        let nothing_in_the_way = not_exempt.iter().all(|(_, blocks)| blocks.is_none());
        let changed = self
            .flows
            .reconcile(snapshot.taken_at, &not_exempt, &exempt);
        self.stats.flows_ended(changed.vanished);
        if first {
            // They are among the flows at the start, and their events came before the snapshot did.
            self.stats.flows_ended(changed.just_closed);
        }
        if self.flows.blocked() {
            self.emptied_by = None;
        }

        let nothing_since = self
            .last_open
            .is_none_or(|opened| opened < snapshot.taken_at);
        self.stats
            .record(snapshot, now.since(self.started), self.phase);
        self.revision += 1;
        nothing_in_the_way && nothing_since && changed.missed == 0
    }

    /// Counts the flows of a snapshot that opened during the drain and whose events are lost or late.
    fn late_arrivals(&mut self, snapshot: &Snapshot) {
        let unknown = snapshot.not_exempt().any(|f| f.age.known().is_none());
        let last = self.stats.last_snapshot().filter(|_| unknown);
        let seen: Option<HashSet<_>> =
            last.map(|last| last.flows.iter().map(|f| f.cookie).collect());
        let is_new = |cookie| seen.as_ref().is_some_and(|seen| !seen.contains(&cookie));
        // The pod itself dials outbound ones.
        let inbound = |f: &&Flow| f.direction == Direction::Inbound;
        for flow in snapshot.not_exempt().filter(inbound) {
            let at = match flow.age {
                Age::Known(age) => snapshot.taken_at.before(age),
                // Its stamp is lost: it was opened after the snapshot before this one.
                Age::AtLeast(_) if is_new(flow.cookie) && !self.flows.contains(flow.cookie) => {
                    snapshot.taken_at
                }
                Age::AtLeast(_) => continue,
            };
            let how = Announced {
                local: flow.local,
                remote: flow.remote,
                at,
            };
            if at > self.started {
                self.opened(flow.cookie, how);
            }
        }
    }

    /// Takes in the result of lookups. True if it shows that no flow is in the way.
    fn looked_up(&mut self, found: Snapshot, now: BootTime) -> bool {
        self.requests.looked_up(now);
        let cookies = lookups::cookies(&found);
        let closing = self.flows.closing(&cookies);
        let last = self.stats.last_snapshot();
        let snapshot = last
            .filter(|_| self.requests.base.is_some())
            .and_then(|last| lookups::complete(found, &cookies, last, &self.flows));
        let Some(snapshot) = snapshot else {
            self.requests.unclear(DumpReason::Disagreement, now);
            return false;
        };
        let agrees = self.take_in(snapshot, now);
        self.flows.confirm_later(closing);
        agrees
    }

    fn dump_failed(&mut self, why: String, now: BootTime) {
        self.requests.dumped(now, None);
        // The question that this dump was for is still open.
        self.requests.want(DumpReason::Retry);
        // Flows that were seen, or announced, do not end because dumps fail: only the deadline ends their drain.
        if self.requests.given_up() && !self.flows.blocked() {
            self.lose_sight(why);
        }
    }

    fn fit_ports(&mut self, used: &PortsInUse) {
        if std::mem::replace(&mut self.ports_known, true) {
            return;
        }
        let warnings = self.policy.fit_ports(used);
        if !warnings.is_empty() {
            self.subject.warnings.extend(warnings);
            self.revision += 1;
        }
    }

    /// Nothing is in the way. If the pod may have connections that no snapshot shows, that is not "drained".
    fn release_drained(&mut self, now: BootTime) -> Option<Action> {
        match self.hidden.clone() {
            Some(why) => {
                self.lose_sight(why);
                self.decide(None, now)
            }
            None => self.end(ReleaseReason::Drained, now),
        }
    }

    fn lose_sight(&mut self, why: String) {
        if self.untracked.is_none() {
            self.untracked = Some(why);
            self.revision += 1;
        }
    }

    fn decide(&mut self, agrees: Option<ReleasedBy>, now: BootTime) -> Option<Action> {
        if now >= self.deadline.at {
            return self.end(ReleaseReason::Deadline, now);
        }
        if self.untracked.is_some() {
            return match now >= self.settle.limit() {
                true => self.end(ReleaseReason::Untracked, now),
                false => None,
            };
        }
        if self.phase == Phase::Settle && now >= self.settle.end() {
            self.settle.finish();
            self.settled = Some(now);
            if self.policy.until == Until::Settled {
                return self.release_drained(now);
            }
            // The first snapshot of the drain phase adds its counts.
            self.phase = Phase::Drain;
            self.revision += 1;
            self.emptied_by = None;
            self.requests.want(DumpReason::SettleOver);
        }
        if let Some(notification) = self.notifying.next(&self.policy, self.phase) {
            self.revision += 1;
            return Some(Action::Notify(notification));
        }
        if self.phase == Phase::Drain && agrees.is_some() && !self.notifying.is_under_way() {
            self.released_by = agrees.filter(|_| self.hidden.is_none());
            return self.release_drained(now);
        }
        self.next_request()
            .filter(|due| due.at <= now)
            .map(|due| self.request(due.dump, now))
    }

    fn request(&mut self, dump: Option<DumpReason>, now: BootTime) -> Action {
        self.requests.outstanding = true;
        self.requests.wanted = None;
        if dump.is_none()
            && let Some(flows) = self.flows.to_look_up(MAX_LOOKUPS)
        {
            return Action::LookUp(flows);
        }
        let why = dump.unwrap_or(DumpReason::ManyFlows);
        *self.requests.reasons.entry(why).or_default() += 1;
        self.requests.final_asked |= now >= self.final_dump();
        Action::Dump
    }

    fn release(&mut self, reason: ReleaseReason, now: BootTime) -> Action {
        self.released = Some((reason, now));
        self.phase = Phase::Released;
        self.stats.drain_ended(&self.flows, now.since(self.started));
        self.revision += 1;
        Action::Release(reason)
    }

    /// The next dump or lookup; `None` if none is of use.
    fn next_request(&self) -> Option<Due> {
        // No snapshot ends the drain while a notification is under way.
        let is_paused = self.phase == Phase::Drain && self.notifying.is_under_way();
        if self.untracked.is_some() || is_paused {
            return None;
        }
        let schedule = Schedule {
            phase: self.phase,
            started: self.started,
            final_dump: self.final_dump(),
            requests: &self.requests,
            flows: &self.flows,
            closing: self.idleness.closes().then_some(&self.closing),
        };
        schedule.next()
    }

    /// The idle flows to close now, one round at a time. Not before the settle phase is over: until then their clients
    /// may still reach this pod, and would reconnect to it.
    fn idle_to_close(&mut self, now: BootTime) -> Option<Action> {
        if self.phase != Phase::Drain || !self.idleness.closes() {
            return None;
        }
        let idle = self.closing.round(self.stats.last_snapshot()?, now);
        (!idle.is_empty()).then_some(Action::CloseIdle(idle))
    }

    fn final_dump(&self) -> BootTime {
        let before = self
            .deadline
            .at
            .since(self.started)
            .saturating_sub(FINAL_DUMP);
        self.started + before
    }
}
