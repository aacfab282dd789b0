//! The kernel's data about one socket at one moment.

use std::{net::SocketAddr, time::Duration};

use super::origin::Origin;
use crate::ids::{CgroupId, SocketCookie};

/// TCP states by the kernel's numbers (`include/net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "RFC 9293's names")]
pub enum TcpState {
    Established = 1,
    SynSent = 2,
    SynRecv = 3,
    FinWait1 = 4,
    FinWait2 = 5,
    TimeWait = 6,
    Close = 7,
    CloseWait = 8,
    LastAck = 9,
    Listen = 10,
    Closing = 11,
    /// A request socket, whose handshake is not done.
    NewSynRecv = 12,
}

impl TryFrom<u8> for TcpState {
    type Error = u8;

    /// Returns the number if it is not in this list.
    fn try_from(n: u8) -> Result<Self, u8> {
        Ok(match n {
            1 => Self::Established,
            2 => Self::SynSent,
            3 => Self::SynRecv,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            12 => Self::NewSynRecv,
            n => return Err(n),
        })
    }
}

/// One TCP socket: sock_diag lists it, and `inspect` adds details from the socket itself if it can read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The kernel's id of the socket.
    pub cookie: SocketCookie,
    /// The pod's end. IPv4-mapped IPv6 addresses become IPv4.
    pub local: SocketAddr,
    /// The peer's end, likewise.
    pub remote: SocketAddr,
    /// TCP state.
    pub state: TcpState,
    /// Bytes received that the application has not read (`idiag_rqueue`; the peer's FIN is one more). For a
    /// listener: connections waiting to be accepted.
    pub unread: u32,
    /// Bytes written that the peer has not acknowledged, sent or not (`idiag_wqueue`). For a listener:
    /// the longest accept queue.
    pub unacked: u32,
    /// Its inode number; 0 if no process has a descriptor of it, because it is not accepted yet or is closed.
    pub inode: u32,
    /// The index of the interface that it is bound to; 0 if none.
    pub interface: u32,
    /// Payload bytes received (`tcpi_bytes_received`; a FIN adds 1).
    pub bytes_received: u64,
    /// Payload bytes acknowledged by the peer (`tcpi_bytes_acked`).
    pub bytes_acked: u64,
    /// Time since data was last sent (`tcpi_last_data_sent`, at jiffy resolution).
    pub since_sent: Duration,
    /// Time since data was last received (`tcpi_last_data_recv`).
    pub since_received: Duration,
    /// Time since an acknowledgement last arrived (`tcpi_last_ack_recv`), including answers to keep-alive probes; see
    /// [`Self::set_bare_ack`].
    pub since_ack: Duration,
    /// Retransmissions and window probes without an answer yet.
    pub retransmissions: Retransmissions,
    /// The first sequence numbers of both directions, if `inspect` could read the socket.
    pub sequence: Option<SequenceStart>,
    /// The last segment from the peer was an acknowledgement without data, so the pod sent the acknowledged bytes
    /// after the peer's last byte.
    pub bare_ack: bool,
    /// A connection to ebb's own listener in the pod's namespace.
    pub to_wait_port: bool,
    /// The kubelet dialled it.
    pub probe: bool,
    /// Time since the handshake, if `track` saw it and its stamp is still there.
    pub age: Option<Duration>,
    /// The cgroup whose process made the socket, if the kernel reports it (5.9 and later).
    pub cgroup: Option<CgroupId>,
    /// Which side opened it.
    pub origin: Origin,
}

impl Sample {
    /// A socket of which nothing else is known: no byte has moved, and its origin is unknown.
    pub const fn new(
        cookie: SocketCookie,
        local: SocketAddr,
        remote: SocketAddr,
        state: TcpState,
    ) -> Self {
        Self {
            cookie,
            local,
            remote,
            state,
            unread: 0,
            unacked: 0,
            inode: 0,
            interface: 0,
            bytes_received: 0,
            bytes_acked: 0,
            since_sent: Duration::ZERO,
            since_received: Duration::ZERO,
            since_ack: Duration::ZERO,
            retransmissions: Retransmissions::NONE,
            sequence: None,
            bare_ack: false,
            to_wait_port: false,
            probe: false,
            age: None,
            cgroup: None,
            origin: Origin::Unknown,
        }
    }

    /// Whether a process of the pod listens on it, and not ebb.
    pub fn is_listener_of_pod(&self) -> bool {
        self.state == TcpState::Listen && !self.to_wait_port
    }

    /// Payload bytes from the peer, without the peer's FIN, which the kernel counts as one byte.
    pub const fn payload_received(&self) -> u64 {
        let fin = matches!(
            self.state,
            TcpState::CloseWait | TcpState::LastAck | TcpState::Closing
        );
        self.bytes_received.saturating_sub(fin as u64)
    }

