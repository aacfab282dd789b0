//! Maps and read-only globals.

use aya_ebpf::{
    Global,
    btf_maps::{Array, HashMap, RingBuf, SkStorage},
    macros::btf_map,
};
use ebb_common::{
    EphemeralPorts, FlowEvent, FlowRecord, LOSSES, ListenKey, Offsets, Workload, WorkloadKey,
};

/// A record in each TCP socket that was opened or accepted. Freed by the kernel with the socket.
#[btf_map]
pub(crate) static FLOWS: SkStorage<FlowRecord> = SkStorage::new();

/// Counters by workload. Preallocated: it can fill up (see [`LOST`]), never grow.
#[btf_map]
pub(crate) static WORKLOADS: HashMap<WorkloadKey, Workload, 16384> = HashMap::new();

/// The workloads of which events are wanted: `{cgroup: 0, netns}` for a pod with a network namespace of its
/// own, `{cgroup, netns: 0}` for one on the host network.
#[btf_map]
pub(crate) static WATCHED: HashMap<WorkloadKey, u8, 4096> = HashMap::new();

/// How many workloads are watched.
#[btf_map]
pub(crate) static WATCHES: Array<u32, 1> = Array::new();

/// State changes of inbound flows of watched workloads. 2^19 bytes hold some 6,500 of them.
#[btf_map]
pub(crate) static EVENTS: RingBuf<FlowEvent, 524288> = RingBuf::new();

/// What could not be recorded, by `ebb_common::LOST_…`.
#[btf_map]
pub(crate) static LOST: Array<u64, LOSSES> = Array::new();

/// Listening ports met while seeding.
#[btf_map]
pub(crate) static LISTENERS: HashMap<ListenKey, u8, 16384> = HashMap::new();

#[unsafe(no_mangle)]
pub(crate) static OFFSETS: Global<Offsets> = Global::new(Offsets {
    sock_protocol: 0,
    sock_cgrp_data: 0,
    sock_cgroup_data_cgroup: 0,
    cgroup_kn: 0,
    kernfs_node_id: 0,
    sock_common_net: 0,
    net_ns_inum: 0,
    sock_common_family: 0,
    sock_common_state: 0,
    sock_common_num: 0,
    sock_common_dport: 0,
    sock_common_daddr: 0,
    sock_common_rcv_saddr: 0,
    sock_common_v6_daddr: 0,
    sock_common_v6_rcv_saddr: 0,
    inet_sock_sport: 0,
    tcp_sock_rcv_nxt: 0,
    tcp_sock_snd_wl1: 0,
    tcp_sock_delivered_mstamp: 0,
    tcp_sock_tcp_mstamp: 0,
});

/// The namespace in which pods are told apart by cgroup.
#[unsafe(no_mangle)]
pub(crate) static HOST_NETNS: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub(crate) static EPHEMERAL_PORTS: Global<EphemeralPorts> =
    Global::new(EphemeralPorts { first: 0, last: 0 });
