//! What all doors of the agent share.

use std::{sync::Arc, time::Duration};

use crate::{
    drain::{driver::DrainHandle, policy::Policy},
    flow::Snapshot,
    hold::judge::Judge,
    kernel::Tracker,
    pods::{Pod, Scope, kube::Kube, service::Pods},
    report::metrics::Metrics,
};

/// The agent: who knows the kernel, the pods and the drains.
pub struct Agent {
    /// The kernel.
    pub tracker: Tracker,
    /// The pods of this node.
    pub pods: Pods,
    /// What the API server says of them.
    pub kube: Kube,
    /// Their drains.
    pub drains: DrainHandle,
    /// Who is terminating.
    pub judge: Judge,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The policy of pods that say nothing.
    pub policy: Policy,
}

impl Agent {
    /// The policy of a pod, and what is wrong with its annotations. The API server's annotations are newer
    /// than those that the sandbox was made with.
    pub fn policy_of(&self, pod: &Pod) -> (Policy, Vec<String>) {
        let kube = self.kube.pods();
        let kube = kube.borrow();
        let annotations = kube
            .pods
            .get(&pod.name.uid)
            .map_or(&pod.annotations, |p| &p.annotations);
        self.policy.from_annotations(annotations)
    }

    /// The grace period of a pod, as far as it is known: of its deletion, else of its spec.
    pub fn grace_of(&self, pod: &Pod) -> Option<Duration> {
        let kube = self.kube.pods();
        let kube = kube.borrow();
        let deletion = kube.pods.get(&pod.name.uid).and_then(|p| p.deletion);
        deletion
            .and_then(|d| d.grace)
            .or_else(|| pod.containers.iter().filter_map(|c| c.grace).max())
    }

    /// The flows of a pod now.
    ///
    /// # Errors
    ///
    /// Why they can't be seen, in words.
    pub async fn snapshot(&self, pod: &Pod) -> Result<Snapshot, String> {
        if let Scope::Untracked(why) = &pod.scope {
            return Err(why.clone());
        }
        let (policy, _) = self.policy_of(pod);
        let look = self
            .tracker
            .look(&pod.scope)
            .await
            .map_err(|e| e.to_string())?;
        Ok(Snapshot::new(
            look.taken_at,
            &look.samples,
            policy.idle_after,
            |port| policy.holds_port(port),
        ))
    }
}
