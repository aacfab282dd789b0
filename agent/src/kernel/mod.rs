//! ebb's access to the kernel: loading the BPF programs, dumping sockets, entering namespaces.
//!
//! The API is [`Tracker`]. Events and counters of the programs are fast, but may lag by a moment. [`Tracker::dump`]
//! reads the kernel's own tables and is authoritative.

mod arrivals;
mod btf;
mod close;
mod cursor;
mod dump_limiter;
mod error;
mod events;
mod gone_workloads;
mod inspector;
mod kubelet;
mod links;
mod maintenance;
mod offsets;
mod open_counts;
mod pod_listener;
mod programs;
mod sock_diag;
mod socket_dump;
mod tracker;
mod watches;

use std::{io, net::SocketAddr, path::Path};

use ebb_common::user_locks;
use ebb_core::flow::origin;

use ebb_core::{
    clock::BootTime,
    flow::Sample,
    ids::{CgroupId, NetnsInode, SocketCookie, WatchId},
};

pub use error::KernelError;
pub use kubelet::KubeletCgroup;
pub(crate) use offsets::FIRST_KERNEL;
pub use open_counts::WorkloadCount;
pub(crate) use pod_listener::PodListener;
pub(crate) use programs::loaded_programs;
pub use tracker::{Tracker, TrackerOptions};

// `ebb-core` does not depend on `ebb-common`, so it has its own copy of these bits.
const _: () = assert!(
    origin::BOUND_PORT == user_locks::BOUND_PORT
        && origin::BOUND_BY_CONNECT == user_locks::BOUND_BY_CONNECT
);

/// Checks that the running kernel has every field that the BPF programs read and the tracepoint that they are
/// attached to. Loads nothing.
pub(crate) fn check_support() -> Result<(), KernelError> {
    offsets::check_support(Path::new(offsets::VMLINUX_BTF))
}

/// Checks that the running kernel is new enough.
pub(crate) fn check_release() -> Result<(), KernelError> {
    offsets::check_release(&release())
}

/// `uname -r`.
pub(crate) fn release() -> String {
    offsets::release()
}

/// All TCP sockets of one pod (or network namespace), listeners included.
#[derive(Clone, Debug)]
pub struct SocketDump {
    /// Just before the dump.
    pub taken_at: BootTime,
    /// How many state changes, of any socket, the programs had missed at `taken_at`.
    pub missed_changes: u64,
    /// The sockets.
    pub samples: Vec<Sample>,
    /// How traffic may pass through the pod's namespace to somewhere else, so that it has no sockets there; `None` if
    /// nothing suggests it.
    pub forwards: Option<String>,
}

/// The result of looking up a few flows of a watched pod.
#[derive(Clone, Debug)]
pub struct FlowLookUp {
    /// Just before the lookups.
    pub taken_at: BootTime,
    /// How many events of this watch had been sent before the lookups, including those that the full ring buffer
    /// dropped. A caller that had received this many when it called has missed none.
    pub sent: u64,
    /// How many state changes, of any socket, the programs had missed after the lookups.
    pub missed_changes: u64,
    /// The sockets that exist between the given addresses. An address pair may have been reused by another connection.
    pub samples: Vec<Sample>,
}

/// Why lookups can't be relied on, so that a dump is needed.
#[derive(Debug, thiserror::Error)]
pub enum LookUpFailure {
    /// With TCP fast open, a connection may carry data before the programs report it.
    #[error("TCP fast open is on for servers of the pod")]
    FastOpen,
    /// Connections in cgroups that were created after the watch began are not reported.
    #[error("the pod has created cgroups since the watch began")]
    NewCgroups,
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Whether a [`SocketEvent`] reports an opening or a closing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketChange {
    /// The handshake is done.
    Opened,
    /// The connection has ended.
    Closed,
}

/// A connection of a watched workload was opened or closed. The program runs before the kernel stores the
/// new state, so a dump within the same microseconds may still show the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketEvent {
    /// Cgroup of the socket.
    pub cgroup: CgroupId,
    /// Network namespace of the socket.
    pub netns: NetnsInode,
    /// The watch in which the event was counted.
    pub watch: WatchId,
    /// The socket.
    pub cookie: SocketCookie,
    /// Address of the pod.
    pub local: SocketAddr,
    /// Address of the peer.
    pub remote: SocketAddr,
    /// Opened or closed.
    pub change: SocketChange,
    /// When the program ran.
    pub at: BootTime,
    /// The connection is one to ebb's wait port inside the pod, or a probe. The event counts as received, but does not
    /// affect the drain.
    pub exempt: bool,
}

/// What [`Tracker`] sends about watched workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelEvent {
    /// A connection was opened or closed.
    Socket(SocketEvent),
    /// Events were lost: dump the sockets of all watched workloads again.
    Lost,
}
