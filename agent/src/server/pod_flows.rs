//! The flows of a pod now.

use std::{ops::Deref, sync::Arc};

use ebb_core::{flow::Snapshot, policy::PortsInUse, scope::Scope};

use crate::{
    kernel::Tracker,
    pods::{Pod, policies::PodPolicies},
};

/// Dumps the sockets of pods and classifies them by each pod's policy.
#[derive(Clone)]
pub(crate) struct PodFlows {
    tracker: Tracker,
    policies: Arc<PodPolicies>,
}

/// The flows of a pod, and what the dump has shown to be wrong with its annotations, or to be hidden from ebb.
pub(super) struct PodSnapshot {
    pub(super) snapshot: Snapshot,
    pub(super) warnings: Vec<String>,
}

impl Deref for PodSnapshot {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl PodFlows {
    pub(crate) const fn new(tracker: Tracker, policies: Arc<PodPolicies>) -> Self {
        Self { tracker, policies }
    }

    pub(super) const fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    pub(super) fn policies(&self) -> &PodPolicies {
        &self.policies
    }

    /// The flows of a pod now, or why ebb cannot see them.
    pub(super) async fn snapshot(&self, pod: &Pod) -> Result<PodSnapshot, String> {
        if let Scope::Untracked(why) = &pod.scope {
            return Err(why.clone());
        }
        let mut policy = self.policies.policy(pod);
        let dump = self
            .tracker
            .dump(&pod.scope)
            .await
            .map_err(|e| e.to_string())?;
        let about_ports = policy.fit_ports(&PortsInUse::of(&dump.samples));
        let forwards = dump
            .forwards
            .map(|why| format!("it may have connections that ebb cannot see: {why}"));
        Ok(PodSnapshot {
            snapshot: Snapshot::new(
                dump.taken_at,
                &dump.samples,
                policy.classify_options(),
                |port| policy.holds_port(port),
                |ip| pod.is_own_ip(ip),
            ),
            warnings: about_ports.into_iter().chain(forwards).collect(),
        })
    }
}
