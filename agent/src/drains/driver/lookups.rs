//! Lookups, and the events that they wait for.
//!
//! The driver uses the result of lookups on two conditions. When it requested them, it had received every event that the
//! kernel had sent, so that none was outstanding or lost. And the kernel has left out no state change since the last dump
//! began. If events are outstanding, the driver waits for them and repeats the lookups.

use std::time::Duration;

use ebb_core::{drain_report::DumpReason, machine::Event};

use super::{
    Drains, Kernel,
    actions::Outcome,
    active::DrainId,
    kernel::{LookedUp, look_up},
};

/// Events arrive within some ten microseconds. If an event is later than this, it is lost, or the agent gets no CPU
/// time; in both cases the driver makes a dump.
const OVERDUE: Duration = Duration::from_millis(2);

/// The kernel's answer.
pub(super) struct Lookups {
    /// How many events had been received before the request.
    received: u64,
    found: Result<LookedUp, DumpReason>,
}

impl<K: Kernel> Drains<K> {
    /// Makes the lookups that machines have requested.
    pub(super) fn look_up(&mut self) {
        for (drain, flows) in std::mem::take(&mut self.to_look_up) {
            let Some(active) = self.active.get(drain) else {
                continue;
            };
            let received = active.received;
            let found = look_up(
                self.kernel.clone(),
                &active.pod,
                active.machine.policy(),
                flows,
            );
            self.answer_with(drain, async move {
                let found = found.await;
                Outcome::Lookups(Lookups { received, found })
            });
        }
    }

    /// Lookups came back.
    pub(super) fn looked_up(&mut self, drain: DrainId, lookups: Lookups) {
        let Some(active) = self.active.get_mut(drain) else {
            return;
        };
        match lookups.found {
            Err(why) => self.step(drain, Event::Unclear(why)),
            Ok(found) if active.missed_changes != Some(found.missed_changes) => {
                self.step(drain, Event::Unclear(DumpReason::ChangesMissed));
            }
            Ok(found) if found.sent == lookups.received => {
                self.step(drain, Event::LookedUp(found.flows));
            }
            Ok(found) if found.sent <= active.received => {
                self.step(drain, Event::Outdated);
            }
            Ok(found) => {
                active.awaited_events = Some(found.sent);
                self.answer_with(drain, async move {
                    tokio::time::sleep(OVERDUE).await;
                    Outcome::Overdue(found.sent)
                });
            }
        }
    }

    /// An event has come: if it was the last that lookups waited for, the driver makes them again.
    pub(super) fn events_arrived(&mut self, drain: DrainId) {
        if let Some(active) = self.active.get_mut(drain)
            && active
                .awaited_events
                .is_some_and(|awaited| active.received >= awaited)
        {
            active.awaited_events = None;
            self.step(drain, Event::Outdated);
        }
    }

    /// The events that lookups waited for did not arrive in time.
    pub(super) fn overdue(&mut self, drain: DrainId, awaited: u64) {
        if let Some(active) = self.active.get_mut(drain)
            && active.awaited_events == Some(awaited)
        {
            active.awaited_events = None;
            self.step(drain, Event::Unclear(DumpReason::EventsLate));
        }
    }
}
