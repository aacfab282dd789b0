//! Types that the BPF programs and the agent share: the layout of maps, events and read-only globals.
//!
//! Every type is `repr(C)`, has no implicit padding and only integers, so that any bit pattern is valid. Its size is
//! asserted, so that both sides agree on the layout.

#![no_std]

mod arrivals;
mod inspection;
mod offsets;
#[cfg(feature = "user")]
mod user;

use core::mem::size_of;

pub use arrivals::{Gap, KUBELET_CGROUPS, KubeletCgroups, PROBE_DIALS, ProbeDial, mapped};
pub use inspection::{
    INSPECTIONS, InspectQueries, InspectQuery, InspectResult, InspectResults, TUPLE_V4, TUPLE_V6,
    found,
};
pub use offsets::Offsets;

/// The kernel's numbers of the TCP states that the programs need (`include/net/tcp_states.h`).
pub mod tcp_state {
    #![allow(missing_docs, reason = "RFC 9293's names")]
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const CLOSING: u8 = 11;
}

/// Whether a connection in `state` is between its handshake and its end. A socket that the application still owns
/// may receive in FIN_WAIT2. One that the application has closed leaves FIN_WAIT2 at once (`tcp_time_wait`), unless it
/// may wait for the peer's FIN for longer than a minute (`TCP_LINGER2`, `net.ipv4.tcp_fin_timeout`): then it stays in
/// FIN_WAIT2 until the last minute (`tcp_rcv_state_process`) and counts as open, but a dump shows that it has no owner.
#[inline(always)]
pub const fn is_open(state: u8) -> bool {
    use tcp_state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
    const OPEN: u32 = 1 << ESTABLISHED
        | 1 << FIN_WAIT1
        | 1 << FIN_WAIT2
        | 1 << CLOSE_WAIT
        | 1 << LAST_ACK
        | 1 << CLOSING;
    OPEN >> (state & 31) & 1 != 0
}

/// Bits of `sk_userlocks` (include/net/sock.h).
pub mod user_locks {
    /// `SOCK_BINDPORT_LOCK`: the application bound the socket to a port. An accepted socket never has it
    /// (`sk_clone_lock` in net/core/sock.c).
    pub const BOUND_PORT: u8 = 8;
    /// `SOCK_CONNECT_BIND`: connect() chose the port. Older kernels do not have it.
    pub const BOUND_BY_CONNECT: u8 = 16;
}

/// Identifies the workload of a socket: the cgroup tells the container, the namespace tells the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct WorkloadKey {
    /// Cgroup v2 id of the process that created the socket, or the listener of an accepted socket.
    pub cgroup: u64,
    /// Inode number of the socket's network namespace.
    pub netns: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<WorkloadKey>() == 16);

/// How many workloads have counters.
pub const WORKLOADS_MAX: u32 = 8192;

/// Counters of one workload's accepted connections. They start at the first opening or closing that the programs see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Workload {
    /// How many were opened.
    pub opened: u64,
    /// How many were closed whose opening time is unknown, because their stamp was overwritten or they are older than
    /// the agent. All other closed connections are only counted in [`Self::lifetimes`].
    pub closed_unstamped: u64,
    /// Time of the last opening in jiffies, except those of the kubelet's probes and those from within the pod; 0 if
    /// there was none.
    pub last_opened: u64,
    /// Sum of the lifetimes of closed connections with a stamp, in [`TICK`]s.
    pub lifetime_ticks: u64,
    /// Histogram of these lifetimes. Bucket n has those of at most [`LIFETIMES_MS`]`[n]` that are longer than the
    /// bound before it; the last bucket has all longer ones.
    pub lifetimes: [u64; LIFETIMES_MS.len() + 1],
    /// The gaps between the openings that [`Self::last_opened`] counts.
    pub gap: Gap,
}
const _: () = assert!(size_of::<Workload>() == 136);

impl Workload {
    /// How many were closed, including those that are older than the counters.
    pub fn closed(&self) -> u64 {
        self.closed_unstamped + self.lifetimes.iter().sum::<u64>()
    }
}

/// The unit of [`Workload::lifetime_ticks`] in nanoseconds: about a millisecond, and a power of two, so that the
/// programs convert by a shift.
pub const TICK: u64 = 1 << TICK_SHIFT;

/// [`TICK`] as a power of two.
pub const TICK_SHIFT: u32 = 20;

/// The upper bounds of the histogram of lifetimes, in milliseconds.
pub const LIFETIMES_MS: [u64; 11] = [
    10, 100, 1_000, 5_000, 15_000, 30_000, 60_000, 300_000, 1_800_000, 7_200_000, 86_400_000,
];

/// How many slots the table of opening times has.
pub const STAMPS: usize = 1 << 18;

/// How many bits of a stamp are the time. The others are a tag.
const STAMP_TIME_BITS: u32 = 40;

/// Identifies a connection in the table of opening times. Uses fields that the socket keeps until the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StampKey {
    /// `skc_hash`, a hash of both addresses and both ports.
    pub hash: u32,
    /// `skc_daddr`.
    pub remote: u32,
    /// `skc_rcv_saddr`.
    pub local: u32,
    /// The peer's port.
    pub remote_port: u16,
}

