//! Who is terminating? The waiting around [`crate::pods::terminating`], which decides.

use std::{
    pin::pin,
    sync::{Mutex, MutexGuard},
};

use tokio::{sync::Notify, time::sleep};

use crate::{
    clock::BootTime,
    ids::{ContainerId, SandboxId},
    lock::lock,
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

    /// StopContainer arrived; to be told at once.
    pub(super) fn stop_arrives(&self, container: &ContainerId, arrived: BootTime) {
        self.stops().stop_requested(container, arrived);
        self.another.notify_waiters();
    }

    /// Whether stopping `container`, which has arrived, is part of its pod's end. Waits a moment if that is what
    /// it takes, and has the evidence gathered again before it says no: a hook of another container may have begun to
    /// wait.
    pub(super) async fn is_end(
        &self,
        pod: &Pod,
        container: &ContainerId,
        evidence: impl Fn() -> Evidence,
    ) -> Result<&'static str, &'static str> {
        let known = evidence();
        loop {
            // Registered before asking, so that no stop in between is missed.
            let mut another = pin!(self.another.notified());
            another.as_mut().enable();
            let now = BootTime::now();
            let mut verdict = self.stops().ask(pod, container, known, now);
            if matches!(verdict, Verdict::No(_)) {
                verdict = self.stops().ask(pod, container, evidence(), now);
            }
            match verdict {
                Verdict::Yes(why) => return Ok(why.name()),
                Verdict::No(why) => return Err(why.name()),
                Verdict::WaitUntil(moment) => tokio::select! {
                    () = another => {}
                    () = sleep(moment.since(now)) => {}
                },
            }
        }
    }

    /// StopPodSandbox arrived; to be told at once.
    pub(super) fn sandbox_stops(&self, sandbox: &SandboxId, arrived: BootTime) {
        self.stops().sandbox_stop_requested(sandbox, arrived);
        self.another.notify_waiters();
    }

    fn stops(&self) -> MutexGuard<'_, StopWatch> {
        // What it remembers is right after every call, also one that panicked.
        lock(&self.stops)
    }
}