    /// Payload bytes that the application has not read. The kernel counts the peer's FIN as one more until the
    /// application has read the end of the stream (`tcp_diag_get_info` in net/ipv4/tcp_diag.c, `tcp_fin` in
    /// net/ipv4/tcp_input.c).
    pub const fn payload_unread(&self) -> u32 {
        let fin = matches!(self.state, TcpState::CloseWait);
        self.unread.saturating_sub(fin as u32)
    }

    /// For how long, at least, the peer has not answered although the kernel sends again and again; `None` if nothing
    /// waits for an answer. Only data counts: the kernel itself ends a connection whose keep-alive probes fail.
    pub fn unanswered_for(&self) -> Option<Duration> {
        let r = self.retransmissions;
        let lasted = r.lasted().filter(|_| self.unacked > 0)?;
        // Retransmissions count as sent; window probes may carry no data, and then do not.
        let since_last = if r.retransmits > 0 {
            self.since_sent
        } else {
            Duration::ZERO
        };
        // A peer that answers, even if it acknowledges nothing new, is there.
        Some((lasted + since_last).min(self.since_ack))
    }

    /// Records that the last segment from the peer was an acknowledgement without data, and that the peer last
    /// acknowledged data `since_delivery` ago.
    ///
    /// If that was certainly after the peer's last byte, that acknowledgement had no data either. Its time then
    /// replaces the time of the last acknowledgement, which may be a later answer to a probe.
    pub fn set_bare_ack(&mut self, since_delivery: Duration) {
        self.bare_ack = true;
        if since_delivery + CERTAIN < self.since_received {
            self.since_ack = since_delivery;
        }
    }
}

/// What a socket sends again and again, without an answer yet (`struct inet_connection_sock`, and `tcp_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retransmissions {
    /// Retransmissions since the peer last acknowledged new data (`icsk_retransmits`).
    pub retransmits: u8,
    /// Probes since the peer last sent an acknowledgement (`icsk_probes_out`). They ask for the peer's window, or, if no
    /// data waits, whether it is alive.
    pub probes: u8,
    /// How often the timeout was doubled (`icsk_backoff`).
    pub backoff: u8,
    /// The retransmission timeout, doubled already. That of window probes is doubled `backoff` times more.
    pub rto: Duration,
}

/// The longest timeout (`TCP_RTO_MAX` in include/net/tcp.h).
const RTO_MAX: Duration = Duration::from_secs(120);

impl Retransmissions {
    /// Nothing is sent again.
    pub const NONE: Self = Self {
        retransmits: 0,
        probes: 0,
        backoff: 0,
        rto: Duration::ZERO,
    };

    /// How long the kernel has been sending, at least, from the first transmission without an answer to the last; `None`
    /// if it does not send anything again.
    ///
    /// The kernel stores the present timeout and how often it was doubled. So the timeout before was at least half of
    /// it, the one before that a quarter, and their sum is how long ago the first transmission was
    /// (`tcp_retransmit_timer` and `tcp_probe_timer` in net/ipv4/tcp_timer.c).
    fn lasted(self) -> Option<Duration> {
        let sum = |timeout: Duration, doublings: u8| {
            timeout.saturating_sub(timeout / (1 << doublings.min(16)))
        };
        if self.retransmits > 0 {
            // After an answer without a new round-trip time, the kernel keeps the doublings of an earlier outage.
            Some(sum(self.rto, self.backoff.min(self.retransmits)))
        } else if self.probes > 0 {
            let timeout = self.rto * (1 << self.backoff.min(16));
            let earlier = self.probes - 1;
            Some(sum(timeout.min(RTO_MAX), self.backoff.min(earlier)))
        } else {
            None
        }
    }
}

/// The sequence number of the first byte of each direction, or one less. Both ends of one connection have the same:
/// addresses may be translated on the way, sequence numbers are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceStart {
    /// Of what this end sends.
    pub sent: u32,
    /// Of what it receives.
    pub received: u32,
}

impl SequenceStart {
    /// Whether these are the two ends of one connection. The end that dialled counts the acknowledgement of its SYN as a
    /// byte (`tcp_rcv_synsent_state_process` in net/ipv4/tcp_input.c), so numbers may differ by one.
    ///
    /// The kernel chooses both numbers at random, so the chance that two connections agree is one in 10^18.
    pub const fn is_other_end_of(self, other: Self) -> bool {
        const fn is_near(a: u32, b: u32) -> bool {
            a.wrapping_sub(b).wrapping_add(1) <= 2
        }
        is_near(self.sent, other.received) && is_near(self.received, other.sent)
    }
}

/// More than the longest jiffy (10 ms), by which the time since the last byte can be wrong.
const CERTAIN: Duration = Duration::from_millis(20);

/// Samples for tests, also those of other crates.
#[cfg(any(test, feature = "testing"))]
pub mod testing {
    use super::*;

    /// An accepted connection that has just opened.
    pub fn sample() -> Sample {
        Sample {
            inode: 1,
            origin: Origin::Accepted,
            ..Sample::new(
                SocketCookie(1),
                ([10, 0, 0, 2], 80).into(),
                ([10, 0, 0, 9], 5000).into(),
                TcpState::Established,
            )
        }
    }
}
