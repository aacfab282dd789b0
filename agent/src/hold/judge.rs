//! Who is terminating? The waiting around [`crate::pods::terminating`], which decides.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::{sync::Notify, time::sleep};

use crate::{
    clock::BootTime,
    ids::{ContainerId, SandboxId},
    pods::{
        Pod,
        terminating::{Evidence, StopWatch, Verdict},
    },
};

/// Decides who is terminating; see [`crate::pods::terminating`].
pub struct Judge {
    stops: Mutex<StopWatch>,
    another: Notify,
}

impl Judge {
    /// `hold_unknown`: hold also where nobody can tell.
    pub fn new(hold_unknown: bool) -> Self {
        Self {
            stops: Mutex::new(StopWatch::new(hold_unknown)),
            another: Notify::new(),
        }
    }

    /// Whether stopping `container` is part of its pod's end. Waits a moment if that is what it takes.
    pub(super) async fn is_end(
        &self,
        pod: &Pod,
        container: &ContainerId,
        evidence: Evidence,
    ) -> Result<&'static str, &'static str> {
        let mut verdict = self
            .stops()
            .stop_requested(pod, container, evidence, BootTime::now());
        self.another.notify_waiters();
        loop {
            let wait = match verdict {
                Verdict::Yes(why) => return Ok(why.name()),
                Verdict::No(why) => return Err(why.name()),
                Verdict::WaitUntil(moment) => moment.since(BootTime::now()),
            };
            // Registered before asking again, so that no stop in between is missed.
            let another = self.another.notified();
            verdict = self
                .stops()
                .ask_again(pod, container, evidence, BootTime::now());
            if matches!(verdict, Verdict::WaitUntil(_)) {
                tokio::select! {
                    () = another => {}
                    () = sleep(wait) => {}
                }
                verdict = self
                    .stops()
                    .ask_again(pod, container, evidence, BootTime::now());
            }
        }
    }

    pub(super) fn sandbox_stops(&self, sandbox: &SandboxId) {
        self.stops()
            .sandbox_stop_requested(sandbox, BootTime::now());
        self.another.notify_waiters();
    }

    fn stops(&self) -> MutexGuard<'_, StopWatch> {
        // What it remembers is right after every call, also one that panicked.
        self.stops.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
