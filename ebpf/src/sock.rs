//! Reads the kernel's socket structures at the offsets that user space resolved.
//!
//! Fields of the structure that a pointer is typed for, and what its typed pointers lead to, are loaded directly. The
//! verifier knows the type of each pointer and the offset from the frozen globals, and rejects a program in which
//! they do not match. A load through a null pointer returns 0.
//!
//! Other fields are read by `bpf_probe_read_kernel`, which costs a call: those of more than a word, and those of a
//! structure that `struct sock` is only the beginning of. A wrong address then is an error and not a fault.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_probe_read_kernel;
use ebb_common::{StampKey, WorkloadKey, mapped};

/// The address family of IPv4.
pub(crate) const AF_INET: u16 = 2;

/// One field of [`OFFSETS`]. `Global::load` would load all of them.
macro_rules! offset {
    ($field:ident) => {{
        // A `Global` is transparent.
        let offsets = (&raw const crate::maps::OFFSETS).cast::<ebb_common::Offsets>();
        // SAFETY: an aligned field of a static that is frozen before the program runs.
        unsafe { (&raw const (*offsets).$field).read_volatile() }
    }};
}
pub(crate) use offset;

/// A pointer to a kernel socket, from the context of a program (`struct sock`) or from `bpf_skc_to_tcp_sock` (`struct
/// tcp_sock`, which begins with all the others).
#[derive(Clone, Copy)]
pub(crate) struct Sock(pub(crate) *const c_void);

impl Sock {
    /// Loads a number or a typed pointer from the structure that the pointer is typed for.
    #[inline(always)]
    pub(crate) fn load<T: Copy>(self, offset: u32) -> T {
        load(self.0, offset)
    }

    /// Reads more than a word, or a field of a structure that `struct sock` is only the beginning of.
    fn read<T>(self, offset: u32) -> Option<T> {
        read(self.0.wrapping_byte_add(offset as usize))
    }

    #[inline(always)]
    pub(crate) fn protocol(self) -> u16 {
        self.load(offset!(sock_protocol))
    }

    /// `sk_max_ack_backlog`: an accepted socket has that of its listener.
    #[inline(always)]
    pub(crate) fn backlog(self) -> u32 {
        self.load(offset!(sock_max_ack_backlog))
    }

    /// `sk_userlocks`: see `ebb_common::user_locks`.
    #[inline(always)]
    pub(crate) fn user_locks(self) -> u8 {
        let byte: u8 = self.load(offset!(sock_userlocks));
        (u32::from(byte) >> offset!(sock_userlocks_shift) & offset!(sock_userlocks_mask)) as u8
    }

    #[inline(always)]
    pub(crate) fn family(self) -> u16 {
        self.load(offset!(sock_common_family))
    }

    /// Identifies the connection in the table of opening times, until after it is closed.
    #[inline(always)]
    pub(crate) fn stamp_key(self) -> StampKey {
        StampKey {
            hash: self.load(offset!(sock_common_hash)),
            remote: self.load(offset!(sock_common_daddr)),
            local: self.load(offset!(sock_common_rcv_saddr)),
            remote_port: self.remote_port(),
        }
    }

    /// Whether the application has a file for the socket.
    #[inline(always)]
    pub(crate) fn is_owned(self) -> bool {
        let socket: *const c_void = self.load(offset!(sock_socket));
        !socket.is_null()
    }

    /// The inode number of the application's file for the socket; 0 if it has none. The inode lies behind the `struct
    /// socket` that the pointer is typed for.
    #[inline(always)]
    pub(crate) fn inode(self) -> u32 {
        let socket: *const c_void = self.load(offset!(sock_socket));
        if socket.is_null() {
            return 0;
        }
        let number: Option<u64> = read(socket.wrapping_byte_add(offset!(socket_inode) as usize));
        number.unwrap_or(0) as u32
    }

