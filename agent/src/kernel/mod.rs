//! The kernel's side of ebb: loading the BPF programs, asking for sockets, entering namespaces.
//!
//! [`Tracker`] is the door. Edges are for speed, a look is for truth: what the programs count and report is
//! fast and may be behind by a moment, what [`Tracker::look`] returns comes from the kernel's own tables.

mod btf;
mod bytes;
mod close;
mod error;
mod events;
mod netns;
mod offsets;
mod poll;
mod programs;
mod prune;
mod sock_diag;
mod tracker;

use std::net::SocketAddr;

pub use error::KernelError;
pub use netns::Netns;
pub use tracker::{Options, Tracker, WorkloadCount};

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
