//! What all doors of the agent share.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    clock::BootTime,
    drain::{driver::DrainHandle, policy::Policy},
    flow::Snapshot,
    hold::{
        caller::Lookups, judge::Judge, judgements::Judgements, pod_port::Warnings, shares::Shares,
    },
    ids::PodUid,
    kernel::Tracker,
    pods::{
        Pod, Scope,
        kube::{Deletion, Kube},
        service::Pods,
    },
    report::{metrics::Metrics, tell::Teller},
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
    /// Finding out who calls.
    pub lookups: Lookups,
    /// Who waits by HTTP.
    pub waits: Arc<Shares<PodUid>>,
    /// What is wrong with the wait ports of pods.
    pub wait_port_warnings: Warnings,
    /// Who tells the world of pods.
    pub teller: Teller,
    /// What became of the last stops.
    pub judgements: Judgements,
    /// When this agent started.
    pub started: BootTime,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The policy of pods that say nothing.
    pub policy: Policy,
}

impl Agent {
    /// The policy of a pod, and what is wrong with its annotations. The API server's are newer than those that the
    /// sandbox was made with.
    pub fn policy_of(&self, pod: &Pod) -> (Policy, Vec<String>) {
        self.policy.from_annotations(&self.annotations_of(pod))
    }

    /// The policy of a pod alone.
    pub fn own_policy_of(&self, pod: &Pod) -> Policy {
        self.policy_of(pod).0
    }

    /// All that is wrong with a pod, for those who show pods: with its annotations, and with the wait port that it
    /// asks for.
    pub fn warnings_of(&self, pod: &Pod) -> Vec<String> {
        let (_, mut warnings) = self.policy_of(pod);
        warnings.extend(self.wait_port_warnings.of(&pod.name.uid));
        warnings
    }

    /// The annotations of a pod that count.
    pub fn annotations_of(&self, pod: &Pod) -> BTreeMap<String, String> {
        let kube = self.kube.pods();
        let kube = kube.borrow();
        kube.pods
            .get(&pod.name.uid)
            .map_or(&pod.annotations, |p| &p.annotations)
            .clone()
    }

    /// The deletion of a pod, if the API server has told of one.
    pub fn deletion_of(&self, pod: &PodUid) -> Option<Deletion> {
        let kube = self.kube.pods();
        let kube = kube.borrow();
        kube.pods.get(pod).and_then(|p| p.deletion)
    }

    /// The grace period of a pod, as far as it is known: of its deletion, else of its spec.
    pub fn grace_of(&self, pod: &Pod) -> Option<Duration> {
        let deletion = self.deletion_of(&pod.name.uid);
        deletion.and_then(|d| d.grace).or_else(|| pod.grace())
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
        let policy = self.own_policy_of(pod);
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
            |ip| pod.has_to_itself(ip),
        ))
    }
}