    /// The local port from `inet_sport`, which the kernel keeps when the connection is closed.
    pub(crate) fn local_port(self) -> Option<u16> {
        self.read(offset!(inet_sock_sport)).map(u16::from_be)
    }

    #[inline(always)]
    pub(crate) fn remote_port(self) -> u16 {
        u16::from_be(self.load(offset!(sock_common_dport)))
    }

    pub(crate) fn local_v4(self) -> [u8; 4] {
        u32::to_ne_bytes(self.load(offset!(sock_common_rcv_saddr)))
    }

    pub(crate) fn remote_v4(self) -> [u8; 4] {
        u32::to_ne_bytes(self.load(offset!(sock_common_daddr)))
    }

    /// The local address. An IPv4 address is mapped.
    #[inline(always)]
    pub(crate) fn local(self) -> Option<[u64; 2]> {
        if self.family() == AF_INET {
            return Some(mapped(self.load(offset!(sock_common_rcv_saddr))));
        }
        self.read(offset!(sock_common_v6_rcv_saddr))
    }

    /// The peer's address, likewise.
    #[inline(always)]
    pub(crate) fn remote(self) -> Option<[u64; 2]> {
        if self.family() == AF_INET {
            return Some(mapped(self.load(offset!(sock_common_daddr))));
        }
        self.read(offset!(sock_common_v6_daddr))
    }

    /// Whether both ends have the same address, or the peer's is one of the IPv4 loopback. Most IPv6 addresses differ in
    /// the last byte, and reading them whole takes long.
    #[inline(always)]
    pub(crate) fn has_one_address(self) -> bool {
        if self.family() == AF_INET {
            let (local, remote): (u32, u32) = (
                self.load(offset!(sock_common_rcv_saddr)),
                self.load(offset!(sock_common_daddr)),
            );
            return u32::from_be(remote) >> 24 == 127 || local == remote;
        }
        let local: u8 = self.load(offset!(sock_common_v6_rcv_saddr) + 15);
        let remote: u8 = self.load(offset!(sock_common_v6_daddr) + 15);
        if local != remote {
            return false;
        }
        let Some([local, local_end]) = self.read::<[u64; 2]>(offset!(sock_common_v6_rcv_saddr))
        else {
            return false;
        };
        let Some([remote, remote_end]) = self.read::<[u64; 2]>(offset!(sock_common_v6_daddr))
        else {
            return false;
        };
        local == remote && local_end == remote_end
    }

    pub(crate) fn local_v6(self) -> Option<[u8; 16]> {
        self.read(offset!(sock_common_v6_rcv_saddr))
    }

    pub(crate) fn remote_v6(self) -> Option<[u8; 16]> {
        self.read(offset!(sock_common_v6_daddr))
    }

    #[inline(always)]
    fn netns(self) -> u32 {
        load(self.load(offset!(sock_common_net)), offset!(net_ns_inum))
    }

    /// `sk->sk_cgrp_data.cgroup->kn->id`; 0 if the socket has no cgroup of v2.
    #[inline(always)]
    pub(crate) fn cgroup(self) -> u64 {
        let cgroup = offset!(sock_cgrp_data) + offset!(sock_cgroup_data_cgroup);
        let kn: *const c_void = load(self.load(cgroup), offset!(cgroup_kn));
        load(kn, offset!(kernfs_node_id))
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

/// Loads a number or a pointer from a kernel structure whose type the verifier knows.
#[inline(always)]
pub(crate) fn load<T: Copy>(structure: *const c_void, offset: u32) -> T {
    // SAFETY: the verifier checks pointer, offset and size. Every `T` here is an integer, or a pointer that is only
    // used to load from.
    unsafe {
        structure
            .wrapping_byte_add(offset as usize)
            .cast::<T>()
            .read_volatile()
    }
}

fn read<T>(from: *const c_void) -> Option<T> {
    // SAFETY: the helper checks the address. Every `T` here consists of integers.
    unsafe { bpf_probe_read_kernel(from.cast::<T>()) }.ok()
}
