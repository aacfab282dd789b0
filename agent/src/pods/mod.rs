//! Who owns a cgroup or a network namespace.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use crate::{
    drain::report::PodName,
    ids::{CgroupId, ContainerId, NetnsInode, SandboxId},
};

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
