//! What the agent's socket serves and `-o json` prints.
//!
//! Every document has `"schema": "ebb.dev/v1"`. Within a schema fields are only ever added, durations are
//! whole milliseconds (`…_ms`) and addresses are `IP:PORT` (IPv6 in brackets). Unknown is absent, never zero.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    clock::{BootTime, millis},
    drain::report::Report,
    flow::{Direction, Exempt, Flow, FlowCounts, FlowState, Since, Snapshot},
    ids::{ContainerId, PodName},
    kernel::Audit,
    pods::{Pod, Scope},
};

/// The name of this set of shapes.
pub const SCHEMA: &str = "ebb.dev/v1";

/// `POST /v1/audit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditView {
    /// [`SCHEMA`].
    pub schema: String,
    /// What was found.
    #[serde(flatten)]
    pub audit: Audit,
}

/// `GET /v1/pods`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodList {
    /// [`SCHEMA`].
    pub schema: String,
    /// All pods of the node, by namespace and name.
    pub pods: Vec<PodView>,
}

/// A pod and what is connected to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodView {
    /// Name and UID.
    #[serde(flatten)]
    pub pod: PodName,
    /// How its sockets are told from others'.
    pub network: Network,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its containers.
    pub containers: Vec<ContainerView>,
    /// Inbound flows that would hold a drain, by state. Absent if ebb can't see them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<FlowCounts>,
    /// Different peers of these flows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peers: Option<u32>,
    /// Flows that would not hold a drain: outbound, within the pod, probes, on ignored ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt: Option<u32>,
    /// Age of the oldest inbound flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_ms: Option<u64>,
    /// Why its flows can't be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untracked: Option<String>,
    /// What is wrong with its `ebb.dev/` annotations and with its wait port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// How a pod's sockets are told from others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// A network namespace of its own.
    Pod,
    /// The host's namespace, by cgroup.
    Host,
    /// Not at all.
    Untracked,
}

impl Network {
    /// The name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Host => "host",
            Self::Untracked => "untracked",
        }
    }
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerView {
    /// Name in the pod spec.
    pub name: String,
    /// CRI id.
    pub id: ContainerId,
    /// Running at the last look.
    pub running: bool,
}

impl PodView {
    /// Puts a pod and the look at it together.
    pub fn new(pod: &Pod, seen: Result<&Snapshot, String>, warnings: Vec<String>) -> Self {
        let snapshot = seen.as_ref().ok().copied();
        let holding = || snapshot.into_iter().flat_map(Snapshot::holding);
        let peers: std::collections::HashSet<_> = holding().map(|f| f.remote.ip()).collect();
        Self {
            pod: pod.name.clone(),
            network: match pod.scope {
                Scope::Netns { .. } => Network::Pod,
                Scope::HostNetwork(_) => Network::Host,
                Scope::Untracked(_) => Network::Untracked,
            },
            ips: pod.ips.clone(),
            containers: pod
                .containers
                .iter()
                .map(|c| ContainerView {
                    name: c.name.clone(),
                    id: c.id.clone(),
                    running: c.running,
                })
                .collect(),
            flows: snapshot.map(Snapshot::counts),
            peers: snapshot.map(|_| count(peers.len())),
            exempt: snapshot.map(|s| count(s.flows.iter().filter(|f| f.exempt.is_some()).count())),
            oldest_ms: holding().filter_map(|f| f.age).max().map(millis),
            untracked: seen.err(),
            warnings,
        }
    }
}

/// `GET /v1/flows`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowList {
    /// [`SCHEMA`].
    pub schema: String,
    /// Flows, by pod.
    pub flows: Vec<FlowView>,
    /// Pods whose flows ebb can't see, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub untracked: Vec<UntrackedPod>,
}

/// A pod whose flows ebb can't see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UntrackedPod {
    /// The pod.
    #[serde(flatten)]
    pub pod: PodName,
    /// Why.
    pub why: String,
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowView {
    /// Its pod, which many have in common.
    pub pod: Arc<PodName>,
    /// Who opened it.
    pub direction: Direction,
    /// What it is doing.
    pub state: FlowState,
    /// In the middle of something: every state but `idle`.
    pub live: bool,
    /// It would hold a drain; if not, `exempt` says why.
    pub holds: bool,
    /// Why it does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt: Option<Exempt>,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// Time since it was opened; at least that, where `older_than_agent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// Whether it was open before the agent started. Absent where that is not known: its record is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_than_agent: Option<bool>,
    /// Time since the last byte either way.
    pub quiet_ms: u64,
    /// Bytes from the peer.
    pub bytes_in: u64,
    /// Bytes to the peer, acknowledged.
    pub bytes_out: u64,
    /// The container whose cgroup, or one below it, the socket was made in: its name in the pod spec. Absent where it
    /// is no known container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Arc<str>>,
}

