//! Who owns a cgroup or a network namespace, and which pods are coming to their end.
//!
//! ```text
//!  runtime ── cri ──► discover ──► table ◄── service (`Pods`): one refresh at a time, none without a reason
//!                      │    └─ cgroup    (host-network pods)
//!                      └─ info           (pure: what a verbose status says)
//!  API server ── kube: one metadata watch of this node's pods
//!  events of the runtime, the watch ──► changes: the pods have changed
//!  stops seen at the CRI + kube ──► terminating (pure): the pod's end, or a restart?
//! ```
//!
//! The CRI is the source for namespaces, cgroups and the annotations frozen in the sandbox; the API
//! server, where there is one, for deletion. They are joined by pod UID.

pub mod cgroup;
pub mod changes;
pub mod cri;
pub mod discover;
pub mod hook;
pub mod info;
pub mod kube;
pub mod kubepods;
pub mod service;
pub mod table;
pub mod terminating;
#[cfg(test)]
mod testing;

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use self::hook::HookError;
use crate::ids::{CgroupId, ContainerId, NetnsInode, PodName, SandboxId};

/// Where a pod's sockets are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In a network namespace of its own, which `pid` (a process of the pod) lives in.
    Netns {
        /// The namespace.
        inode: NetnsInode,
        /// A process in it, to enter it by.
        pid: u32,
    },
    /// In the host's network namespace, made by processes of these cgroups.
    HostNetwork(Vec<CgroupId>),
    /// Nowhere that ebb can see; the text says why.
    Untracked(String),
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// CRI id.
    pub id: ContainerId,
    /// Its name in the pod spec.
    pub name: String,
    /// CONTAINER_RUNNING at the last look.
    pub running: bool,
    /// Annotation `io.kubernetes.pod.terminationGracePeriod`, in whole seconds.
    pub grace: Option<Duration>,
    /// The port of the pod that its preStop hook waits at, if it is such a hook; or why it can't.
    pub wait_port: Result<Option<u16>, HookError>,
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
    /// Its annotations, as frozen in the sandbox at its creation.
    pub annotations: BTreeMap<String, String>,
    /// Its containers, by creation.
    pub containers: Vec<Container>,
}

impl Pod {
    /// Whether nobody but the pod itself can have this address at the other end of a connection of its: its loopback,
    /// and its own addresses. On the host's network others have the same.
    pub fn has_to_itself(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        matches!(self.scope, Scope::Netns { .. }) && (ip.is_loopback() || self.ips.contains(&ip))
    }

    /// The grace period of its spec, if a container says it.
    pub fn grace(&self) -> Option<Duration> {
        self.containers.iter().filter_map(|c| c.grace).max()
    }
}
