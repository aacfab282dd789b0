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
//! It sleeps until something arrives or until the next wake of a machine. Without a drain, it only sleeps.

mod actions;
mod active;
mod events;
mod finished;
mod handle;
mod holds;
mod kernel;
mod lookups;
mod pod_end;
#[cfg(test)]
mod tests;
mod views;

use std::{sync::Arc, time::Duration};

use ebb_core::{
    clock::BootTime,
    drain_report::{DrainNotice, ReleaseReason, Report},
    machine::{Event, FlowEndpoints},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use self::{
    actions::{Answer, Outcome},
    active::{Active, ActiveDrains, DrainId},
    finished::{Finished, FinishedDrains},
    handle::{Command, HoldState},
};
pub use self::{
    handle::{DrainHandle, DrainsView, Hold, HoldOrder},
    kernel::{Kernel, KernelRequestError},
};
use super::{
    history::History,
    journal::{Beginning, Journal},
    notify::Notifier,
};
use crate::{kernel::KernelEvent, pods::peer_names::PeerNames};

/// Views that differ only in counts of flows are published no more often than this.
const VIEW_PACE: Duration = Duration::from_millis(100);

/// All drains of the node.
pub struct Drains<K> {
    kernel: Arc<K>,
    events: mpsc::Receiver<KernelEvent>,
    /// Why no more events arrive.
    blind: Option<String>,
    commands: mpsc::UnboundedReceiver<Command>,
    /// Weak, so that the driver ends with the last handle and hold.
    own_commands: mpsc::WeakUnboundedSender<Command>,
    answers: mpsc::UnboundedReceiver<Answer>,
    answers_in: mpsc::UnboundedSender<Answer>,
    notices: mpsc::UnboundedSender<DrainNotice>,
    /// Sends notifications to applications; without one, they fail.
    notifier: Option<Arc<dyn Notifier>>,
    view: watch::Sender<Arc<DrainsView>>,
    history: History,
    active: ActiveDrains,
    finished: FinishedDrains,
    /// Of the pods that the runtime listed last.
    peer_names: PeerNames,
    /// Lookups to make after all events that have arrived are taken in.
    to_look_up: Vec<(DrainId, Vec<FlowEndpoints>)>,
    changed: Changed,
    published: Instant,
}

/// Which part of the view has changed since it was published.
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

    /// Like [`Drains::spawn`], with the sender of notifications to applications.
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
            peer_names: PeerNames::default(),
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
                    Some(Command::Listed(pods, peer_names)) => {
                        self.history.retain_pods(|uid| pods.contains(uid), BootTime::now());
                        self.peer_names = peer_names;
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
                    // Take in earlier events first: an answer counts only after them.
                    self.take_in_events();
                    match outcome {
                        Outcome::Event(event) => self.step(drain, event),
                        Outcome::Notified(outcome) => {
                            self.step(drain, Event::Notified(outcome));
                            self.remember(drain);
                        }
                        Outcome::Dumped(dumped) => self.dumped(drain, dumped),
                        Outcome::Lookups(lookups) => self.looked_up(drain, lookups),
                        Outcome::Overdue(awaited) => self.overdue(drain, awaited),
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
        let event = match active.is_abandoned() && now >= active.machine.deadline().at {
            true => Event::Release(ReleaseReason::NotTerminating),
            false => event,
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
        let mut blocked = None;
        if active.machine.still_arriving() && !active.reported_blocked && !active.is_observed() {
            active.reported_blocked = true;
            blocked = Some(Report {
                late_peers: active.machine.still_connecting(),
                ..active.machine.report(now)
            });
        }
        let deadline = active.machine.deadline().at;
        active
            .state
            .send_if_modified(|s| std::mem::replace(&mut s.deadline, deadline) != deadline);
        let first = |s: &mut HoldState| !std::mem::replace(&mut s.has_read, true);
        if has_answer && active.state.send_if_modified(first) {
            self.changed = Changed::Drains;
        }
        if let Some(report) = blocked {
            let report = Arc::new(self.with_names(report));
            let _ = self.notices.send(DrainNotice::Blocked(report));
        }
        if let Some(action) = action {
            self.carry_out(id, action, now);
        }
    }

    fn remember(&mut self, id: DrainId) {
        if let Some(active) = self.active.get(id) {
            let beginning = active.beginning();
            self.history.remember(&active.pod.name.uid, beginning);
        }
    }

    fn finish(&mut self, id: DrainId, now: BootTime) {
        let Some(active) = self.active.remove(id) else {
            return;
        };
        // Repeated holds do not prolong a termination: the first release counts.
        let mut beginning = Beginning {
            released: active.first_released.or(Some(now)),
            ..active.beginning()
        };
        // A release by hand is for the whole termination.
        if active.machine.released() == Some(ReleaseReason::Manual) {
            beginning.deadline.at = beginning.deadline.at.min(now);
        }
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
        let report = Arc::new(self.with_names(Report {
            holds,
            ..machine.report(now)
        }));
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
