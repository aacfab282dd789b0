//! From a [`Sample`] to a [`FlowState`].
//!
//! A flow is idle only if closing it now is certain to interrupt no request or response. In doubt it is live.

use std::time::Duration;

use super::{
    FlowState,
    origin::Origin,
    sample::{Sample, TcpState},
};
use crate::policy::Outbound;

/// The longest delay of an acknowledgement (`TCP_DELACK_MAX` is 200 ms; RFC 1122 allows 500 ms). Shorter than the
/// shortest keep-alive interval (1 s).
const DELAYED_ACK: Duration = Duration::from_millis(500);

/// What [`classify`] depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassifyOptions {
    /// A flow can be idle when no byte has moved for this long.
    pub idle_after: Duration,
    /// A flow is lost when its peer has not answered retransmissions for this long.
    pub peer_timeout: Duration,
    /// An accepted connection on which neither side has sent anything can be idle. Without this, the pod may have to
    /// speak first.
    pub silent_is_idle: bool,
    /// Which dialled flows are not exempt.
    pub outbound: Outbound,
}

#[cfg(any(test, feature = "testing"))]
impl From<Duration> for ClassifyOptions {
    /// The default policy with this `idle_after`.
    fn from(idle_after: Duration) -> Self {
        crate::policy::Policy {
            idle_after,
            ..crate::policy::Policy::default()
        }
        .classify_options()
    }
}

/// What the flow is doing. `None` if the socket is no flow: a listener, a handshake under way, TIME_WAIT, or
/// FIN_WAIT2 of a socket that the application has closed (the peer has everything that it sent, and it reads no
/// more).
///
/// A socket that `inspect` could not read is live, because sock_diag alone does not show which side sent last.
pub fn classify(s: &Sample, options: &ClassifyOptions) -> Option<FlowState> {
    match by_state(s, options) {
        // Every state but these waits for the peer.
        Some(state)
            if state != FlowState::Backlog && s.unanswered_for() >= Some(options.peer_timeout) =>
        {
            Some(FlowState::Lost)
        }
        Some(FlowState::Idle) if s.origin == Origin::Unknown => Some(FlowState::Awaiting),
        state => state,
    }
}

fn by_state(s: &Sample, options: &ClassifyOptions) -> Option<FlowState> {
    let idle_after = options.idle_after;
    match s.state {
        TcpState::SynRecv if s.origin == Origin::Dialled => None,
        // A TCP fast open child, which the application has accepted before the handshake is done.
        TcpState::SynRecv if s.inode != 0 => Some(established(s, options)),
        // sock_diag shows request sockets as SYN_RECV, too. They have no inode, and `inspect` can't read them.
        TcpState::SynRecv if s.origin == Origin::Unknown => None,
        TcpState::SynRecv => Some(FlowState::Backlog),
        TcpState::Established | TcpState::CloseWait if s.inode == 0 => Some(FlowState::Backlog),
        TcpState::Established => Some(established(s, options)),
        // The application has closed its side and may go on reading, an upload for example.
        TcpState::FinWait2 if s.inode == 0 => None,
        TcpState::CloseWait | TcpState::FinWait2 if is_quiet(s, idle_after) => {
            Some(FlowState::Idle)
        }
        TcpState::FinWait2 => Some(FlowState::Active),
        TcpState::CloseWait => Some(FlowState::HalfClosed),
        TcpState::FinWait1 | TcpState::Closing | TcpState::LastAck => Some(FlowState::Flushing),
        TcpState::SynSent
        | TcpState::NewSynRecv
        | TcpState::TimeWait
        | TcpState::Close
        | TcpState::Listen => None,
    }
}

fn established(s: &Sample, options: &ClassifyOptions) -> FlowState {
    if !is_quiet(s, options.idle_after) {
        FlowState::Active
    } else if pod_spoke_last(s) || (options.silent_is_idle && is_silent(s)) {
        FlowState::Idle
    } else {
        FlowState::Awaiting
    }
}

/// Both queues are empty, and no byte moved in either direction for `idle_after`.
fn is_quiet(s: &Sample, idle_after: Duration) -> bool {
    s.payload_unread() == 0 && s.unacked == 0 && s.since_sent.min(s.since_received) >= idle_after
}

/// Whether neither side has sent a byte. The end that dialled counts the acknowledgement of its SYN as a byte.
fn is_silent(s: &Sample) -> bool {
    s.origin == Origin::Accepted && s.bytes_received == 0 && s.bytes_acked == 0
}

/// Whether the pod sent the last byte.
///
/// The kernel's times have jiffy resolution. So "sent" and "received" are the same time both when the pod answers
/// fast and when the peer sends a request right after the previous answer. The peer's last acknowledgement decides:
/// it comes with a request, but after an answer the peer sends it without data, within the time for which TCP delays
/// acknowledgements. A later one does not count, because it may answer a keep-alive probe of the pod. After a probe,
/// the time at which data was last acknowledged decides, if it is not in the same jiffy as the request
/// ([`Sample::set_bare_ack`]).
fn pod_spoke_last(s: &Sample) -> bool {
    if s.bytes_acked == 0 {
        // The pod has sent nothing.
        return false;
    }
    s.since_sent < s.since_received
        || (s.since_sent == s.since_received
            && s.bare_ack
            && s.since_received.saturating_sub(s.since_ack) <= DELAYED_ACK)
}

#[cfg(test)]
mod tests;
