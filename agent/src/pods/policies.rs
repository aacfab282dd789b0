//! The drain policy of a pod, from the node's flags, the pod's annotations and the API server.

use std::{collections::BTreeMap, time::Duration};

use ebb_core::{ids::PodUid, policy::Policy};

use super::{
    Pod,
    kube::{Deletion, Kube},
};

/// The policy, deletion and grace period of each pod.
#[derive(Debug)]
pub struct PodPolicies {
    kube: Kube,
    node: Policy,
}

impl PodPolicies {
    /// `node` is the policy of pods without annotations.
    pub const fn new(kube: Kube, node: Policy) -> Self {
        Self { kube, node }
    }

    /// The API server's view of the node's pods.
    pub const fn kube(&self) -> &Kube {
        &self.kube
    }

    /// The policy of pods without annotations in namespaces without annotations.
    pub const fn node(&self) -> &Policy {
        &self.node
    }

    /// The policy of pods without annotations in this namespace, and the warnings about the namespace's annotations.
    pub fn of_namespace(&self, namespace: &str) -> (Policy, Vec<String>) {
        let namespaces = self.kube.namespaces();
        let namespaces = namespaces.borrow();
        match namespaces.get(namespace) {
            Some(annotations) => self.node.from_namespace(namespace, annotations),
            None => (self.node.clone(), vec![]),
        }
    }

    /// The policy of a pod, without the warnings.
    pub fn policy(&self, pod: &Pod) -> Policy {
        self.policy_and_warnings(pod).0
    }

    /// The policy of a pod, and the warnings about its annotations and those of its namespace.
    pub fn policy_and_warnings(&self, pod: &Pod) -> (Policy, Vec<String>) {
        let (base, mut warnings) = self.of_namespace(&pod.name.namespace);
        let (policy, of_pod) = base.from_annotations(&self.annotations(pod));
        warnings.extend(of_pod);
        (policy, warnings)
    }

    /// The annotations of a pod: the API server's if it knows the pod. They are newer than those of the sandbox.
    pub fn annotations(&self, pod: &Pod) -> BTreeMap<String, String> {
        let kube = self.kube.pods();
        let kube = kube.borrow();
        kube.pods
            .get(&pod.name.uid)
            .map_or(&pod.annotations, |p| &p.annotations)
            .clone()
    }

    /// The deletion of a pod, if the API server has reported one.
    pub fn deletion(&self, pod: &PodUid) -> Option<Deletion> {
        let kube = self.kube.pods();
        let kube = kube.borrow();
        kube.pods.get(pod).and_then(|p| p.deletion)
    }

    /// The grace period of a pod: of its deletion, else of its spec.
    pub fn grace(&self, pod: &Pod) -> Option<Duration> {
        let deletion = self.deletion(&pod.name.uid);
        deletion.and_then(|d| d.grace).or_else(|| pod.grace())
    }
}
