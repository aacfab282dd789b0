//! Waits for the verdict of [`ebb_core::termination`]: whether a stop is part of its pod's termination.

use std::{
    pin::pin,
    sync::{Mutex, MutexGuard},
};

use ebb_core::{
    clock::BootTime,
    ids::{ContainerId, SandboxId},
    termination::{TerminationDetector, TerminationEvidence, Verdict},
};
use tokio::{sync::Notify, time::sleep};

use crate::{linux::sync::lock, pods::Pod};

/// A [`TerminationDetector`] that callers share.
pub(crate) struct Terminations {
    detector: Mutex<TerminationDetector>,
    another_stop: Notify,
}

impl Terminations {
    /// `hold_unknown`: hold also without evidence.
    pub(crate) fn new(hold_unknown: bool) -> Self {
        Self {
            detector: Mutex::new(TerminationDetector::new(hold_unknown)),
            another_stop: Notify::new(),
        }
    }

    /// Records that StopContainer arrived. Must be called before [`Self::classify_stop`].
    pub(super) fn record_stop(&self, container: &ContainerId, arrived: BootTime) {
        self.detector()
            .record_stop(container, arrived, BootTime::now());
        self.another_stop.notify_waiters();
    }

    /// Records that StopPodSandbox arrived.
    pub(super) fn record_sandbox_stop(&self, sandbox: &SandboxId, arrived: BootTime) {
        self.detector().record_sandbox_stop(sandbox, arrived);
        self.another_stop.notify_waiters();
    }

    /// The evidence that the stop of `container`, which has been recorded, is part of its pod's termination, or why it
    /// is not. Waits for other stops of the pod if their number decides. Before it decides against a termination,
    /// gathers the evidence again, because a preStop hook of another container may have begun to wait.
    pub(super) async fn classify_stop(
        &self,
        pod: &Pod,
        container: &ContainerId,
        evidence: impl Fn() -> TerminationEvidence,
    ) -> Result<&'static str, &'static str> {
        let known = evidence();
        let pod = pod.to_containers();
        loop {
            // Registered before the verdict, so that no stop in between is missed.
            let mut another_stop = pin!(self.another_stop.notified());
            another_stop.as_mut().enable();
            let now = BootTime::now();
            let mut verdict = self.detector().classify_stop(&pod, container, known, now);
            if matches!(verdict, Verdict::No(_)) {
                verdict = self
                    .detector()
                    .classify_stop(&pod, container, evidence(), now);
            }
            match verdict {
                Verdict::Yes(why) => return Ok(why.name()),
                Verdict::No(why) => return Err(why.name()),
                Verdict::WaitUntil(moment) => tokio::select! {
                    () = another_stop => {}
                    () = sleep(moment.since(now)) => {}
                },
            }
        }
    }

    fn detector(&self) -> MutexGuard<'_, TerminationDetector> {
        // A panic cannot leave a change half done.
        lock(&self.detector)
    }
}
