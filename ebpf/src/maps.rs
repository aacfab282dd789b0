//! Maps and read-only globals.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, RingBuf},
    macros::btf_map,
};
use ebb_common::{
    FlowEvent, INSPECTIONS, InspectQueries, InspectResults, KubeletCgroups, LOSSES, Offsets,
    PROBE_DIALS, ProbeDial, STAMPS, WORKLOADS_MAX, Workload, WorkloadKey, WorkloadWatch,
};

/// Counters by workload. The agent removes those whose cgroup is gone. When the map is full, changes of further
/// workloads are counted as lost (`LOST_COUNT`). An LRU map would evict counters in silence, and the agent would take a
/// busy pod for one without clients.
#[btf_map]
pub(crate) static WORKLOADS: HashMap<WorkloadKey, Workload, { WORKLOADS_MAX as usize }> =
    HashMap::new();

/// Opening times of connections: see `ebb_common::StampKey`.
#[btf_map]
pub(crate) static OPENED_AT: Array<u64, STAMPS> = Array::new();

/// The workloads whose events `track` sends: `{cgroup: 0, netns}` for a pod with its own network namespace,
/// `{cgroup, netns: 0}` for a pod on the host network. Not preallocated, because it is nearly always empty.
#[btf_map]
pub(crate) static WATCHED: HashMap<
    WorkloadKey,
    WorkloadWatch,
    4096,
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// The kubelet's cgroups, by which `track` knows its probes.
#[btf_map]
pub(crate) static KUBELET: Array<KubeletCgroups, 1> = Array::new();

/// The probes that the kubelet has just dialled.
#[btf_map]
pub(crate) static PROBES: Array<ProbeDial, PROBE_DIALS> = Array::new();

/// How many workloads are watched.
#[btf_map]
pub(crate) static WATCHED_COUNT: Array<u32, 1> = Array::new();

/// Events of watched workloads. 2^19 bytes hold about 6,500 of them.
#[btf_map]
pub(crate) static EVENTS: RingBuf<FlowEvent, 524288> = RingBuf::new();

/// How many events and counts were lost, by `ebb_common::LOST_…`.
#[btf_map]
pub(crate) static LOST: Array<u64, LOSSES> = Array::new();

/// The queries of the next run of `inspect`.
#[btf_map]
pub(crate) static QUERIES: Array<InspectQueries, 1> = Array::new();

/// One element per query of a run, for `bpf_for_each_map_elem` to visit. The values are not used.
#[btf_map]
pub(crate) static SLOTS: Array<u32, INSPECTIONS> = Array::new();

/// The results of the last run of `inspect`.
#[btf_map]
pub(crate) static RESULTS: Array<InspectResults, 1> = Array::new();

/// The boot time in nanoseconds until which `drop_payload_for_now` drops payload, for all sockets that it is attached
/// to.
#[btf_map]
pub(crate) static DROP_UNTIL: Array<u64, 1> = Array::new();

#[unsafe(no_mangle)]
pub(crate) static OFFSETS: Global<Offsets> = Global::new(Offsets {
    sock_protocol: 0,
    sock_cgrp_data: 0,
    sock_cgroup_data_cgroup: 0,
    sock_max_ack_backlog: 0,
    sock_userlocks: 0,
    sock_userlocks_shift: 0,
    sock_userlocks_mask: 0,
    sock_socket: 0,
    cgroup_kn: 0,
    kernfs_node_id: 0,
    sock_common_net: 0,
    net_ns_inum: 0,
    sock_common_family: 0,
    sock_common_state: 0,
    sock_common_hash: 0,
    sock_common_cookie: 0,
    sock_common_dport: 0,
    sock_common_daddr: 0,
    sock_common_rcv_saddr: 0,
    sock_common_v6_daddr: 0,
    sock_common_v6_rcv_saddr: 0,
    inet_sock_sport: 0,
    icsk_bind_hash: 0,
    icsk_ack_lrcvtime: 0,
    icsk_rto: 0,
    icsk_retransmits: 0,
    icsk_probes_out: 0,
    icsk_backoff: 0,
    bind_bucket_fastreuse: 0,
    tcp_sock_rcv_nxt: 0,
    tcp_sock_copied_seq: 0,
    tcp_sock_snd_wl1: 0,
    tcp_sock_write_seq: 0,
    tcp_sock_snd_una: 0,
    tcp_sock_lsndtime: 0,
    tcp_sock_rcv_tstamp: 0,
    tcp_sock_bytes_received: 0,
    tcp_sock_bytes_acked: 0,
    tcp_sock_delivered_mstamp: 0,
    socket_inode: 0,
});

/// The length of a jiffy in nanoseconds.
#[unsafe(no_mangle)]
pub(crate) static JIFFY: Global<u64> = Global::new(0);

/// The host's network namespace, in which the cgroup identifies the pod.
#[unsafe(no_mangle)]
pub(crate) static HOST_NETNS: Global<u32> = Global::new(0);
