//! What happens to a deletion after its first hold: a later delete shortens the grace period or removes the pod.
//!
//! The kubelet tells the runtime nothing of it: it neither cancels the StopContainer that is under way nor makes another
//! one. Only the API server's watch shows it.

use std::{sync::Arc, time::Duration};

use ebb_core::{
    clock::BootTime,
    drain_report::DeadlineCause,
    ids::{PodName, PodUid},
    machine::Deadline,
};

use futures_util::future::join_all;
use tokio::time::sleep;

use crate::{
    drains::driver::DrainHandle,
    pods::{kube::is_static, policies::PodPolicies, store::Pods},
};

/// When the API server is asked again about a pod that the watch does not have any more, if it has not answered.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Follows the deletions of the pods that drain. Ends with the drain driver.
pub(crate) struct Deletions {
    pub(crate) pods: Arc<Pods>,
    pub(crate) policies: Arc<PodPolicies>,
    pub(crate) drains: DrainHandle,
}

impl Deletions {
    pub(crate) async fn follow(self) {
        let mut view = self.drains.view();
        let mut kube = self.policies.kube().pods();
        loop {
            let active = Arc::clone(&view.borrow_and_update());
            let names = active.active.iter().map(|report| report.pod.clone());
            let names: Vec<PodName> = names.collect();
            let known = Arc::clone(&kube.borrow_and_update());
            let (listed, missing): (Vec<_>, Vec<_>) = names
                .iter()
                .partition(|pod| known.pods.contains_key(&pod.uid));
            for pod in listed {
                if let Some(deletion) = known.pods[&pod.uid].deletion {
                    self.drains.deletion(&pod.uid, deletion);
                }
            }
            let missing = missing.into_iter().filter(|_| known.synced);
            let answers = join_all(missing.map(|pod| self.check_removal(pod))).await;
            let has_answers = answers.iter().all(|answered| *answered);
            // Views also change with each flow.
            let is_new = |uid: &PodUid| names.iter().all(|known| known.uid != *uid);
            tokio::select! {
                Ok(_) = view.wait_for(|v| v.active.iter().any(|r| is_new(&r.pod.uid))) => {}
                Ok(()) = kube.changed() => {}
                () = sleep(ASK_AGAIN_AFTER), if !has_answers => {}
                else => return,
            }
        }
    }

    /// Ends the drain of a pod that the API server does not know any more. The watch may be behind, so this asks the API
    /// server, and returns whether it has answered.
    async fn check_removal(&self, pod: &PodName) -> bool {
        let table = self.pods.latest();
        let is_static = |uid| {
            table
                .by_uid(uid)
                .is_some_and(|pod| is_static(&pod.annotations))
        };
        // Deleting its mirror does not end a static pod.
        if is_static(&pod.uid) {
            return true;
        }
        let Some(is_removed) = self.policies.kube().is_removed(pod).await else {
            return false;
        };
        if is_removed {
            tracing::info!(%pod, "the pod is gone from the API server: ebb forwards its stops");
            let deadline = Deadline {
                at: BootTime::now(),
                cause: DeadlineCause::Removed,
            };
            self.drains.limit(&pod.uid, deadline);
        }
        true
    }
}
