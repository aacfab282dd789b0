//! The one task that owns all drains of the node.
//!
//! ```text
//!  holds: CRI, HTTP, CLI        kernel: events
//!        │ Command                   │ KernelEvent
//!        ▼                           ▼
//!  ┌───────────────── Drains ──────────────────┐   dump    ┌────────┐
//!  │ Machine (pod A) · Machine (pod B) · …     │ ────────► │ Kernel │ (a task each)
//!  └───────────────────────────────────────────┘ ◄──────── └────────┘
//!        │ HoldState      │ DrainsView     │ DrainNotice
//!        ▼                ▼                ▼
//!     the holds       CLI, metrics     log line, Event
//! ```
//!
//! It sleeps until something arrives or a machine wants to be woken; with no drain under way it does
//! nothing at all.

mod active;
mod events;
mod finished;
mod handle;
mod kernel;
mod lookups;
#[cfg(test)]
mod tests;
mod views;

use std::{sync::Arc, time::Duration};

use ebb_core::{
    clock::BootTime,
    drain_report::{DeadlineCause, DrainNotice, ReleaseReason, Report},
    ids::{PodUid, WatchId},
    machine::{Action, Deadline, Event, FlowEndpoints, Machine, Subject},
    notification::NotificationOutcome,
    pod_end::PodEnd,
    policy::{CallLimits, HoldLimit, PortsInUse},
    scope::Scope,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::{
    active::{Active, ActiveDrains, DrainId},
    finished::{Finished, FinishedDrains},
    handle::{Command, HoldState, Joined, Place},
    kernel::{Dumped, dump},
    lookups::Lookups,
};
pub use self::{
    handle::{DrainHandle, DrainsView, Hold, HoldOrder},
    kernel::{DumpError, Kernel},
};
use super::{
    history::History,
    journal::{Beginning, Journal},
    notify::{Notifier, notify},
};
use crate::{kernel::KernelEvent, pods::kube::Deletion};

/// Views that differ only in counts of flows are published no more often than this.
const VIEW_PACE: Duration = Duration::from_millis(100);
/// What an action of a machine led to.
struct Answer {
    drain: DrainId,
    outcome: Outcome,
}

enum Outcome {
    Event(Event),
    Notified(NotificationOutcome),
    Dumped(Result<Dumped, String>),
    Lookups(Lookups),
    /// Not all events that lookups waited for, so many in all, arrived in time.
    Overdue(u64),
}

/// All drains of the node.
pub struct Drains<K> {
    kernel: Arc<K>,
    events: mpsc::Receiver<KernelEvent>,
    /// Why no events can come any more.
    blind: Option<String>,
    commands: mpsc::UnboundedReceiver<Command>,
    /// Weak, so that the driver ends with the last handle and hold.
    own_commands: mpsc::WeakUnboundedSender<Command>,
    answers: mpsc::UnboundedReceiver<Answer>,
    answers_in: mpsc::UnboundedSender<Answer>,
    notices: mpsc::UnboundedSender<DrainNotice>,
    /// Tells applications; without one, they can't be told.
    notifier: Option<Arc<dyn Notifier>>,
    view: watch::Sender<Arc<DrainsView>>,
    history: History,
    active: ActiveDrains,
    finished: FinishedDrains,
    /// Lookups to make after all events that have arrived are taken in.
    to_look_up: Vec<(DrainId, Vec<FlowEndpoints>)>,
    changed: Changed,
    published: Instant,
}

/// What of the view has changed since it was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Changed {
    Nothing,
    Flows,
    Drains,
}

impl<K: Kernel> Drains<K> {
    /// Starts the driver on the current tokio runtime. Without a journal, beginnings are remembered only
    /// as long as the agent runs. Notices without a receiver are dropped.
    pub fn spawn(
        kernel: Arc<K>,
        events: mpsc::Receiver<KernelEvent>,
        journal: Option<Journal>,
        notices: mpsc::UnboundedSender<DrainNotice>,
    ) -> DrainHandle {
        Self::spawn_with(kernel, events, journal, notices, None)
    }