/// `LOOPBACK4_IPV6` (include/net/ipv6.h): the value of `skc_daddr` if the peer's address is not IPv4. It may also be 0
/// then.
const NO_IPV4: u32 = u32::from_be(0x7f00_0006);

impl StampKey {
    /// The slot of the connection in the table. Consecutive ports of a peer have adjacent slots, so that the next
    /// connection finds its slot in the cache. IPv6 connections use the hash, because reading their addresses takes
    /// too long.
    #[inline(always)]
    pub const fn slot(self) -> u32 {
        let slot = if self.remote == NO_IPV4 || self.remote == 0 {
            self.hash
        } else {
            let peer = self.remote ^ self.local.rotate_left(16);
            // Fibonacci hashing: the upper bits depend on all input bits.
            (peer.wrapping_mul(0x9e37_79b1) >> 14).wrapping_add(self.remote_port as u32)
        };
        slot & (STAMPS as u32 - 1)
    }

    /// The stamp of the connection, opened at this time in jiffies.
    #[inline(always)]
    pub const fn stamp(self, jiffies: u64) -> u64 {
        self.tag() << STAMP_TIME_BITS | stamp_time(jiffies)
    }

    /// The [`stamp_time`] at which the connection was opened, if the stamp is that of this connection.
    #[inline(always)]
    pub const fn time_of(self, stamp: u64) -> Option<u64> {
        if stamp != 0 && stamp >> STAMP_TIME_BITS == self.tag() {
            Some(stamp_time(stamp))
        } else {
            None
        }
    }

    /// Tells connections that share a slot apart, by bits of the hash and the port that do not select the slot.
    #[inline(always)]
    const fn tag(self) -> u64 {
        let tag = self.hash >> 8 ^ self.remote_port as u32;
        tag as u64 & ((1 << (u64::BITS - STAMP_TIME_BITS)) - 1)
    }
}

/// The part of a time in jiffies that fits into a stamp: years.
#[inline(always)]
pub const fn stamp_time(jiffies: u64) -> u64 {
    jiffies & ((1 << STAMP_TIME_BITS) - 1)
}

/// The [`stamp_time`] of a dialled connection whose socket looks accepted, because it was accepted or has listened
/// before it was connected again.
pub const DIALLED: u64 = (1 << STAMP_TIME_BITS) - 1;

/// Makes `track` send events when accepted connections of a workload are opened and closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct WorkloadWatch {
    /// How many events there were since the watch began, including those that the full ring buffer dropped.
    pub sent: u64,
    /// Tells this watch from earlier watches of the same workload; never 0.
    pub number: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<WorkloadWatch>() == 16);

/// An accepted connection of a watched workload was opened or closed.
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
    /// The [`WorkloadWatch::number`] of the watch in which the event was counted.
    pub watch: u32,
    /// The pod's address; an IPv4 address is in the first four bytes.
    pub local_addr: [u8; 16],
    /// The peer's address, likewise.
    pub remote_addr: [u8; 16],
    /// The pod's port, in host byte order.
    pub local_port: u16,
    /// The peer's port, in host byte order.
    pub remote_port: u16,
    /// AF_INET (2) or AF_INET6 (10).
    pub family: u16,
    /// 1 if the connection was opened, 0 if it was closed.
    pub opened: u16,
}
const _: () = assert!(size_of::<FlowEvent>() == 72);

/// Index into the map of losses: events of watched workloads that were not sent because the ring buffer was full.
pub const LOST_EVENT: u32 = 0;
/// Index into the map of losses: changes that were not counted because the workload could not be inserted into its
/// map.
pub const LOST_COUNT: u32 = 1;
/// How many kinds of losses exist.
pub const LOSSES: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: StampKey = StampKey {
        hash: 0x1234_5678,
        remote: 0x0a00_0001,
        local: 0x0a00_0002,
        remote_port: 40_000,
    };

    #[test]
    fn consecutive_ports_of_a_peer_have_adjacent_slots_and_ipv6_uses_the_hash() {
        let next = StampKey {
            remote_port: 40_001,
            ..KEY
        };
        assert_eq!((KEY.slot() + 1) % STAMPS as u32, next.slot());
        let v6 = StampKey {
            remote: NO_IPV4,
            ..KEY
        };
        assert_eq!(v6.slot(), KEY.hash % STAMPS as u32);
    }

    #[test]
    fn a_stamp_is_only_valid_for_its_own_connection() {
        let stamp = KEY.stamp(7);
        assert_eq!(KEY.time_of(stamp), Some(7));
        assert_eq!(KEY.time_of(0), None);
        for other in [
            StampKey {
                hash: KEY.hash ^ 1 << 20,
                ..KEY
            },
            StampKey {
                remote_port: 1,
                ..KEY
            },
        ] {
            assert_eq!(other.time_of(stamp), None);
        }
    }

    #[test]
    fn a_connection_whose_lifetime_is_counted_counts_as_closed() {
        let mut workload = Workload {
            closed_unstamped: 2,
            ..Workload::default()
        };
        workload.lifetimes[3] = 5;
        assert_eq!(workload.closed(), 7);
    }
}
