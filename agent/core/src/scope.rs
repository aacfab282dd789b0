//! Where the sockets of a pod are.

use crate::ids::{CgroupId, NetnsInode};

/// Where a pod's sockets are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In the pod's own network namespace.
    Netns {
        /// The namespace.
        inode: NetnsInode,
        /// A process of the pod, through which ebb enters the namespace.
        pid: u32,
    },
    /// In the host's network namespace: the sockets that processes of these cgroups made.
    HostNetwork(Vec<CgroupId>),
    /// ebb can't see them, for this reason.
    Untracked(String),
}

impl Scope {
    /// Whether the sockets that a cgroup has in a network namespace are the pod's.
    pub fn contains(&self, cgroup: CgroupId, netns: NetnsInode) -> bool {
        match self {
            Self::Netns { inode, .. } => netns == *inode,
            Self::HostNetwork(cgroups) => cgroups.contains(&cgroup),
            Self::Untracked(_) => false,
        }
    }
}