impl FlowView {
    /// A flow of a pod, made by this container if that is known.
    pub fn new(pod: &Arc<PodName>, flow: &Flow, container: Option<Arc<str>>) -> Self {
        Self {
            pod: Arc::clone(pod),
            direction: flow.direction,
            state: flow.state,
            live: flow.state.is_live(),
            holds: flow.exempt.is_none(),
            exempt: flow.exempt,
            local: flow.local,
            remote: flow.remote,
            age_ms: flow.age.map(millis),
            older_than_agent: match flow.since {
                Since::Opening => Some(false),
                Since::BeforeAgent => Some(true),
                Since::Unknown => None,
            },
            quiet_ms: millis(flow.quiet_for),
            bytes_in: flow.bytes_in,
            bytes_out: flow.bytes_out,
            container,
        }
    }
}

/// `GET /v1/drains`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainList {
    /// [`SCHEMA`].
    pub schema: String,
    /// The number of this picture: a larger one is newer.
    pub version: u64,
    /// Drains under way, then finished ones, newest first.
    pub drains: Vec<Report>,
}

/// `GET /v1/wait` on the node port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitReply {
    /// [`SCHEMA`].
    pub schema: String,
    /// The caller's drain.
    #[serde(flatten)]
    pub report: Report,
}

/// One stop of a pod's container or sandbox, and what was decided about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopView {
    /// When it arrived (RFC 3339, UTC).
    pub at: String,
    /// The pod.
    pub pod: PodName,
    /// `StopContainer` or `StopPodSandbox`.
    pub call: String,
    /// The container's name in the pod spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The timeout of a StopContainer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// How long its caller waits for the answer, if it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience_ms: Option<u64>,
    /// Whether it was held; else it was passed at once.
    pub held: bool,
    /// Whether it was part of the pod's end, where that was asked and could be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<bool>,
    /// By what that was known, or why it could not be: `deleting`, `only-container`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<String>,
    /// Why the hold ended, or why there was none. Absent while it is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The latest moment of release, from its arrival.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// How long it was held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_ms: Option<u64>,
}

impl StopView {
    /// A call of a pod that arrives now.
    pub fn new(pod: &PodName, call: &str) -> Self {
        Self {
            at: rfc3339(BootTime::now()),
            pod: pod.clone(),
            call: call.into(),
            container: None,
            timeout_ms: None,
            patience_ms: None,
            held: false,
            ending: None,
            evidence: None,
            reason: None,
            deadline_ms: None,
            held_ms: None,
        }
    }
}

/// A moment as reports give it (RFC 3339, UTC).
pub fn rfc3339(t: BootTime) -> String {
    humantime::format_rfc3339_millis(t.to_system_time()).to_string()
}

/// `GET /v1/explain?pod=NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// [`SCHEMA`].
    pub schema: String,
    /// The pod.
    pub pod: PodName,
    /// When this agent started: it knows of nothing before.
    pub agent_since: String,
    /// Whether the API server says that the pod is being deleted. Absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleting: Option<bool>,
    /// What is known of the pod as it is now. Absent if it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<PolicyView>,
    /// Its drain, under way or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Report>,
    /// Its last stops, newest first. The agent remembers 256 in all.
    pub stops: Vec<StopView>,
}

/// A pod's policy in force, and what follows from it for a stop that comes now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyView {
    /// Each setting.
    pub settings: Vec<Setting>,
    /// What is wrong with its annotations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Its grace period, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
    /// What is left of it for the application.
    pub reserve_ms: u64,
    /// The longest hold of a StopContainer with all of the grace period, from a kubelet with the usual
    /// `runtimeRequestTimeout`.
    pub deadline_ms: u64,
}

/// A setting of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its name, as in the annotation `ebb.dev/NAME`.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Who says so.
    pub from: Origin,
}

/// Where a setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The pod's annotation.
    Annotation,
    /// The agent's flags or environment.
    Node,
    /// Nobody.
    Default,
}

/// `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionView {
    /// [`SCHEMA`].
    pub schema: String,
    /// The agent's version.
    pub version: String,
}

/// What went wrong, for any request that fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// One line: what failed on what, why, and what to do.
    pub error: String,
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
