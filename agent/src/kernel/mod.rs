//! The kernel's side of ebb: loading the BPF programs, asking for sockets, entering namespaces.
//!
//! [`Tracker`] is the door. Edges are for speed, a look is for truth: what the programs count and report is
//! fast and may be behind by a moment, what [`Tracker::look`] returns comes from the kernel's own tables.

mod audit;
mod auditor;
mod btf;
mod bytes;
pub(crate) mod cgroups;
mod close;
mod earlier;
mod error;
mod events;
mod filter;
mod hooks;
mod house;
mod inhabited;
mod inner;
mod kubelet;
mod looks;
mod nested;
mod netns;
mod offsets;
mod pod_listener;
mod poll;
mod pool;
mod programs;
mod prune;
mod sock_diag;
mod ties;
mod tracker;
mod walks;
mod watches;

use std::{net::SocketAddr, path::Path};

pub use audit::{Audit, Drifted};
pub use error::KernelError;
pub use kubelet::KubeletCgroup;
pub use netns::Netns;
pub use pod_listener::{OwnPort, PodListener};
pub use programs::loaded_programs;
pub use tracker::{Options, Tracker, WorkloadCount};

use crate::{
    clock::BootTime,
    flow::{Sample, TcpState},
    ids::{CgroupId, NetnsInode, SocketCookie, WatchId},
};

/// Whether the running kernel has the types that the BPF programs need: every field, and the tracepoint that
/// they are attached to. Loads nothing.
///
/// # Errors
///
/// [`KernelError::NoBtf`] or [`KernelError::NoField`], whichever it lacks first.
pub fn able() -> Result<(), KernelError> {
    offsets::able(Path::new(offsets::VMLINUX_BTF))
}

/// `uname -r`.
pub fn release() -> String {
    offsets::release()
}

/// All TCP sockets of one pod (or network namespace) at one moment, listeners included.
#[derive(Clone, Debug)]
pub struct Look {
    /// The moment before the kernel was asked.
    pub taken_at: BootTime,
    /// The sockets.
    pub samples: Vec<Sample>,
}

/// What exact lookups of a few flows of a watched pod showed.
#[derive(Clone, Debug)]
pub struct LookUp {
    /// The moment before the kernel was asked.
    pub taken_at: BootTime,
    /// How many edges of this watch the kernel had counted before the lookups, those that it could not report
    /// included, and one for each flow that was about to have its first. Who had received as many when he
    /// asked has missed nothing until then.
    pub edges: u64,
    /// The sockets that exist between the addresses asked for, whichever these are now.
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
    /// The watch that it was counted in.
    pub watch: WatchId,
    /// The socket.
    pub cookie: SocketCookie,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// State before.
    pub from: TcpState,
    /// State after. `FinWait2`, `TimeWait` and `Close` are the end of a flow; whatever else comes after `SynRecv`
    /// is a new one: `Established`, or, with fast open, a state in which one end has closed already
    /// (`tcp_rcv_state_process` in net/ipv4/tcp_input.c, `tcp_close_state` in net/ipv4/tcp.c).
    pub to: TcpState,
    /// The kernel's stamp.
    pub at: BootTime,
    /// It is a connection to ebb itself: the wait port inside a pod. It counts as reported, and for nothing else.
    pub own: bool,
}

/// What the kernel reports of watched workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelEvent {
    /// A state change.
    Edge(Edge),
    /// Events were lost: what is known of all watched workloads must be looked at anew.
    Lost,
}
