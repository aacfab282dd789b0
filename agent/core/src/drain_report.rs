//! The report of a drain. The drain machine writes it; the CLI, the JSON of `ebb-protocol`, metrics and Events show
//! it.

#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

pub use crate::release::{DeadlineCause, ReleaseReason};
use crate::{
    flow::{FlowCounts, FlowState},
    format::duration,
    ids::PodName,
    notification::Notified,
    policy::Until,
};

/// The phase of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting until no new inbound flow has arrived for [`SettleReport::quiet_ms`].
    Settle,
    /// Waiting until no flow holds any more.
    Drain,
    /// The drain is over.
    Released,
}

impl Phase {
    /// The name in JSON and traces.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Settle => "settle",
            Self::Drain => "drain",
            Self::Released => "released",
        }
    }
}

/// Why the settle phase waits for a silence of this length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum SettleRule {
    /// The pod's or the node's policy sets it.
    Set,
    /// It is the default, because ebb does not know how often clients connect to the pod.
    Unknown,
    /// It is some of the pod's usual gaps between connections.
    Gap,
    /// Clients rarely or never connect to the pod.
    Rare,
    /// Nothing listens in the pod.
    NoListener,
}

/// What the settle phase waits for, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SettleReport {
    /// The silence that ends the phase, in milliseconds.
    pub quiet_ms: u64,
    /// Why.
    pub rule: SettleRule,
    /// How long the silence between two connections usually is, in milliseconds, if the rule goes by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap_ms: Option<u64>,
}

impl fmt::Display for SettleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quiet = duration(self.quiet_ms);
        match (self.rule, self.gap_ms) {
            (SettleRule::Set, _) => write!(f, "{quiet} of silence, as set"),
            (SettleRule::Gap, Some(gap)) => {
                write!(f, "{quiet} of silence, where {} is usual", duration(gap))
            }
            (SettleRule::Rare, Some(_)) => write!(f, "{quiet} of silence, clients rarely connect"),
            (SettleRule::Rare, None) => write!(f, "{quiet} of silence, no client has connected"),
            (SettleRule::NoListener, _) => write!(f, "none, nothing listens"),
            (SettleRule::Unknown | SettleRule::Gap, _) => {
                write!(f, "{quiet} of silence, the default")
            }
        }
    }
}

/// How ebb found that no flow holds the drain any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ReleasedBy {
    /// A dump of the pod's sockets.
    #[serde(rename = "walk")]
    Dump,
    /// Lookups of the flows that were left.
    Lookup,
}

/// Why a drain dumped the sockets of its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum DumpReason {
    /// The drain began.
    First,
    /// The settle phase was over.
    SettleOver,
    /// The ring buffer had no space for events.
    EventsLost,
    /// Events that the kernel sent did not arrive in time.
    EventsLate,
    /// The kernel did not run `track` for some state changes.
    ChangesMissed,
    /// A server of the pod may use TCP fast open, whose connections carry data before `track` reports them.
    FastOpen,
    /// A lookup of the flows failed.
    LookupFailed,
    /// There were too many flows to look them up one by one.
    ManyFlows,
    /// Events and the kernel's socket table did not agree.
    Disagreement,
    /// Flows may have become idle.
    Idle,
    /// The last dump was some seconds ago.
    Resync,
    /// The deadline was near.
    Deadline,
    /// The previous dump failed.
    Retry,
    /// Connections that the pod dialled hold as well, of which no event tells.
    Outbound,
}

impl DumpReason {
    /// All reasons.
    pub const ALL: [Self; 14] = [
        Self::First,
        Self::SettleOver,
        Self::EventsLost,
        Self::EventsLate,
        Self::ChangesMissed,
        Self::FastOpen,
        Self::LookupFailed,
        Self::ManyFlows,
        Self::Disagreement,
        Self::Idle,
        Self::Resync,
        Self::Deadline,
        Self::Retry,
        Self::Outbound,
    ];

    /// The reason as in JSON and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::SettleOver => "settle-over",
            Self::EventsLost => "events-lost",
            Self::EventsLate => "events-late",
            Self::ChangesMissed => "changes-missed",
            Self::FastOpen => "fast-open",
            Self::LookupFailed => "lookup-failed",
            Self::ManyFlows => "many-flows",
            Self::Disagreement => "disagreement",
            Self::Idle => "idle",
            Self::Resync => "resync",
            Self::Deadline => "deadline",
            Self::Retry => "retry",
            Self::Outbound => "outbound",
        }
    }
}

/// A change of the phase or of the flows that hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FlowsChange {
    /// Milliseconds since the drain began.
    pub at_ms: u64,
    /// The phase after the change.
    pub phase: Phase,
    /// The flows that hold after it, by state.
    pub flows: FlowCounts,
}

/// A flow that was still open when the hold was released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CutFlow {
    /// The peer.
    pub remote: SocketAddr,
    /// The pod of the node, or `node`, that has this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The pod's end.
    pub local: SocketAddr,
    /// What it was doing.
    pub state: FlowState,
    /// Milliseconds since it was opened, if known.
    pub age_ms: Option<u64>,
    /// The lower bound of that time, if it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_at_least_ms: Option<u64>,
    /// Bytes from the peer.
    pub bytes_in: u64,
    /// Bytes to the peer.
    pub bytes_out: u64,
}

