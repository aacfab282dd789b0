//! One socket as the kernel described it at one moment.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

use super::origin::Origin;
use crate::ids::{CgroupId, SocketCookie};

/// Who opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Passive open: accepted (or about to be) by the pod.
    Inbound,
    /// Active open: dialled by the pod.
    Outbound,
}

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
    /// A request socket: the handshake is not done.
    NewSynRecv = 12,
}

impl TryFrom<u8> for TcpState {
    type Error = u8;

    /// Gives the number back if the kernel has a state that this list does not.
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

/// One TCP socket, from one sock_diag reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The kernel's identity of the socket.
    pub cookie: SocketCookie,
    /// The pod's end. IPv4-mapped IPv6 addresses are given as IPv4.
    pub local: SocketAddr,
    /// The other end, likewise.
    pub remote: SocketAddr,
    /// TCP state.
    pub state: TcpState,
    /// Bytes received that the application has not read (`idiag_rqueue`; the peer's FIN is one more). For a
    /// listener: connections waiting to be accepted.
    pub unread: u32,
    /// Bytes written that the peer has not acknowledged, sent or not (`idiag_wqueue`). For a listener:
    /// the longest accept queue.
    pub unacked: u32,
    /// Its inode number; 0 if no process has a descriptor of it: not accepted yet, or closed.
    pub inode: u32,
    /// Payload bytes received (`tcpi_bytes_received`; a FIN adds 1).
    pub bytes_received: u64,
    /// Payload bytes acknowledged by the peer (`tcpi_bytes_acked`).
    pub bytes_acked: u64,
    /// Time since data was last sent (`tcpi_last_data_sent`, at jiffy resolution).
    pub since_sent: Duration,
    /// Time since data was last received (`tcpi_last_data_recv`).
    pub since_received: Duration,
    /// Time since an acknowledgement last arrived (`tcpi_last_ack_recv`), the answers to keep-alive probes
    /// included; see [`Self::set_bare_ack`].
    pub since_ack: Duration,
    /// The last segment from the peer was an acknowledgement without data: what the pod said before it has
    /// been said after the peer's last byte. Only looked for where the times do not tell ([`Self::is_tie`]).
    pub bare_ack: bool,
    /// A connection to ebb's own listener in the pod, not to the pod.
    pub to_wait_port: bool,
    /// The cgroup whose process made the socket, where the kernel tells (5.9 and later).
    pub cgroup: Option<CgroupId>,
    /// Who opened it, as far as is known.
    pub origin: Origin,
}

impl Sample {
    /// Payload bytes from the peer: the kernel counts the peer's FIN as one more.
    pub const fn payload_received(&self) -> u64 {
        let fin = matches!(
            self.state,
            TcpState::CloseWait | TcpState::LastAck | TcpState::Closing
        );
        self.bytes_received.saturating_sub(fin as u64)
    }

    /// Payload bytes that the application has not read. The peer's FIN comes after all of them, and counts as one
    /// more until the application has read the end of the stream (`tcp_diag_get_info` in net/ipv4/tcp_diag.c,
    /// `tcp_fin` in net/ipv4/tcp_input.c).
    pub const fn payload_unread(&self) -> u32 {
        let fin = matches!(self.state, TcpState::CloseWait);
        self.unread.saturating_sub(fin as u32)
    }

    /// Notes that the last segment from the peer was an acknowledgement without data, and that data was last
    /// acknowledged `since_delivery` ago.
    ///
    /// Where that is certain to be after the last byte from the peer, what acknowledged it was bare as well, and
    /// its time says more than that of a later answer to a probe.
    pub fn set_bare_ack(&mut self, since_delivery: Duration) {
        self.bare_ack = true;
        if since_delivery + CERTAIN < self.since_received {
            self.since_ack = since_delivery;
        }
    }

    /// The times do not tell who spoke last: an established connection, at rest, whose last byte each way
    /// moved within the same jiffy. Where the pod never said anything that was heard, there is nothing to tell.
    pub fn is_tie(&self) -> bool {
        self.state == TcpState::Established
            && self.bytes_acked > 0
            && self.unread == 0
            && self.unacked == 0
            && self.since_sent == self.since_received
            && self.since_sent >= AT_REST
    }
}

/// Longer than a jiffy is on any kernel (10 ms), by which the time since the last byte can be wrong.
pub const CERTAIN: Duration = Duration::from_millis(20);

/// No `idle-after` is shorter.
const AT_REST: Duration = Duration::from_millis(100);

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// An accepted connection that has only just been made.
    pub(crate) fn sample() -> Sample {
        Sample {
            cookie: SocketCookie(1),
            local: ([10, 0, 0, 2], 80).into(),
            remote: ([10, 0, 0, 9], 5000).into(),
            state: TcpState::Established,
            unread: 0,
            unacked: 0,
            inode: 1,
            bytes_received: 0,
            bytes_acked: 0,
            since_sent: Duration::ZERO,
            since_received: Duration::ZERO,
            since_ack: Duration::ZERO,
            bare_ack: false,
            to_wait_port: false,
            cgroup: None,
            origin: Origin::Unknown,
        }
    }
}
