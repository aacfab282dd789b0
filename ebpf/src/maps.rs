//! Maps and read-only globals.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use ebb_common::{
    CORRECTIONS, Connection, Correction, EphemeralPorts, FlowEvent, FlowRecord, KUBELET_CGROUPS,
    LISTENER_PLACES, LOSSES, ListenKey, Offsets, PORTS_PLACES, Remembered, Watch, Workload,
    WorkloadKey,
};

/// A record in each TCP socket that a listener made, and in those of the others whose port does not say that they
/// dialled (see `FlowRecord`). Freed by the kernel with the socket.
#[btf_map]
pub(crate) static FLOWS: SkStorage<FlowRecord> = SkStorage::new();

/// Counters by workload. Preallocated: it can fill up (see [`LOST`]), never grow.
#[btf_map]
pub(crate) static WORKLOADS: HashMap<WorkloadKey, Workload, 16384> = HashMap::new();

/// The workloads of which events are wanted: `{cgroup: 0, netns}` for a pod with a network namespace of its
/// own, `{cgroup, netns: 0}` for one on the host network. Not preallocated: it is nearly always empty. A program that
/// still has an entry which has just been removed may count in another one that took its place (from 6.1 on, where such
/// memory is used again at once): the reader of that is then told of fewer than are counted, and walks.
#[btf_map]
pub(crate) static WATCHED: HashMap<WorkloadKey, Watch, 4096, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// How many workloads are watched.
#[btf_map]
pub(crate) static WATCHES: Array<u32, 1> = Array::new();

/// State changes of inbound flows of watched workloads. 2^19 bytes hold some 6,500 of them.
#[btf_map]
pub(crate) static EVENTS: RingBuf<FlowEvent, 524288> = RingBuf::new();

/// The cgroups that the kubelet dials from: see `probe`.
#[btf_map]
pub(crate) static KUBELETS: HashMap<u64, u8, KUBELET_CGROUPS> = HashMap::new();

/// How many they are.
#[btf_map]
pub(crate) static KUBELETS_KNOWN: Array<u32, 1> = Array::new();

/// Connections that the kubelet has dialled and nobody has accepted yet, from its end, with the boot time in
/// nanoseconds. Those that nobody accepts on this node are worth nothing after two seconds, and give way to others.
#[btf_map]
pub(crate) static PROBES: LruHashMap<Connection, u64, 4096> = LruHashMap::new();

/// The boot time in nanoseconds until which `deaf_for_now` drops payload, at all sockets that have it.
#[btf_map]
pub(crate) static DEAF_UNTIL: Array<u64, 1> = Array::new();

/// What could not be recorded, by `ebb_common::LOST_…`.
#[btf_map]
pub(crate) static LOST: Array<u64, LOSSES> = Array::new();

/// The socket for which each CPU last had no storage: see `account::unrecorded`.
#[btf_map]
pub(crate) static LAST_LOST: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Listening ports met while seeding or auditing.
#[btf_map]
pub(crate) static LISTENERS: HashMap<ListenKey, u8, LISTENER_PLACES> = HashMap::new();

/// The ephemeral ports of each network namespace that is being seeded or audited.
#[btf_map]
pub(crate) static PORTS: HashMap<u32, EphemeralPorts, PORTS_PLACES> = HashMap::new();

/// What an earlier agent knew of the flows that are being seeded, by socket cookie. Made as large as that is.
#[btf_map]
pub(crate) static EARLIER: HashMap<u64, Remembered, 1, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// What an audit has found to be added to the counters.
#[btf_map]
pub(crate) static CORRECT: Array<Correction, CORRECTIONS> = Array::new();

#[unsafe(no_mangle)]
pub(crate) static OFFSETS: Global<Offsets> = Global::new(Offsets {
    sock_protocol: 0,
    sock_cgrp_data: 0,
    sock_cgroup_data_cgroup: 0,
    sock_cgroup_data_is_tagged: 0,
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

/// Whether there is anything in [`EARLIER`].
#[unsafe(no_mangle)]
pub(crate) static EARLIER_KNOWN: Global<u32> = Global::new(0);

/// The namespace in which pods are told apart by cgroup.
#[unsafe(no_mangle)]
pub(crate) static HOST_NETNS: Global<u32> = Global::new(0);
