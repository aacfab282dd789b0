//! What the BPF programs and the agent share: the layout of maps, events and read-only globals.
//!
//! Every type is `repr(C)` without implicit padding, made of integers only (any bit pattern is valid), and
//! has its size asserted, so that both sides agree whatever compiled them.

#![no_std]

use core::mem::size_of;

#[cfg(feature = "user")]
mod user;

/// TCP states by the kernel's numbers (`include/net/tcp_states.h`), as far as the programs need them.
pub mod tcp_state {
    #![allow(missing_docs, reason = "RFC 9293's names")]
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// [`FlowRecord::role`]: closed, or never opened.
pub const ROLE_NONE: u8 = 0;
/// [`FlowRecord::role`]: passive open.
pub const ROLE_INBOUND: u8 = 1;
/// [`FlowRecord::role`]: active open.
pub const ROLE_OUTBOUND: u8 = 2;

/// Whether a socket of `role` in `state` is an inbound flow, which is what is counted. FIN_WAIT2 and TIME_WAIT are
/// over: everything that was sent has arrived. What a listener made is a flow in SYN_RECV already: with TCP fast
/// open it may have been accepted.
#[inline(always)]
pub const fn is_counted(role: u8, state: u8) -> bool {
    role == ROLE_INBOUND && (state == tcp_state::SYN_RECV || is_open(state))
}

/// Whether a connection in `state` is between its handshake and its end.
#[inline(always)]
pub const fn is_open(state: u8) -> bool {
    use tcp_state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, LAST_ACK};
    matches!(
        state,
        ESTABLISHED | FIN_WAIT1 | CLOSE_WAIT | LAST_ACK | CLOSING
    )
}

/// Whose socket it is: the cgroup names the container, the namespace the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct WorkloadKey {
    /// Cgroup v2 id of the process that made the socket (for an accepted one: its listener).
    pub cgroup: u64,
    /// Inode number of the socket's network namespace.
    pub netns: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<WorkloadKey>() == 16);

/// Counters of one workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Workload {
    /// Inbound flows now.
    pub inbound: i64,
    /// Inbound flows ever.
    pub inbound_total: u64,
}
const _: () = assert!(size_of::<Workload>() == 16);

/// What is remembered of one socket, in its socket storage. Each that a listener made has one; of those that dialled
/// only such as their port does not give away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowRecord {
    /// Whose it is, read once.
    pub key: WorkloadKey,
    /// Boot time in nanoseconds at which it became a flow, or was seeded.
    pub opened_at: u64,
    /// `ROLE_…`.
    pub role: u8,
    /// 1: it is in the counters of its workload now.
    pub counted: u8,
    /// 1: it is older than the agent.
    pub seeded: u8,
    /// TCP state after the last change that was accounted. Where nobody watched, others may have come after it.
    pub state: u8,
    /// 1: the kubelet dialled it.
    pub probe: u8,
    /// 1: it should be in the counters and is not, which has been counted as a loss.
    pub lost: u8,
    /// The [`Watch::number`] of the watch that counts it as [`OPENING`]; 0: none ever did.
    pub watch: u16,
}
const _: () = assert!(size_of::<FlowRecord>() == 32);

/// A wish to hear of the state changes of a workload's inbound flows, and how many there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Watch {
    /// Two counts in one word, so that user space reads both at the same moment. Below [`OPENING`]: the edges since
    /// the watch began, reported or not. Above: how many flows are born whose first edge is not there yet. A watch
    /// with 7 edges and one such flow has `OPENING + 7`: whoever has received 7 events knows that one is outstanding.
    pub edges: u64,
    /// Tells it from earlier watches of the same workload; never 0.
    pub number: u16,
    /// Zero.
    pub zero: [u8; 6],
}
const _: () = assert!(size_of::<Watch>() == 16);

/// What [`Watch::edges`] has for each flow between its birth, which is never reported, and its first edge: more than
/// a watch ever has edges.
pub const OPENING: u64 = 1 << 40;

/// A state change of an inbound flow of a watched workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowEvent {
    /// Boot time in nanoseconds, before the kernel stores the new state.
    pub at: u64,
    /// Socket cookie.
    pub cookie: u64,
    /// As in [`WorkloadKey`].
    pub cgroup: u64,
    /// As in [`WorkloadKey`].
    pub netns: u32,
    /// The [`Watch::number`] that it was counted in.
    pub watch: u32,
    /// The pod's address; an IPv4 address is in the first four bytes.
    pub local_addr: [u8; 16],
    /// The peer's address, likewise.
    pub remote_addr: [u8; 16],
    /// The pod's port, in host order.
    pub local_port: u16,
    /// The peer's port, in host order.
    pub remote_port: u16,
    /// AF_INET (2) or AF_INET6 (10).
    pub family: u16,
    /// State before.
    pub from: u8,
    /// State after.
    pub to: u8,
}
const _: () = assert!(size_of::<FlowEvent>() == 72);

/// The two ends of a connection, seen from one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Connection {
    /// Its own address; IPv4 as IPv4-mapped IPv6.
    pub local_addr: [u8; 16],
    /// The other end's, likewise.
    pub remote_addr: [u8; 16],
    /// Its own port, in host order.
    pub local_port: u16,
    /// The other end's, likewise.
    pub remote_port: u16,
}
const _: () = assert!(size_of::<Connection>() == 36);

