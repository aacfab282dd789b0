//! What goes into the machine and what comes out.

use std::net::SocketAddr;

use crate::{
    clock::BootTime,
    drain::report::ReleaseReason,
    flow::{Flow, Snapshot},
    ids::{PodName, SocketCookie},
};

/// What happened.
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
    /// The look that was asked for.
    Looked(Snapshot),
    /// The look that was asked for failed; the text says why.
    LookFailed(String),
    /// The lookups that were asked for: those of the flows that are still there. No edge that the kernel had
    /// counted when it was asked is outstanding.
    LookedUp(Snapshot),
    /// The lookups that were asked for are worth nothing, because edges were outstanding; those have arrived.
    Outdated,
    /// The lookups that were asked for tell nothing: edges are missing, or the kernel does not say.
    Unclear,
    /// Those of the flows that were to be closed have been told to close; the others had moved.
    IdleClosed(Vec<SocketCookie>),
    /// Edges were lost.
    Lost,
    /// The pod's flows can't be seen (any more); the text says why.
    Untracked(String),
    /// Another hold has joined, with this deadline.
    Limit(BootTime),
    /// Somebody wants the drain to end.
    ReleaseNow,
    /// The agent is stopping.
    Shutdown,
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Look at the pod's flows, and answer with [`Event::Looked`] or [`Event::LookFailed`]. There is
    /// never more than one such request open.
    Look,
    /// Look up these flows alone, and answer with [`Event::LookedUp`], [`Event::Outdated`] or
    /// [`Event::Unclear`]. Counts as a look: one request at a time.
    LookUp(Vec<Ends>),
    /// Close these idle flows, those that have not moved since, and answer with [`Event::IdleClosed`].
    CloseIdle(Vec<Flow>),
    /// Release all holds. Comes once; the report is final.
    Release(ReleaseReason),
}

/// What names a flow to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ends {
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
    /// The pod.
    pub pod: PodName,
    /// When the drain began, for people (RFC 3339, UTC).
    pub started_at: String,
    /// What was wrong with the pod's annotations.
    pub warnings: Vec<String>,
}
