//! The machine's input, [`Event`], and its output, [`Action`].

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{
    arrivals::Arrivals,
    clock::BootTime,
    drain_report::{DumpReason, ReleaseReason},
    flow::{Flow, Snapshot},
    ids::{PodName, SocketCookie},
    notification::{Notification, NotificationOutcome},
    policy::{HoldLimit, PortsInUse},
    release::DeadlineCause,
};

/// An input of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A flow that may hold was opened.
    FlowOpened {
        /// Its socket.
        cookie: SocketCookie,
        /// The pod's end.
        local: SocketAddr,
        /// The peer.
        remote: SocketAddr,
        /// The kernel's stamp.
        at: BootTime,
    },
    /// A flow ended.
    FlowClosed {
        /// Its socket.
        cookie: SocketCookie,
        /// The kernel's stamp.
        at: BootTime,
    },
    /// The dump that was requested.
    Dumped(Snapshot),
    /// The dump that was requested failed, for this reason.
    DumpFailed(String),
    /// How often clients connected before the drain.
    Arrivals(Arrivals),
    /// The lookups that were requested: those of the flows that are still there. No event that the kernel had
    /// counted when it was asked is outstanding.
    LookedUp(Snapshot),
    /// The lookups that were requested prove nothing, because events were outstanding; those have arrived.
    Outdated,
    /// The lookups that were requested decide nothing; only a dump can.
    Unclear(DumpReason),
    /// ebb has closed these idle flows; it skipped those on which bytes had moved.
    IdleClosed(Vec<SocketCookie>),
    /// Whether the pod is known to end and its stop is held: then the machine may send notifications.
    Stopping(bool),
    /// Whether the pod may live on: then the machine closes no idle flow, whatever the policy says.
    MayLiveOn(bool),
    /// The notification that was to be sent was sent, or failed.
    Notified(NotificationOutcome),
    /// Events were lost.
    Lost,
    /// ebb can't see the pod's flows (any more), for this reason.
    Untracked(String),
    /// The pod may have connections without sockets of its own, for this reason. Comes before the snapshot.
    Hidden(String),
    /// The ports that the pod uses. Comes before the first snapshot.
    PortsInUse(PortsInUse),
    /// The pod's containers have exited, at these moments. Only an observed drain ends by it.
    Exited(Vec<BootTime>),
    /// The drain may last until this moment only. No effect if the deadline is already earlier.
    Limit(Deadline),
    /// The drain ends now: an operator or the agent's stop ends it, or the pod does not terminate.
    Release(ReleaseReason),
    /// Time has passed.
    Tick,
}

/// An output of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Dump the pod's flows, and answer with [`Event::Dumped`] or [`Event::DumpFailed`]. There is
    /// never more than one such request open.
    Dump,
    /// Look up these flows alone, and answer with [`Event::LookedUp`], [`Event::Outdated`] or
    /// [`Event::Unclear`]. The machine never has two requests open.
    LookUp(Vec<FlowEndpoints>),
    /// Close those of these idle flows on which no byte has moved since, and answer with [`Event::IdleClosed`].
    CloseIdle(Vec<Flow>),
    /// Send this notification to the application, and answer with [`Event::Notified`] soon. Each comes once.
    Notify(Notification),
    /// Release all holds. Comes once; the report is final.
    Release(ReleaseReason),
}

/// The latest moment of release, and what it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadline {
    /// When the release comes at the latest.
    #[serde(rename = "deadline")]
    pub at: BootTime,
    /// What it comes from.
    #[serde(default, rename = "deadline_cause")]
    pub cause: DeadlineCause,
}

impl Deadline {
    /// A hold that begins at `start` and has this limit.
    pub fn of(start: BootTime, limit: HoldLimit) -> Self {
        Self {
            at: start + limit.after,
            cause: limit.cause,
        }
    }

    /// The earlier of two.
    pub fn min(self, other: Self) -> Self {
        if other.at < self.at { other } else { self }
    }
}

/// How the kernel finds a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowEndpoints {
    /// Its socket.
    pub cookie: SocketCookie,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
}

/// What a drain is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The pod that drains.
    pub pod: PodName,
    /// The controller that created it, if any.
    pub workload: Option<String>,
    /// When the drain began, for people (RFC 3339, UTC).
    pub started_at: String,
    /// What was wrong with the pod's annotations.
    pub warnings: Vec<String>,
    /// The trace of the call that began the drain (`traceparent` of W3C Trace Context), if it had one.
    pub traceparent: Option<String>,
}
