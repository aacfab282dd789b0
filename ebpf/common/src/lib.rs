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

/// Whether a socket of `role` in `state` is a flow. FIN_WAIT2 and TIME_WAIT are over: everything that was
/// sent has arrived. A socket in SYN_RECV is a flow only if a listener made it (it may have been accepted
/// already: TCP fast open); on an active open SYN_RECV is a handshake under way.
#[inline(always)]
pub const fn is_flow(role: u8, state: u8) -> bool {
    use tcp_state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, LAST_ACK, SYN_RECV};
    match state {
        ESTABLISHED | FIN_WAIT1 | CLOSE_WAIT | LAST_ACK | CLOSING => role != ROLE_NONE,
        SYN_RECV => role == ROLE_INBOUND,
        _ => false,
    }
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
    /// Outbound flows now.
    pub outbound: i64,
    /// Inbound flows ever.
    pub inbound_total: u64,
}
const _: () = assert!(size_of::<Workload>() == 24);

/// What is remembered of one socket, in its socket storage.
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
    /// TCP state after the last change that was accounted.
    pub state: u8,
    /// Zero.
    pub zero: [u8; 4],
}
const _: () = assert!(size_of::<FlowRecord>() == 32);

/// A state change of an inbound flow of a watched workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowEvent {
    /// Boot time in nanoseconds, before the kernel stores the new state.
    pub at: u64,
    /// Socket cookie.
    pub cookie: u64,
    /// Whose it is.
    pub key: WorkloadKey,
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
const _: () = assert!(size_of::<Offsets>() == 80);

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

/// The local ports that the kernel gives to active opens (`net.ipv4.ip_local_port_range`): an older flow
/// on one of these without a listener is taken for outbound, on any other for inbound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EphemeralPorts {
    /// First.
    pub first: u16,
    /// Last, included.
    pub last: u16,
}
const _: () = assert!(size_of::<EphemeralPorts>() == 4);

/// Index into the map of losses: socket storage could not be allocated; the socket is not tracked.
pub const LOST_STORAGE: u32 = 0;
/// Index into the map of losses: the workload map is full; its flows are not counted.
pub const LOST_WORKLOAD: u32 = 1;
/// Index into the map of losses: the ring buffer was full; an event of a watched workload is missing.
pub const LOST_EVENT: u32 = 2;
/// How many kinds of losses there are.
pub const LOSSES: usize = 3;
