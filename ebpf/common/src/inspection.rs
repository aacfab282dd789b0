//! The queries of the program `inspect`, and its results.

use core::mem::size_of;

/// How many connections one run of the program looks up.
pub const INSPECTIONS: usize = 64;

/// A connection to look up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct InspectQuery {
    /// `struct bpf_sock_tuple`: the addresses and ports of a packet that the connection receives, in network byte
    /// order: remote address, local address, remote port, local port. [`TUPLE_V4`] bytes for IPv4.
    pub tuple: [u8; TUPLE_V6],
    /// How many bytes of `tuple` are used; 0 ends the queries.
    pub size: u32,
}
const _: () = assert!(size_of::<InspectQuery>() == 40);

impl InspectQuery {
    /// Ends the queries.
    pub const NONE: Self = Self {
        tuple: [0; TUPLE_V6],
        size: 0,
    };
}

/// The size of an IPv4 tuple.
pub const TUPLE_V4: usize = 12;
/// The size of an IPv6 tuple.
pub const TUPLE_V6: usize = 36;

/// The queries of a run.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct InspectQueries {
    /// The first one with a size of 0 ends them.
    pub each: [InspectQuery; INSPECTIONS],
}
const _: () = assert!(size_of::<InspectQueries>() == 40 * INSPECTIONS);

/// Values of [`InspectResult::found`].
pub mod found {
    /// No socket with these addresses, or only one that is bound to an interface.
    pub const NOTHING: u8 = 0;
    /// A socket that is not read: a request socket, a TIME_WAIT socket, or one that is not plain TCP.
    pub const OTHER: u8 = 1;
    /// A connection, or the listener of the port.
    pub const CONNECTION: u8 = 2;
}

/// What the kernel stores about one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct InspectResult {
    /// `skc_cookie`; 0 if the socket has none yet.
    pub cookie: u64,
    /// As in [`WorkloadKey`](crate::WorkloadKey).
    pub cgroup: u64,
    /// The [`stamp_time`](crate::stamp_time) at which it was accepted, or [`DIALLED`](crate::DIALLED); 0 if unknown.
    pub opened_at: u64,
    /// `bytes_received`.
    pub bytes_received: u64,
    /// `bytes_acked`.
    pub bytes_acked: u64,
    /// `delivered_mstamp`: when the peer last acknowledged data, in microseconds of the monotonic clock.
    pub delivered_at: u64,
    /// The monotonic clock when this was read, in nanoseconds.
    pub now: u64,
    /// `jiffies_64` when this was read. The next three fields are the lower half of `jiffies_64` at other times.
    pub jiffies: u64,
    /// `lsndtime`: when data was last sent.
    pub sent_at: u32,
    /// `icsk_ack.lrcvtime`: when data was last received.
    pub received_at: u32,
    /// `rcv_tstamp`: when an acknowledgement was last received.
    pub acked_at: u32,
    /// `sk_max_ack_backlog`.
    pub backlog: u32,
    /// `rcv_nxt`: the sequence number after the last byte received in order.
    pub rcv_nxt: u32,
    /// `copied_seq`: the sequence number of the first byte that the application has not read.
    pub copied_seq: u32,
    /// `snd_wl1`: the sequence number of the segment that last updated the send window.
    pub snd_wl1: u32,
    /// `write_seq`: the sequence number after the last byte written.
    pub write_seq: u32,
    /// `snd_una`: the sequence number of the first byte that is not acknowledged.
    pub snd_una: u32,
    /// The inode number of the application's file for the socket; 0 if the application has not accepted it yet, or has
    /// closed it.
    pub inode: u32,
    /// `icsk_rto`: the retransmission timeout, in jiffies.
    pub rto: u32,
    /// One of [`found`].
    pub found: u8,
    /// `skc_state`.
    pub state: u8,
    /// `sk_userlocks`.
    pub locks: u8,
    /// 1 if the socket has a bind bucket, from which the next field is read.
    pub bound: u8,
    /// `fastreuse` of the bind bucket: negative if connect() created it.
    pub fast_reuse: i8,
    /// `icsk_retransmits`: retransmissions that the peer has not acknowledged.
    pub retransmits: u8,
    /// `icsk_probes_out`: probes that the peer has not answered.
    pub probes: u8,
    /// `icsk_backoff`: how often the timeout was doubled.
    pub backoff: u8,
    /// Zero.
    pub zero: [u8; 4],
}
const _: () = assert!(size_of::<InspectResult>() == 120);

/// The results of a run.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct InspectResults {
    /// In the order of the queries.
    pub each: [InspectResult; INSPECTIONS],
}
const _: () = assert!(size_of::<InspectResults>() == 120 * INSPECTIONS);
