//! Offsets of the kernel fields that the programs read.

use core::mem::size_of;

/// Offsets in bytes from the start of each structure. Resolved from the running kernel's BTF, because rustc emits no
/// CO-RE relocations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "the kernel's own names: structure, field")]
pub struct Offsets {
    pub sock_protocol: u32,
    pub sock_cgrp_data: u32,
    pub sock_cgroup_data_cgroup: u32,
    pub sock_max_ack_backlog: u32,
    pub sock_userlocks: u32,
    /// Not an offset: by how many bits `sk_userlocks` is shifted in its byte. It is a bit field on older kernels.
    pub sock_userlocks_shift: u32,
    /// Not an offset: the mask of `sk_userlocks`, after the shift.
    pub sock_userlocks_mask: u32,
    pub sock_socket: u32,
    pub cgroup_kn: u32,
    pub kernfs_node_id: u32,
    pub sock_common_net: u32,
    pub net_ns_inum: u32,
    pub sock_common_family: u32,
    pub sock_common_state: u32,
    pub sock_common_hash: u32,
    pub sock_common_cookie: u32,
    pub sock_common_dport: u32,
    pub sock_common_daddr: u32,
    pub sock_common_rcv_saddr: u32,
    pub sock_common_v6_daddr: u32,
    pub sock_common_v6_rcv_saddr: u32,
    pub inet_sock_sport: u32,
    pub icsk_bind_hash: u32,
    pub icsk_ack_lrcvtime: u32,
    pub icsk_rto: u32,
    pub icsk_retransmits: u32,
    pub icsk_probes_out: u32,
    pub icsk_backoff: u32,
    pub bind_bucket_fastreuse: u32,
    pub tcp_sock_rcv_nxt: u32,
    pub tcp_sock_copied_seq: u32,
    pub tcp_sock_snd_wl1: u32,
    pub tcp_sock_write_seq: u32,
    pub tcp_sock_snd_una: u32,
    pub tcp_sock_lsndtime: u32,
    pub tcp_sock_rcv_tstamp: u32,
    pub tcp_sock_bytes_received: u32,
    pub tcp_sock_bytes_acked: u32,
    pub tcp_sock_delivered_mstamp: u32,
    /// From a `struct socket` to the number of its inode. Both are in one allocation (`struct socket_alloc`).
    pub socket_inode: u32,
}
const _: () = assert!(size_of::<Offsets>() == 160);