/// A peer that opened flows after the drain began: it, or a load balancer in front of it, still sends connections to
/// the terminating pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LatePeer {
    /// Its address.
    pub address: IpAddr,
    /// The pod of the node, or `node`, that has this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// How many flows it opened.
    pub flows: u32,
}

impl CutFlow {
    /// The peer's address, and its name if it has one: `10.88.0.5:40123 (shop/client-0)`.
    pub fn peer_text(&self) -> String {
        with_name(&self.remote, self.peer.as_deref())
    }
}

impl LatePeer {
    /// Its address, and its name if it has one.
    pub fn peer_text(&self) -> String {
        with_name(&self.address, self.peer.as_deref())
    }
}

impl Report {
    /// Sets the names of the peers.
    pub fn name_peers(&mut self, name: impl Fn(IpAddr) -> Option<String>) {
        for flow in &mut self.cut {
            flow.peer = name(flow.remote.ip());
        }
        for peer in &mut self.late_peers {
            peer.peer = name(peer.address);
        }
    }
}

fn with_name(address: &impl fmt::Display, name: Option<&str>) -> String {
    match name {
        Some(name) => format!("{address} ({name})"),
        None => address.to_string(),
    }
}

/// A drain, under way or over. Durations count from its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Report {
    /// The pod.
    pub pod: PodName,
    /// The Deployment, StatefulSet, DaemonSet, CronJob or Job that created the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// When it began (RFC 3339, UTC).
    pub started_at: String,
    /// ebb held nothing (`ebb.dev/drain: observe`). `held_ms` is how long it would have held the pod, or if `reason` is
    /// `exited`, how long it would have at least.
    #[serde(default, skip_serializing_if = "is_false")]
    pub observed: bool,
    /// The trace of the first call that had one (`traceparent` of W3C Trace Context): the kubelet's, if it traces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Its phase.
    pub phase: Phase,
    /// Why it was released; absent while it is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReleaseReason>,
    /// Details of the reason as text, such as what ebb can't track and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What it waits for.
    pub until: Until,
    /// How long it has held, in milliseconds.
    pub held_ms: u64,
    /// The latest moment of release, in milliseconds.
    pub deadline_ms: u64,
    /// What that moment comes from.
    #[serde(default)]
    pub deadline_cause: DeadlineCause,
    /// Calls and requests that wait for it now.
    pub holds: u32,
    /// Flows that held at the beginning. Absent until ebb has seen them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_at_start: Option<FlowCounts>,
    /// Flows that hold, as of the last dump or lookup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_now: Option<FlowCounts>,
    /// The beginning and each change, oldest first; at most 256.
    pub changes: Vec<FlowsChange>,
    /// Flows that opened during the drain. Absent until ebb has seen them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived: Option<u32>,
    /// Flows that ended before the release. Absent until ebb has seen them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u32>,
    /// Idle flows that ebb closed (`idle-flows: close`), which `ended` includes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub idle_closed: u32,
    /// Flows that were open at the release, which the stop that follows cuts; the first 256. If the drain was observed and
    /// `reason` is `exited`, those that ended with the containers.
    pub cut: Vec<CutFlow>,
    /// The number of these flows. Absent if ebb could not see them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_total: Option<u32>,
    /// Peers that opened flows after the drain began, busiest first; at most 64.
    pub late_peers: Vec<LatePeer>,
    /// Flows still opened after the settle phase: a client or load balancer still connects.
    #[serde(default, skip_serializing_if = "is_false")]
    pub still_arriving: bool,
    /// What its settle phase waits for, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settle: Option<SettleReport>,
    /// When its settle phase ended, in milliseconds. Absent until then, and if it was released before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_ms: Option<u64>,
    /// Microseconds from the kernel's stamp of the last close to the release, if a close ended the drain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_lag_us: Option<u64>,
    /// How ebb found that no flow holds any more, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_by: Option<ReleasedBy>,
    /// Dumps that came back, failed ones included.
    #[serde(default, rename = "walks")]
    pub dumps_ended: u32,
    /// Dumps that were requested, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dumps: BTreeMap<DumpReason, u32>,
    /// Rounds of lookups that came back with an answer.
    #[serde(default)]
    pub lookups: u32,
    /// What ebb has told the application (`stop-signal`, `on-drain`).
    #[serde(default, skip_serializing_if = "Notified::is_nothing")]
    pub notified: Notified,
    /// Warnings about the pod's annotations.
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

/// A step of a drain to report. Each drain begins once and then finishes once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainNotice {
    /// It began.
    Began(Arc<Report>),
    /// Its settle phase is over, and its drain phase begins. At most once per drain.
    Settled(Arc<Report>),
    /// The settle phase is over, and new flows still open. At most once per drain. The late peers opened them.
    Blocked(Arc<Report>),
    /// Something is wrong with an annotation of this pod, as its first dump has shown.
    Warned(PodName, String),
    /// It is over.
    Finished(Arc<Report>),
}
