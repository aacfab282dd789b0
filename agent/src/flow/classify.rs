//! From a [`Sample`] to a [`FlowState`].
//!
//! The question is always the same: would closing this connection now cut somebody off? Nothing that is
//! not known to be idle is called idle.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    origin::Origin,
    sample::{Sample, TcpState},
};

/// The longest that TCP delays an acknowledgement (`TCP_DELACK_MAX`, 200 ms, RFC 1122: 500 ms at most), and
/// shorter than the least time to a keep-alive probe (1 s).
const DELAYED_ACK: Duration = Duration::from_millis(500);

/// What a flow is doing. Everything but [`FlowState::Idle`] is live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowState {
    /// Handshake done, the application has not accepted it yet.
    Backlog,
    /// Bytes moved within `idle-after`, or bytes wait in a queue.
    Active,
    /// The peer spoke last and the pod has not answered, however long ago.
    Awaiting,
    /// The pod spoke last, everything is acknowledged, quiet for `idle-after`.
    Idle,
    /// The pod closed; its FIN or data is not acknowledged yet.
    Flushing,
    /// The peer closed its side and the pod has not.
    HalfClosed,
}

impl FlowState {
    /// All states, in the order in which tables show them.
    pub const ALL: [Self; 6] = [
        Self::Backlog,
        Self::Active,
        Self::Awaiting,
        Self::Idle,
        Self::Flushing,
        Self::HalfClosed,
    ];

    /// In the middle of something.
    pub const fn is_live(self) -> bool {
        !matches!(self, Self::Idle)
    }

    /// The state's name, as in the CLI, in JSON and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Backlog => "backlog",
            Self::Active => "active",
            Self::Awaiting => "awaiting",
            Self::Idle => "idle",
            Self::Flushing => "flushing",
            Self::HalfClosed => "half-closed",
        }
    }
}

impl fmt::Display for FlowState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What the flow is doing, or `None` where there is no flow (any more): listeners, handshakes under way,
/// and FIN_WAIT2 and TIME_WAIT, in which everything the pod sent has arrived.
pub fn classify(s: &Sample, idle_after: Duration) -> Option<FlowState> {
    match s.state {
        // A child that fast open made, which may be accepted before its handshake is done. Request sockets
        // show as SYN_RECV too, but have no record.
        TcpState::SynRecv if !matches!(s.origin, Origin::Accepted(_)) => None,
        TcpState::SynRecv if s.inode != 0 => Some(established(s, idle_after)),
        TcpState::SynRecv => Some(FlowState::Backlog),
        TcpState::Established | TcpState::CloseWait if s.inode == 0 => Some(FlowState::Backlog),
        TcpState::Established => Some(established(s, idle_after)),
        TcpState::CloseWait if is_quiet(s, idle_after) => Some(FlowState::Idle),
        TcpState::CloseWait => Some(FlowState::HalfClosed),
        TcpState::FinWait1 | TcpState::Closing | TcpState::LastAck => Some(FlowState::Flushing),
        TcpState::SynSent
        | TcpState::NewSynRecv
        | TcpState::FinWait2
        | TcpState::TimeWait
        | TcpState::Close
        | TcpState::Listen => None,
    }
}

fn established(s: &Sample, idle_after: Duration) -> FlowState {
    if !is_quiet(s, idle_after) {
        FlowState::Active
    } else if pod_spoke_last(s) {
        FlowState::Idle
    } else {
        FlowState::Awaiting
    }
}

/// Nothing in either queue and no byte either way for `idle_after`.
fn is_quiet(s: &Sample, idle_after: Duration) -> bool {
    s.payload_unread() == 0 && s.unacked == 0 && s.since_sent.min(s.since_received) >= idle_after
}

/// The last byte went from the pod to the peer.
///
/// The kernel's times have jiffy resolution, so a fast answer carries the same time as its request, and
/// so does a request that follows hard upon the previous answer. What tells them apart is the peer's
/// acknowledgement: a request carries it along, an answer is followed by it, bare and within the time for
/// which acknowledgements are delayed. A later one may answer a keep-alive probe of the pod's instead, which
/// says nothing, so it does not count. After a probe the only trace of the first is the time at which data was
/// acknowledged, if that is not the request's own jiffy ([`Sample::set_bare_ack`]).
fn pod_spoke_last(s: &Sample) -> bool {
    if s.bytes_acked == 0 {
        // Nobody, or only the peer, has said anything.
        return false;
    }
    s.since_sent < s.since_received
        || (s.since_sent == s.since_received
            && s.bare_ack
            && s.since_received.saturating_sub(s.since_ack) <= DELAYED_ACK)
}

#[cfg(test)]
mod tests;
