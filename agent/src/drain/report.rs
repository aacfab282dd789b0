//! The report of a drain: what a user is told, and what every view is made of.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::policy::Until;
use crate::{
    flow::{FlowCounts, FlowState},
    ids::PodName,
};

/// Where a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting until no new inbound flow has arrived for `quiet`.
    Settle,
    /// Waiting until no flow holds any more.
    Drain,
    /// Over.
    Released,
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseReason {
    /// The pod has drained, by its policy's `until`.
    Drained,
    /// The deadline passed first.
    Deadline,
    /// Somebody said so (`ebb release`).
    Manual,
    /// The pod is not known to be terminating.
    NotTerminating,
    /// The pod's flows can't be seen, or could not any more; the settle time was kept.
    Untracked,
    /// The agent stopped.
    Shutdown,
}

impl ReleaseReason {
    /// The reason as in the CLI, in JSON and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drained => "drained",
            Self::Deadline => "deadline",
            Self::Manual => "manual",
            Self::NotTerminating => "not-terminating",
            Self::Untracked => "untracked",
            Self::Shutdown => "shutdown",
        }
    }
}

impl std::fmt::Display for ReleaseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// How the kernel's tables were looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LookKind {
    /// All connections of the node, to find those of the pod.
    Walk,
    /// Exact lookups of the few flows that matter.
    Lookup,
}

/// One change of the drain's picture, with the flows that held at that moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Milliseconds since the drain began.
    pub at_ms: u64,
    /// The phase from then on.
    pub phase: Phase,
    /// The flows that held, by state.
    pub flows: FlowCounts,
}

/// A flow that was still open when the hold was released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutFlow {
    /// The peer.
    pub remote: SocketAddr,
    /// The pod's end.
    pub local: SocketAddr,
    /// What it was doing.
    pub state: FlowState,
    /// Milliseconds since it was opened, where known.
    pub age_ms: Option<u64>,
    /// Bytes from the peer.
    pub bytes_in: u64,
    /// Bytes to the peer.
    pub bytes_out: u64,
}

/// A peer that opened flows after the drain had begun: it, or the balancer before it, has not heard yet
/// that the pod is going.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatePeer {
    /// Its address.
    pub address: IpAddr,
    /// How many flows it opened.
    pub flows: u32,
}

/// A drain, under way or over. All times count from its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The pod.
    pub pod: PodName,
    /// When it began (RFC 3339, UTC).
    pub started_at: String,
    /// Where it is.
    pub phase: Phase,
    /// Why it ended; absent while it is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReleaseReason>,
    /// More about the reason, for people: what can't be tracked and why, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What it waits for.
    pub until: Until,
    /// How long it has been held, in milliseconds.
    pub held_ms: u64,
    /// The latest moment of release, in milliseconds.
    pub deadline_ms: u64,
    /// Calls and requests that wait for it now.
    pub holds: u32,
    /// Flows that held at the beginning. Absent as long as nobody could look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_at_start: Option<FlowCounts>,
    /// Flows that hold, at the last look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_now: Option<FlowCounts>,
    /// The picture at the beginning and at each change, oldest first; at most 256.
    pub changes: Vec<Change>,
    /// Flows that arrived while it was under way. Absent as long as nobody could look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived: Option<u32>,
    /// Flows that ended by themselves. Absent as long as nobody could look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u32>,
    /// Idle flows that ebb closed (`idle-flows: close`); they are among those that ended.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub idle_closed: u32,
    /// Flows that were still open at the release, and so are cut by the stop that follows; the first 256.
    pub cut: Vec<CutFlow>,
    /// How many were. Absent if nobody could look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_total: Option<u32>,
    /// Peers that still connected, busiest first; at most 64.
    pub late_peers: Vec<LatePeer>,
    /// Settle is over, and flows still arrived: not all have heard that the pod is going.
    #[serde(default, skip_serializing_if = "is_false")]
    pub still_arriving: bool,
    /// From the kernel's stamp on the last close to the release, in microseconds, where a close was what
    /// ended the drain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_lag_us: Option<u64>,
    /// The look that released it, where one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_by: Option<LookKind>,
    /// Walks that were made for it.
    #[serde(default)]
    pub walks: u32,
    /// Rounds of lookups that were made for it.
    #[serde(default)]
    pub lookups: u32,
    /// What was wrong with the pod's policy: annotations that could not be obeyed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_false(b: &bool) -> bool {
    !*b
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::ids::PodUid;

    /// Of shop/web (`u1`), which had 41 flows.
    pub(crate) fn report(reason: Option<ReleaseReason>) -> Report {
        Report {
            pod: PodName {
                uid: PodUid::new("u1"),
                namespace: "shop".into(),
                name: "web".into(),
            },
            started_at: "2026-01-01T00:00:00Z".into(),
            phase: Phase::Released,
            reason,
            detail: None,
            until: Until::Zero,
            held_ms: 8200,
            deadline_ms: 25_000,
            holds: 1,
            flows_at_start: Some(FlowCounts {
                active: 40,
                idle: 1,
                ..FlowCounts::default()
            }),
            flows_now: None,
            changes: vec![],
            arrived: Some(2),
            ended: Some(43),
            idle_closed: 0,
            cut: vec![],
            cut_total: Some(0),
            late_peers: vec![],
            still_arriving: false,
            release_lag_us: None,
            released_by: None,
            walks: 1,
            lookups: 0,
            warnings: vec![],
        }
    }
}
