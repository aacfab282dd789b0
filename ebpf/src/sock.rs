//! Reading the kernel's socket structures at the offsets that user space resolved.
//!
//! What lies in `struct sock` itself, and behind its typed pointers, is loaded: the verifier knows the type of each
//! pointer, and the offset from frozen globals, and rejects a program in which they don't fit; where a pointer turns
//! out to be null, the load gives 0. The rest (more than a word, or fields of what `struct sock` is only the beginning
//! of) goes through `bpf_probe_read_kernel`, which costs a call: a wrong address reads as an error, never as a fault.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_probe_read_kernel;
use ebb_common::{Offsets, WorkloadKey};

use crate::maps::OFFSETS;

/// One of [`OFFSETS`]. `Global::load` would load all of them for it.
macro_rules! offset {
    ($field:ident) => {{
        // A `Global` is transparent.
        let offsets = (&raw const OFFSETS).cast::<Offsets>();
        // SAFETY: an aligned field of a static that nobody writes once the program runs.
        unsafe { (&raw const (*offsets).$field).read_volatile() }
    }};
}

/// A pointer to a kernel `struct sock`, as a program got it from its context or from `bpf_skc_to_tcp_sock`.
#[derive(Clone, Copy)]
pub(crate) struct Sock(pub(crate) *const c_void);

impl Sock {
    /// A number or a typed pointer in `struct sock` itself.
    #[inline(always)]
    fn load<T: Copy>(self, offset: u32) -> T {
        load(self.0, offset)
    }

    /// More than a word, or a field of what `struct sock` is only the beginning of.
    fn read<T>(self, offset: u32) -> Option<T> {
        read(self.0.wrapping_byte_add(offset as usize))
    }

    pub(crate) fn protocol(self) -> u16 {
        self.load(offset!(sock_protocol))
    }

    pub(crate) fn family(self) -> u16 {
        self.load(offset!(sock_common_family))
    }

    pub(crate) fn state(self) -> u8 {
        self.load(offset!(sock_common_state))
    }

    /// `tcp_sock.rcv_nxt`: the sequence number after the last byte received in order.
    pub(crate) fn received_up_to(self) -> Option<u32> {
        self.read(offset!(tcp_sock_rcv_nxt))
    }

    /// `tcp_sock.snd_wl1`: the sequence number of the segment that last updated the send window.
    pub(crate) fn window_updated_by(self) -> Option<u32> {
        self.read(offset!(tcp_sock_snd_wl1))
    }

    /// `tcp_sock.delivered_mstamp`: when the peer last acknowledged data, in microseconds of the monotonic clock.
    pub(crate) fn delivered_at(self) -> Option<u64> {
        self.read(offset!(tcp_sock_delivered_mstamp))
    }

    /// `tcp_sock.tcp_mstamp`: when it last sent or received anything, likewise.
    pub(crate) fn touched_at(self) -> Option<u64> {
        self.read(offset!(tcp_sock_tcp_mstamp))
    }

    /// The local port by `skc_num`: right for listeners and open flows, 0 when closing.
    pub(crate) fn num(self) -> u16 {
        self.load(offset!(sock_common_num))
    }

    /// The local port by `inet_sport`, which survives the close.
    pub(crate) fn local_port(self) -> Option<u16> {
        self.read(offset!(inet_sock_sport)).map(u16::from_be)
    }

    pub(crate) fn remote_port(self) -> u16 {
        u16::from_be(self.load(offset!(sock_common_dport)))
    }

    pub(crate) fn local_v4(self) -> [u8; 4] {
        u32::to_ne_bytes(self.load(offset!(sock_common_rcv_saddr)))
    }

    pub(crate) fn remote_v4(self) -> [u8; 4] {
        u32::to_ne_bytes(self.load(offset!(sock_common_daddr)))
    }

    pub(crate) fn local_v6(self) -> Option<[u8; 16]> {
        self.read(offset!(sock_common_v6_rcv_saddr))
    }

    pub(crate) fn remote_v6(self) -> Option<[u8; 16]> {
        self.read(offset!(sock_common_v6_daddr))
    }

    #[inline(always)]
    pub(crate) fn netns(self) -> u32 {
        load(self.load(offset!(sock_common_net)), offset!(net_ns_inum))
    }

    /// `sk->sk_cgrp_data.cgroup->kn->id`; 0 where there is no cgroup v2 to name.
    #[inline(always)]
    pub(crate) fn cgroup(self) -> u64 {
        let cgroup = offset!(sock_cgrp_data) + offset!(sock_cgroup_data_cgroup);
        if offset!(sock_cgroup_data_is_tagged) != 0 {
            return self.tagged_cgroup(cgroup).unwrap_or(0);
        }
        let kn: *const c_void = load(self.load(cgroup), offset!(cgroup_kn));
        load(kn, offset!(kernfs_node_id))
    }

    /// Likewise, on kernels before 5.15: the pointer shares its word with cgroup v1 data, marked by the lowest bit, and
    /// has no type by which the verifier would let a program follow it.
    fn tagged_cgroup(self, offset: u32) -> Option<u64> {
        let cgroup: u64 = self.read(offset)?;
        if cgroup == 0 || cgroup & 1 == 1 {
            return None;
        }
        let kn = read_at(cgroup, offset!(cgroup_kn))?;
        read_at(kn, offset!(kernfs_node_id))
    }

    #[inline(always)]
    pub(crate) fn workload(self) -> WorkloadKey {
        WorkloadKey {
            cgroup: self.cgroup(),
            netns: self.netns(),
            zero: 0,
        }
    }
}

/// A number or a pointer in a kernel structure of which the verifier knows the type.
#[inline(always)]
fn load<T: Copy>(structure: *const c_void, offset: u32) -> T {
    // SAFETY: the verifier checks pointer, offset and size; every `T` loaded here is an integer or a pointer that is
    // only loaded from in turn.
    unsafe {
        structure
            .wrapping_byte_add(offset as usize)
            .cast::<T>()
            .read_volatile()
    }
}

fn read_at<T>(address: u64, offset: u32) -> Option<T> {
    read(core::ptr::without_provenance(
        (address + u64::from(offset)) as usize,
    ))
}

fn read<T>(from: *const c_void) -> Option<T> {
    // SAFETY: the helper checks the address; every `T` read here is made of integers.
    unsafe { bpf_probe_read_kernel(from.cast::<T>()) }.ok()
}