/// As many network namespaces as have a place in the map of ephemeral ports: those of one batch of seeding.
pub const PORTS_PLACES: usize = 256;

/// As many listening ports as have a place in the map of listeners.
pub const LISTENER_PLACES: usize = 16_384;

/// How many cgroups the kubelet may dial from.
pub const KUBELET_CGROUPS: usize = 64;

/// A listening port found while seeding: what makes an older flow on the same port inbound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ListenKey {
    /// Network namespace of the listener.
    pub netns: u32,
    /// Its port, in host order.
    pub port: u32,
}
const _: () = assert!(size_of::<ListenKey>() == 8);

/// Where the kernel keeps what the programs read, in bytes from the start of each structure. Resolved from
/// the running kernel's BTF, because rustc emits no CO-RE relocations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's own names: structure, field")]
pub struct Offsets {
    pub sock_protocol: u32,
    pub sock_cgrp_data: u32,
    pub sock_cgroup_data_cgroup: u32,
    /// No offset: 1 where the field before is a tagged word, before Linux 5.15, and no pointer.
    pub sock_cgroup_data_is_tagged: u32,
    pub cgroup_kn: u32,
    pub kernfs_node_id: u32,
    pub sock_common_net: u32,
    pub net_ns_inum: u32,
    pub sock_common_family: u32,
    pub sock_common_state: u32,
    pub sock_common_num: u32,
    pub sock_common_dport: u32,
    pub sock_common_daddr: u32,
    pub sock_common_rcv_saddr: u32,
    pub sock_common_v6_daddr: u32,
    pub sock_common_v6_rcv_saddr: u32,
    pub inet_sock_sport: u32,
    pub tcp_sock_rcv_nxt: u32,
    pub tcp_sock_snd_wl1: u32,
    pub tcp_sock_delivered_mstamp: u32,
    pub tcp_sock_tcp_mstamp: u32,
}
const _: () = assert!(size_of::<Offsets>() == 84);

/// A socket whose peer's last segment was a bare acknowledgement, as the program `bare_ack` writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BareAck {
    /// Socket cookie.
    pub cookie: u64,
    /// When the peer last acknowledged data, in microseconds of the monotonic clock.
    pub delivered_at: u64,
    /// When it last sent or received anything, likewise.
    pub touched_at: u64,
}
const _: () = assert!(size_of::<BareAck>() == 24);

/// What one agent tells the next of a flow that both see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Remembered {
    /// As in [`FlowRecord`].
    pub opened_at: u64,
    /// As in [`FlowRecord`]: 1 where it is older than the first agent, too.
    pub seeded: u8,
    /// As in [`FlowRecord`].
    pub probe: u8,
    /// Zero.
    pub zero: [u8; 6],
}
const _: () = assert!(size_of::<Remembered>() == 16);

/// What the program `remember` writes of each inbound flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct RememberedFlow {
    /// Socket cookie. The kernel gives each only once between two boots (`sock_cookie` in net/core/sock_diag.c).
    pub cookie: u64,
    /// What is to be known of it.
    pub flow: Remembered,
}
const _: () = assert!(size_of::<RememberedFlow>() == 24);

/// What the program `audit` writes of each socket that is an inbound flow, or is counted as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Audited {
    /// Whose it is.
    pub key: WorkloadKey,
    /// 1: by its state it is a flow.
    pub flow: u8,
    /// 1: it was counted as what it is. 0: it was not, and has been brought in line if that was possible.
    pub agrees: u8,
    /// Zero.
    pub zero: [u8; 6],
}
const _: () = assert!(size_of::<Audited>() == 24);

/// What is to be added to the counters of a workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Correction {
    /// Cgroup of the workload.
    pub cgroup: u64,
    /// Its network namespace.
    pub netns: u32,
    /// 1: this place is in use.
    pub used: u32,
    /// To [`Workload::inbound`].
    pub inbound: i64,
}
const _: () = assert!(size_of::<Correction>() == 24);

/// As many corrections as one run of the program `correct` makes.
pub const CORRECTIONS: usize = 64;

/// The local ports that the kernel gives to active opens (`net.ipv4.ip_local_port_range`): a flow without record
/// on one of these that no listener has is outbound, on any other it is taken for inbound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EphemeralPorts {
    /// First.
    pub first: u16,
    /// Last, included.
    pub last: u16,
}
const _: () = assert!(size_of::<EphemeralPorts>() == 4);

impl EphemeralPorts {
    /// None: all flows without record are taken for inbound.
    pub const NONE: Self = Self { first: 1, last: 0 };

    /// Whether there are any.
    #[inline(always)]
    pub const fn are_known(&self) -> bool {
        self.first <= self.last
    }

    /// Whether `port` is one of them.
    #[inline(always)]
    pub const fn contain(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// Index into the map of losses: socket storage could not be allocated; the socket is not tracked.
pub const LOST_STORAGE: u32 = 0;
/// Index into the map of losses: the workload map is full; its flows are not counted.
pub const LOST_WORKLOAD: u32 = 1;
/// Index into the map of losses: the ring buffer was full; an event of a watched workload is missing.
pub const LOST_EVENT: u32 = 2;
/// Index into the map of losses: a listener met while seeding found no place; its namespace's older flows are
/// all taken for inbound.
pub const LOST_LISTENER: u32 = 3;
/// How many kinds of losses there are.
pub const LOSSES: usize = 4;
