//! Holds that come and go: each begins its pod's drain, or joins it.

use std::{sync::Arc, time::Duration};

use ebb_core::{
    clock::BootTime,
    drain_report::{DrainNotice, ReleaseReason, Report},
    ids::WatchId,
    machine::{Deadline, Event, Machine, Subject},
    pod_end::PodEnd,
    policy::HoldLimit,
    scope::Scope,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Changed, Drains, HoldOrder, Kernel,
    actions::Outcome,
    active::{Active, DrainId},
    handle::{HoldState, Joined, Place},
};
use crate::drains::journal::Beginning;

impl<K: Kernel> Drains<K> {
    pub(super) fn hold(&mut self, order: HoldOrder) -> Joined {
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
                self.update_stopping(id);
                self.remember(id);
                return Joined {
                    place: self.place(id),
                    state,
                };
            }
            // It was for the restart of a container, and the pod's end has a deadline of its own.
            self.step(id, Event::Release(ReleaseReason::NotTerminating));
        }
        let first = self.history.recall(uid, &end, now).cloned();
        // A stop that is repeated after its deadline is the same termination, however much later it comes.
        let answers = |first: &Beginning| {
            let over = self.finished.last_of(uid)?;
            (over.answers(now) || first.deadline.at <= now).then_some(over)
        };
        if let Some(over) = first.as_ref().and_then(answers) {
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
            started_at: started.rfc3339(),
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
            first_grace: order.grace,
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
            awaited_events: None,
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
                Outcome::Event(arrivals.map_or(Event::Tick, Event::Arrivals))
            });
        }
        self.step(id, watched.map_or_else(Event::Untracked, |_| Event::Tick));
        self.update_stopping(id);
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

    pub(super) fn give_up(&mut self, id: DrainId) {
        let Some(active) = self.active.get_mut(id) else {
            return;
        };
        active.holds = active.holds.saturating_sub(1);
        self.changed = Changed::Drains;
        if active.is_abandoned() && active.is_not_deleted {
            self.step(id, Event::Release(ReleaseReason::NotTerminating));
        }
        self.update_stopping(id);
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
