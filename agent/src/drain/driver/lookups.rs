//! Lookups, and the edges that they have to wait for.
//!
//! Lookups are worth something if the kernel had counted as many edges when it was asked as had been received:
//! then none was outstanding or lost. A close is seldom the last edge (FIN_WAIT2, then CLOSE), so that others
//! are often under way at that moment. Those are waited for, and then the kernel is asked again.

use std::time::Duration;

use super::{Answer, DrainId, Drains, Kernel, Outcome, kernel::look_up};
use crate::{drain::machine::Event, flow::Snapshot};

/// Edges arrive within some ten microseconds. What is missing for longer than this is lost, or the agent gets
/// no time; in both cases a walk is made.
const OVERDUE: Duration = Duration::from_millis(2);

/// What the kernel answered.
pub(super) struct Lookups {
    /// How many edges had been received before it was asked.
    received: u64,
    /// How many it had counted, and the flows that are still there. `None`: they can't tell.
    found: Option<(u64, Snapshot)>,
}

impl<K: Kernel> Drains<K> {
    /// Makes the lookups that machines want.
    pub(super) fn look_up(&mut self) {
        for (drain, flows) in std::mem::take(&mut self.to_look_up) {
            let Some(active) = self.active.get(&drain) else {
                continue;
            };
            let received = active.received;
            let answers = self.answers_in.clone();
            let found = look_up(
                self.kernel.clone(),
                &active.pod,
                active.machine.policy(),
                flows,
            );
            tokio::spawn(async move {
                let found = found.await;
                let outcome = Outcome::Lookups(Lookups { received, found });
                let _ = answers.send(Answer { drain, outcome });
            });
        }
    }

    /// Lookups came back.
    pub(super) fn looked_up(&mut self, drain: DrainId, lookups: Lookups) {
        let Some(active) = self.active.get_mut(&drain) else {
            return;
        };
        match lookups.found {
            None => self.step(drain, Event::Unclear),
            Some((counted, found)) if counted == lookups.received => {
                self.step(drain, Event::LookedUp(found));
            }
            Some((counted, _)) if counted <= active.received => {
                self.step(drain, Event::Outdated);
            }
            Some((counted, _)) => {
                active.owed = Some(counted);
                let answers = self.answers_in.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(OVERDUE).await;
                    let outcome = Outcome::Overdue(counted);
                    let _ = answers.send(Answer { drain, outcome });
                });
            }
        }
    }

    /// An edge has come: if it was the last that lookups waited for, they are made anew.
    pub(super) fn no_longer_owed(&mut self, drain: DrainId) {
        if let Some(active) = self.active.get_mut(&drain)
            && active.owed.is_some_and(|owed| active.received >= owed)
        {
            active.owed = None;
            self.step(drain, Event::Outdated);
        }
    }

    /// The edges that lookups waited for have had their time.
    pub(super) fn overdue(&mut self, drain: DrainId, owed: u64) {
        if let Some(active) = self.active.get_mut(&drain)
            && active.owed == Some(owed)
        {
            active.owed = None;
            self.step(drain, Event::Unclear);
        }
    }
}
