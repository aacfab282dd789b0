//! Carries out the actions of a drain's machine in tasks of their own, and takes their results.

use ebb_core::{
    clock::BootTime,
    drain_report::DrainNotice,
    machine::{Action, Event},
    notification::NotificationOutcome,
    policy::PortsInUse,
};
use tracing::warn;

use super::{
    Drains, Kernel,
    active::{ActiveDrains, DrainId},
    kernel::{Dumped, dump},
    lookups::Lookups,
};
use crate::drains::notify::notify;

/// The result of an action.
pub(super) struct Answer {
    pub(super) drain: DrainId,
    pub(super) outcome: Outcome,
}

pub(super) enum Outcome {
    Event(Event),
    Notified(NotificationOutcome),
    Dumped(Result<Dumped, String>),
    Lookups(Lookups),
    /// Lookups waited until this many events had arrived, and they did not arrive in time.
    Overdue(u64),
}

impl<K: Kernel> Drains<K> {
    pub(super) fn carry_out(&mut self, id: DrainId, action: Action, now: BootTime) {
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
                self.answer_with(id, async move { Outcome::Dumped(dump.await) });
            }
            Action::LookUp(flows) => self.to_look_up.push((id, flows)),
            // No hold is left, so nothing shows that the pod still terminates.
            Action::CloseIdle(_) if active.holds == 0 => {
                let none = Outcome::Event(Event::IdleClosed(vec![]));
                self.answer_with(id, std::future::ready(none));
            }
            Action::CloseIdle(idle) => {
                let (kernel, pod) = (self.kernel.clone(), active.pod.clone());
                let over = active.over.clone();
                self.answer_with(id, async move {
                    let closed = kernel.close_idle(&pod.scope, idle, over).await;
                    let closed = closed.unwrap_or_else(|e| {
                        warn!(pod = %pod.name, "can't close idle flows: {e}");
                        vec![]
                    });
                    Outcome::Event(Event::IdleClosed(closed))
                });
            }
            Action::Notify(notification) => {
                let told = notify(self.notifier.clone(), active.pod.clone(), notification);
                // Before it is sent: no later agent sends it again.
                self.remember(id);
                self.answer_with(id, async move { Outcome::Notified(told.await) });
            }
            Action::Release(_) => self.finish(id, now),
        }
    }

    /// A dump came back.
    pub(super) fn dumped(&mut self, drain: DrainId, dumped: Result<Dumped, String>) {
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

    /// The first dump has shown the ports that the pod uses: reports errors in the policy's ports.
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

    /// Runs this in a task of its own. The outcome comes back to the driver.
    pub(super) fn answer_with(
        &self,
        drain: DrainId,
        outcome: impl Future<Output = Outcome> + Send + 'static,
    ) {
        let answers = self.answers_in.clone();
        tokio::spawn(async move {
            let outcome = outcome.await;
            let _ = answers.send(Answer { drain, outcome });
        });
    }
}
