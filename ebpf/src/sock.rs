//! Reading the kernel's socket structures at the offsets that user space resolved.
//!
//! All reads go through `bpf_probe_read_kernel`: a wrong address reads as an error, never as a fault.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_probe_read_kernel;
use ebb_common::WorkloadKey;

use crate::maps::OFFSETS;

/// A pointer to a kernel `struct sock`, as a program got it.
#[derive(Clone, Copy)]
pub(crate) struct Sock(pub(crate) *const c_void);

impl Sock {
    fn read<T>(self, offset: u32) -> Option<T> {
        read(self.0.wrapping_byte_add(offset as usize))
    }

    pub(crate) fn protocol(self) -> Option<u16> {
        self.read(OFFSETS.load().sock_protocol)
    }

    pub(crate) fn family(self) -> Option<u16> {
        self.read(OFFSETS.load().sock_common_family)
    }

    pub(crate) fn state(self) -> Option<u8> {
        self.read(OFFSETS.load().sock_common_state)
    }

    /// `tcp_sock.rcv_nxt`: the sequence number after the last byte received in order.
    pub(crate) fn received_up_to(self) -> Option<u32> {
        self.read(OFFSETS.load().tcp_sock_rcv_nxt)
    }

    /// `tcp_sock.snd_wl1`: the sequence number of the segment that last updated the send window.
    pub(crate) fn window_updated_by(self) -> Option<u32> {
        self.read(OFFSETS.load().tcp_sock_snd_wl1)
    }

    /// `tcp_sock.delivered_mstamp`: when the peer last acknowledged data, in microseconds of the monotonic clock.
    pub(crate) fn delivered_at(self) -> Option<u64> {
        self.read(OFFSETS.load().tcp_sock_delivered_mstamp)
    }

    /// `tcp_sock.tcp_mstamp`: when it last sent or received anything, likewise.
    pub(crate) fn touched_at(self) -> Option<u64> {
        self.read(OFFSETS.load().tcp_sock_tcp_mstamp)
    }

    /// The local port by `skc_num`: right for listeners and open flows, 0 when closing.
    pub(crate) fn num(self) -> Option<u16> {
        self.read(OFFSETS.load().sock_common_num)
    }

    /// The local port by `inet_sport`, which survives the close.
    pub(crate) fn local_port(self) -> Option<u16> {
        self.read(OFFSETS.load().inet_sock_sport).map(u16::from_be)
    }

    pub(crate) fn remote_port(self) -> Option<u16> {
        self.read(OFFSETS.load().sock_common_dport)
            .map(u16::from_be)
    }

    pub(crate) fn local_v4(self) -> Option<[u8; 4]> {
        self.read(OFFSETS.load().sock_common_rcv_saddr)
    }

    pub(crate) fn remote_v4(self) -> Option<[u8; 4]> {
        self.read(OFFSETS.load().sock_common_daddr)
    }

    pub(crate) fn local_v6(self) -> Option<[u8; 16]> {
        self.read(OFFSETS.load().sock_common_v6_rcv_saddr)
    }

    pub(crate) fn remote_v6(self) -> Option<[u8; 16]> {
        self.read(OFFSETS.load().sock_common_v6_daddr)
    }

    pub(crate) fn netns(self) -> Option<u32> {
        let o = OFFSETS.load();
        let net: *const c_void = self.read(o.sock_common_net)?;
        read(net.wrapping_byte_add(o.net_ns_inum as usize))
    }

    /// `sk->sk_cgrp_data.cgroup->kn->id`. From 5.15 the first field is a plain pointer; before it shares
    /// its word with cgroup v1 data, marked by the lowest bit, and then there is no cgroup v2 to name.
    pub(crate) fn cgroup(self) -> Option<u64> {
        let o = OFFSETS.load();
        let cgroup: *const c_void = self.read(o.sock_cgrp_data + o.sock_cgroup_data_cgroup)?;
        if cgroup.is_null() || cgroup.addr() & 1 == 1 {
            return Some(0);
        }
        let kn: *const c_void = read(cgroup.wrapping_byte_add(o.cgroup_kn as usize))?;
        read(kn.wrapping_byte_add(o.kernfs_node_id as usize))
    }

    pub(crate) fn workload(self) -> Option<WorkloadKey> {
        Some(WorkloadKey {
            cgroup: self.cgroup()?,
            netns: self.netns()?,
            zero: 0,
        })
    }
}

fn read<T>(from: *const c_void) -> Option<T> {
    // SAFETY: the helper checks the address; every `T` read here is made of integers or a raw pointer.
    unsafe { bpf_probe_read_kernel(from.cast::<T>()) }.ok()
}