    /// Like [`Drains::spawn`], with what tells applications of their drains.
    pub fn spawn_with(
        kernel: Arc<K>,
        events: mpsc::Receiver<KernelEvent>,
        journal: Option<Journal>,
        notices: mpsc::UnboundedSender<DrainNotice>,
        notifier: Option<Arc<dyn Notifier>>,
    ) -> DrainHandle {
        let (commands_in, commands) = mpsc::unbounded_channel();
        let (answers_in, answers) = mpsc::unbounded_channel();
        let (view, view_out) = watch::channel(Arc::default());
        let driver = Self {
            kernel,
            events,
            blind: None,
            commands,
            own_commands: commands_in.downgrade(),
            answers,
            answers_in,
            notices,
            notifier,
            view,
            history: History::new(journal),
            active: ActiveDrains::default(),
            finished: FinishedDrains::default(),
            to_look_up: vec![],
            changed: Changed::Nothing,
            published: Instant::now(),
        };
        tokio::spawn(driver.run());
        DrainHandle {
            commands: commands_in,
            view: view_out,
            stopping: CancellationToken::new(),
        }
    }

    async fn run(mut self) {
        loop {
            let wake = self.next_wake();
            tokio::select! {
                event = self.events.recv(), if self.blind.is_none() => self.kernel_event(event),
                command = self.commands.recv() => match command {
                    Some(Command::Hold(order, answer)) => {
                        let _ = answer.send(self.hold(*order));
                    }
                    Some(Command::GiveUp(drain)) => self.give_up(drain),
                    Some(Command::Limit(uid, limit)) => {
                        if let Some(drain) = self.active.of_pod(&uid) {
                            self.limit(drain, limit);
                        }
                    }
                    Some(Command::Deletion(uid, deletion)) => self.deletion(&uid, deletion),
                    Some(Command::NotTerminating(uid)) => self.not_terminating(&uid),
                    Some(Command::Exited(uid, exits)) => {
                        if let Some(drain) = self.active.of_pod(&uid) {
                            self.step(drain, Event::Exited(exits));
                        }
                    }
                    Some(Command::Restore(earlier)) => {
                        self.finished.restore(earlier);
                        self.changed = Changed::Drains;
                    }
                    Some(Command::Listed(pods)) => {
                        self.history.retain_pods(|uid| pods.contains(uid), BootTime::now());
                    }
                    Some(Command::Release(uid, answer)) => {
                        let drain = self.active.of_pod(&uid);
                        if let Some(drain) = drain {
                            self.step(drain, Event::Release(ReleaseReason::Manual));
                        }
                        let over = drain.and_then(|_| self.finished.last_of(&uid));
                        let _ = answer.send(over.map(|over| over.report.clone()));
                    }
                    Some(Command::Shutdown) | None => break,
                },
                Some(Answer { drain, outcome }) = self.answers.recv() => {
                    // What an answer proves depends on the events that came before it: take those in first.
                    self.take_in_events();
                    match outcome {
                        Outcome::Event(event) => self.step(drain, event),
                        Outcome::Notified(outcome) => {
                            self.step(drain, Event::Notified(outcome));
                            self.remember(drain);
                        }
                        Outcome::Dumped(dumped) => self.dumped(drain, dumped),
                        Outcome::Lookups(lookups) => self.looked_up(drain, lookups),
                        Outcome::Overdue(owed) => self.overdue(drain, owed),
                    }
                }
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                    self.step_all(&Event::Tick);
                }
            }
            self.take_in_events();
            self.look_up();
            self.publish_if_due();
        }
        self.step_all(&Event::Release(ReleaseReason::Shutdown));
        self.publish();
    }

    fn next_wake(&self) -> Option<Instant> {
        let drains = self.active.iter().filter_map(|a| a.machine.next_wake());
        let drains = drains.min();
        let drains = drains.map(|wake| Instant::now() + wake.since(BootTime::now()));
        let view = (self.changed != Changed::Nothing).then(|| self.published + VIEW_PACE);
        drains.into_iter().chain(view).min()
    }

    fn hold(&mut self, order: HoldOrder) -> Joined {
        let uid = &order.pod.name.uid;
        let now = BootTime::now();
        let end = order.end();
        if let Some(id) = self.active.of_pod(uid) {
            let active = self.active.get_mut(id);
            if let Some(active) = active.filter(|a| a.beginning().includes(&end, now)) {
                active.end.add(end);
                active.add_grace(&order);
                active.machine.join_trace(order.traceparent.clone());
                active.holds += 1;
                self.changed = Changed::Drains;
                let state = active.state.subscribe();
                if let Some(limit) = joining_limit(&order) {
                    self.step(id, Event::Limit(Deadline::of(now, limit)));
                }
                self.is_stopping(id);
                self.remember(id);
                return Joined {
                    place: self.place(id),
                    state,
                };
            }
            // It was for the restart of a container, and the pod's end has a deadline of its own.
            self.step(id, Event::Release(ReleaseReason::NotTerminating));
        }
        let answer = self.finished.last_of(uid).filter(|over| over.answers(now));
        let first = self.history.recall(uid, &end, now).cloned();
        if let (Some(over), Some(_)) = (answer, &first) {
            let state = HoldState {
                deadline: over.deadline,
                has_read: true,
                report: Some(over.report.clone()),
            };
            return Joined {
                place: self.place(over.id),
                state: watch::channel(state).1,
            };
        }
        self.begin(&order, end, first, now)
    }

    /// Begins a drain, or continues the one that began with `first`.
    fn begin(
        &mut self,
        order: &HoldOrder,
        end: PodEnd,
        first: Option<Beginning>,
        now: BootTime,
    ) -> Joined {
        let HoldOrder {
            pod,
            policy,
            warnings,
            ..
        } = order;
        let (started, deadline) = match &first {
            Some(first) => {
                let limit = joining_limit(order).map(|limit| Deadline::of(now, limit));
                let deadline = limit.map_or(first.deadline, |limit| first.deadline.min(limit));
                (first.started.min(now), deadline)
            }
            None => (now, Deadline::of(now, policy.deadline(order.limits()))),
        };
        let subject = Subject {
            pod: pod.name.clone(),
            workload: pod.workload.clone(),
            started_at: wall_clock(started),
            warnings: warnings.clone(),
            traceparent: order.traceparent.clone(),
        };
        let mut machine = Machine::new(subject, policy.clone(), started, deadline, now);
        if let Some(first) = &first {
            machine.set_notified(first.notified.clone());
        }
        let (state, joined) = watch::channel(HoldState {
            deadline: deadline.at,
            has_read: false,
            report: None,
        });
        // Watch, then dump: what happens in between is seen twice rather than never.
        let watched = self.watch(&pod.scope);
        let began = machine.report(now);
        // What is only observed is reported once it is over: it may turn out to be the restart of a container.
        if !began.observed {
            let began = Arc::new(Report { holds: 1, ..began });
            let _ = self.notices.send(DrainNotice::Began(began));
        }
        let active = Active {
            pod: pod.clone(),
            machine,
            is_not_deleted: order.is_not_deleted,
            deletion_grace: order.deletion.and_then(|deletion| deletion.grace),
            first_released: first.as_ref().and_then(|first| first.released),
            end: match first {
                Some(first) => {
                    let mut all = first.end;
                    all.add(end);
                    all
                }
                None => end,
            },
            holds: 1,
            watch: watched.as_ref().ok().copied(),
            received: 0,
            owed: None,
            missed_changes: None,
            reported_blocked: false,
            over: CancellationToken::new(),
            state,
        };
        let id = self.active.insert(active);
        self.finished.remove_first_part(&order.pod.name.uid);
        self.changed = Changed::Drains;
        self.remember(id);
        if watched.is_ok() {
            let (kernel, scope) = (self.kernel.clone(), pod.scope.clone());
            self.answer_with(id, async move {
                let arrivals = kernel.arrivals(&scope).await;
                arrivals.map_or(Event::Tick, Event::Arrivals)
            });
        }
        self.step(id, watched.map_or_else(Event::Untracked, |_| Event::Tick));
        self.is_stopping(id);
        Joined {
            place: self.place(id),
            state: joined,
        }
    }

    fn place(&self, drain: DrainId) -> Place {
        Place {
            drain,
            commands: self.own_commands.upgrade(),
        }
    }

    fn watch(&self, scope: &Scope) -> Result<WatchId, String> {
        if let Scope::Untracked(why) = scope {
            return Err(why.clone());
        }
        if let Some(why) = &self.blind {
            return Err(why.clone());
        }
        self.kernel
            .watch(scope)
            .map_err(|e| format!("its connections can't be watched: {e}"))
    }

    fn remember(&mut self, id: DrainId) {
        if let Some(active) = self.active.get(id) {
            let beginning = active.beginning();
            self.history.remember(&active.pod.name.uid, beginning);
        }
    }

    /// Brings a drain's end forward.
    fn limit(&mut self, id: DrainId, limit: Deadline) {
        self.step(id, Event::Limit(limit));
        self.remember(id);
    }

    /// The API server has reported a deletion. One with a shorter grace period than the drain knows brings its end forward.
    fn deletion(&mut self, uid: &PodUid, deletion: Deletion) {
        let now = BootTime::now();
        let Some(id) = self.active.of_pod(uid) else {
            return;
        };
        let Some(active) = self.active.get_mut(id) else {
            return;
        };
        let deleted = PodEnd {
            deleted: Some(deletion.seen),
            ..active.end.clone()
        };
        // A drain for the restart of a container ends when the first hold of the deletion comes.
        if !active.beginning().includes(&deleted, now) {
            return;
        }
        active.end = deleted;
        self.is_stopping(id);
        let (Some(grace), Some(active)) = (deletion.grace, self.active.get_mut(id)) else {
            return;
        };
        let is_shorter = active.deletion_grace.is_none_or(|known| grace < known);
        active.deletion_grace = Some(grace);
        if let Some(left) = deletion.left(now).filter(|_| is_shorter) {
            let limits = CallLimits {
                grace: Some(left),
                rpc_timeout: None,
            };
            let limit = HoldLimit {
                cause: DeadlineCause::ShorterGrace,
                ..active.machine.policy().deadline(limits)
            };
            self.step(id, Event::Limit(Deadline::of(now, limit)));
        }
        self.remember(id);
    }

    /// A preStop wait ran for the restart of a container, or by hand.
    fn not_terminating(&mut self, uid: &PodUid) {
        if let Some(id) = self.active.of_pod(uid)
            && self.active.get(id).is_some_and(|a| !a.end.is_final())
        {
            self.step(id, Event::Release(ReleaseReason::NotTerminating));
        }
    }

    fn give_up(&mut self, id: DrainId) {
        let Some(active) = self.active.get_mut(id) else {
            return;
        };
        active.holds = active.holds.saturating_sub(1);
        self.changed = Changed::Drains;
        if active.holds == 0 && active.is_not_deleted && !active.end.is_final() {
            self.step(id, Event::Release(ReleaseReason::NotTerminating));
        }
        self.is_stopping(id);
    }

    /// Lets the machine tell the application for as long as the pod's end is certain and held.
    fn is_stopping(&mut self, id: DrainId) {
        if let Some(active) = self.active.get(id)
            && active.machine.policy().notifies()
        {
            let is_stopping = active.end.is_final() && active.holds > 0;
            self.step(id, Event::Stopping(is_stopping));
        }
    }

    fn step_all(&mut self, event: &Event) {
        for id in self.active.ids() {
            self.step(id, event.clone());
        }
    }

    fn step(&mut self, id: DrainId, event: Event) {
        let now = BootTime::now();
        let Some(active) = self.active.get_mut(id) else {
            return;
        };
        let before = active.machine.revision();
        let has_answer = matches!(
            event,
            Event::Dumped(_) | Event::DumpFailed(_) | Event::Untracked(_)
        );
        let was_settling = !active.machine.is_in_drain_phase();
        let action = active.machine.step(event, now);
        if was_settling && active.machine.is_in_drain_phase() && !active.is_observed() {
            let report = Arc::new(active.machine.report(now));
            let _ = self.notices.send(DrainNotice::Settled(report));
        }
        if active.machine.revision() != before {
            self.changed = self.changed.max(Changed::Flows);
        }
        if active.machine.still_arriving() && !active.reported_blocked && !active.is_observed() {
            active.reported_blocked = true;
            let report = Arc::new(Report {
                late_peers: active.machine.still_connecting(),
                ..active.machine.report(now)
            });
            let _ = self.notices.send(DrainNotice::Blocked(report));
        }
        let deadline = active.machine.deadline().at;
        active
            .state
            .send_if_modified(|s| std::mem::replace(&mut s.deadline, deadline) != deadline);
        let first = |s: &mut HoldState| !std::mem::replace(&mut s.has_read, true);
        if has_answer && active.state.send_if_modified(first) {
            self.changed = Changed::Drains;
        }
        if let Some(action) = action {
            self.carry_out(id, action, now);
        }
    }

    fn carry_out(&mut self, id: DrainId, action: Action, now: BootTime) {
        let Some(active) = self.active.get(id) else {
            return;
        };
        match action {
            Action::Dump => {
                let machine = &active.machine;
                let dump = dump(
                    self.kernel.clone(),
                    &active.pod,
                    machine.policy(),
                    machine.wants_ports(),
                );
                let answers = self.answers_in.clone();
                tokio::spawn(async move {
                    let outcome = Outcome::Dumped(dump.await);
                    let _ = answers.send(Answer { drain: id, outcome });
                });
            }
            Action::LookUp(flows) => self.to_look_up.push((id, flows)),
            // No hold is left, so nothing shows that the pod still terminates.
            Action::CloseIdle(_) if active.holds == 0 => {
                self.answer_with(id, std::future::ready(Event::IdleClosed(vec![])));
            }
            Action::CloseIdle(idle) => {
                let (kernel, pod) = (self.kernel.clone(), active.pod.clone());
                let over = active.over.clone();
                self.answer_with(id, async move {
                    let closed = kernel.close_idle(&pod.scope, idle, over).await;
                    Event::IdleClosed(closed.unwrap_or_else(|e| {
                        warn!(pod = %pod.name, "can't close idle flows: {e}");
                        vec![]
                    }))
                });
            }
            Action::Notify(notification) => {
                let told = notify(self.notifier.clone(), active.pod.clone(), notification);
                let answers = self.answers_in.clone();
                // Before it is sent: no later agent sends it again.
                self.remember(id);
                tokio::spawn(async move {
                    let outcome = Outcome::Notified(told.await);
                    let _ = answers.send(Answer { drain: id, outcome });
                });
            }
            Action::Release(_) => self.finish(id, now),
        }
    }

    /// A dump came back.
    fn dumped(&mut self, drain: DrainId, dumped: Result<Dumped, String>) {
        if let (Some(active), Ok(dumped)) = (self.active.get_mut(drain), &dumped) {
            active.missed_changes = Some(dumped.missed_changes);
        }
        let event = match dumped {
            Ok(dumped) => {
                if let Some(used) = dumped.ports {
                    self.ports_in_use(drain, used);
                }
                if let Some(why) = dumped.forwards {
                    self.step(drain, Event::Hidden(why));
                }
                Event::Dumped(dumped.flows)
            }
            Err(why) => Event::DumpFailed(why),
        };
        self.step(drain, event);
    }

    /// The first dump has shown the ports that the pod uses: reports what is wrong with the policy's.
    fn ports_in_use(&mut self, drain: DrainId, used: PortsInUse) {
        let warnings = |drains: &ActiveDrains| {
            let active = drains.get(drain)?;
            let warnings = active.machine.warnings().to_vec();
            Some((active.pod.name.clone(), warnings))
        };
        let before = warnings(&self.active).map_or(0, |(_, warnings)| warnings.len());
        self.step(drain, Event::PortsInUse(used));
        let Some((pod, warnings)) = warnings(&self.active) else {
            return;
        };
        for warning in warnings.into_iter().skip(before) {
            let _ = self.notices.send(DrainNotice::Warned(pod.clone(), warning));
        }
    }

    /// Carries out an action in a task of its own, whose outcome comes back to the drain's machine.
    fn answer_with(&self, drain: DrainId, event: impl Future<Output = Event> + Send + 'static) {
        let answers = self.answers_in.clone();
        tokio::spawn(async move {
            let outcome = Outcome::Event(event.await);
            let _ = answers.send(Answer { drain, outcome });
        });
    }

    fn finish(&mut self, id: DrainId, now: BootTime) {
        let Some(active) = self.active.remove(id) else {
            return;
        };
        // Repeated holds do not prolong a termination: the first release counts.
        let beginning = Beginning {
            released: active.first_released.or(Some(now)),
            ..active.beginning()
        };
        self.history.remember(&active.pod.name.uid, beginning);
        let holds = active.held_calls();
        let Active {
            pod,
            machine,
            watch,
            over,
            state,
            ..
        } = active;
        over.cancel();
        if watch.is_some() {
            self.kernel.unwatch(&pod.scope);
        }
        let report = Arc::new(Report {
            holds,
            ..machine.report(now)
        });
        state.send_modify(|s| s.report = Some(report.clone()));
        self.changed = Changed::Drains;
        // A container was restarted, which ebb would not have held.
        if report.observed && report.reason == Some(ReleaseReason::NotTerminating) {
            return;
        }
        self.finished.push(Finished {
            id,
            deadline: machine.deadline().at,
            released: now,
            report: report.clone(),
        });
        let _ = self.notices.send(DrainNotice::Finished(report));
    }
}

/// The longest time that this hold, which joins the pod's drain, allows the drain from now on. `None` if the hold does
/// not know the grace period: the drain may know it.
fn joining_limit(order: &HoldOrder) -> Option<HoldLimit> {
    match order.grace {
        Some(_) => Some(order.policy.deadline(order.limits())),
        None => order.limits().longest(Duration::ZERO, false),
    }
}

fn wall_clock(t: BootTime) -> String {
    humantime::format_rfc3339_millis(t.to_system_time()).to_string()
}
