//! The kernel's side of ebb: the only module with unsafe code.

use std::net::SocketAddr;

use crate::{
    clock::BootTime,
    flow::{Sample, TcpState},
    ids::{CgroupId, NetnsInode, SocketCookie},
};

/// All TCP sockets of one pod (or network namespace) at one moment, listeners included.
#[derive(Clone, Debug)]
pub struct Look {
    /// The moment before the kernel was asked.
    pub taken_at: BootTime,
    /// The sockets.
    pub samples: Vec<Sample>,
}

/// A state change of an inbound flow of a watched workload. The kernel reports it before it stores the
/// new state, so a look made within the same microseconds may still show the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Cgroup of the socket.
    pub cgroup: CgroupId,
    /// Network namespace of the socket.
    pub netns: NetnsInode,
    /// The socket.
    pub cookie: SocketCookie,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// State before.
    pub from: TcpState,
    /// State after. `Established` after `SynRecv` is a new flow; `FinWait2`, `TimeWait` and `Close` are
    /// the end of one.
    pub to: TcpState,
    /// The kernel's stamp.
    pub at: BootTime,
}

/// What the kernel reports of watched workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelEvent {
    /// A state change.
    Edge(Edge),
    /// Events were lost: what is known of all watched workloads must be looked at anew.
    Lost,
}
