//! Which pod owns a cgroup or a network namespace, and which pods terminate.
//!
//! ```text
//!  runtime ── cri ──► discover ──► table ◄── store (`Pods`): one list at a time, shared by its callers
//!                      │    └─ cgroup    (host-network pods)
//!                      └─ info           (pure: parses a verbose status)
//!  API server ── kube: one metadata watch of this node's pods
//!  events of the runtime, the watch ──► change_notifier: the pods have changed
//!  kube, annotations, node flags ──► policies: how to drain each pod
//!  stops seen at the CRI + kube ──► `ebb_core::termination`: does the pod end, or does a container restart?
//! ```
//!
//! Namespaces, cgroups and the annotations frozen in the sandbox come from the CRI; deletions come from the API
//! server, if there is one. ebb joins the two by pod UID.

pub mod cgroup;
pub mod change_notifier;
pub mod cri;
pub mod discover;
pub mod hook;
pub(crate) mod info;
pub mod kube;
pub mod kubepods;
pub(crate) mod peer_names;
pub mod policies;
pub mod store;
pub mod table;
#[cfg(test)]
mod testing;
mod workload;

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use ebb_core::{
    ids::{ContainerId, PodName, SandboxId},
    scope::Scope,
    termination::{ContainerState, PodContainers},
};

use ebb_protocol::filter::OwnerRef;

use self::hook::HookError;
use crate::linux::netns::Netns;

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// CRI id.
    pub id: ContainerId,
    /// Its name in the pod spec.
    pub name: String,
    /// CONTAINER_RUNNING in the last list.
    pub running: bool,
    /// Annotation `io.kubernetes.pod.terminationGracePeriod`, in whole seconds.
    pub grace: Option<Duration>,
    /// The pod's wait port that its preStop hook requests, if it requests one; an error if that can't work.
    pub wait_port: Result<Option<u16>, HookError>,
    /// How long its preStop hook sleeps, which the kubelet takes off the grace period.
    pub pre_stop_sleep: Duration,
}

/// A pod on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Name and UID.
    pub name: PodName,
    /// Its newest ready sandbox.
    pub sandbox: SandboxId,
    /// Where its sockets are.
    pub scope: Scope,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The Deployment, StatefulSet, DaemonSet, CronJob or Job that created it, if any.
    pub workload: Option<String>,
    /// Its labels at its creation, without the kubelet's own.
    pub labels: BTreeMap<String, String>,
    /// Its annotations, as frozen in the sandbox at its creation.
    pub annotations: BTreeMap<String, String>,
    /// Its containers, the oldest first.
    pub containers: Vec<Container>,
}

impl Pod {
    /// Whether this is the controller that created the pod.
    pub fn is_owned_by(&self, owner: &OwnerRef) -> bool {
        self.workload.as_ref() == Some(&owner.name)
            && workload::kind(&self.labels) == Some(owner.kind)
    }

    /// Whether a peer with this address is the pod itself: the address is loopback or the pod's own. False for
    /// host-network pods, which share the node's addresses.
    pub fn is_own_ip(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        matches!(self.scope, Scope::Netns { .. }) && (ip.is_loopback() || self.ips.contains(&ip))
    }

    /// The input of termination detection.
    pub fn to_containers(&self) -> PodContainers {
        PodContainers {
            sandbox: self.sandbox.clone(),
            containers: self
                .containers
                .iter()
                .map(|c| ContainerState {
                    id: c.id.clone(),
                    name: c.name.clone(),
                    running: c.running,
                })
                .collect(),
        }
    }

    /// Whether the process through which ebb found the pod's network namespace is gone: that of its sandbox, if the
    /// runtime runs one. False for pods on the host network.
    pub fn is_sandbox_gone(&self) -> bool {
        match self.scope {
            Scope::Netns { inode, pid } => Netns::is_gone(inode, pid),
            Scope::HostNetwork(_) | Scope::Untracked(_) => false,
        }
    }

    /// The grace period of its spec, if a container's annotation has it.
    pub fn grace(&self) -> Option<Duration> {
        self.containers.iter().filter_map(|c| c.grace).max()
    }
}
