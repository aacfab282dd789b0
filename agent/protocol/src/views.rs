//! The JSON of the agent's socket and of `-o json`; see [the crate](crate) for the rules and the routes.

mod diagnosis;
mod explanation;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ebb_core::{
    advice::Advice,
    flow::{Direction, Exempt, FlowCounts, FlowState},
    ids::{ContainerId, PodName},
    policy::Until,
};
use serde::{Deserialize, Serialize};

pub use self::{
    diagnosis::{Check, CheckStatus, Diagnosis},
    explanation::{Explanation, LifetimeBucket, PolicyView, Setting, SettingSource, StopView},
};
use crate::drain_report::Report;

/// The name of this JSON schema.
pub const SCHEMA: &str = "ebb.dev/v1";

/// `GET /v1/pods`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PodList {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// All pods of the node, by namespace and name.
    pub pods: Vec<PodView>,
}

/// A pod and its connections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PodView {
    /// Name and UID.
    #[serde(flatten)]
    pub pod: PodName,
    /// Where its sockets are.
    pub network: Network,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its labels, as the runtime has them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Its containers.
    pub containers: Vec<ContainerView>,
    /// Flows that are not exempt, by state. Absent if ebb can't see them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<FlowCounts>,
    /// Number of different peers of these flows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peers: Option<u32>,
    /// Flows that would not hold a drain: outbound, within the pod, probes, on ignored ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt: Option<u32>,
    /// New inbound connections per second, including those that hold no drain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_per_second: Option<f64>,
    /// The age of the oldest of these flows; a lower bound if `oldest_is_at_least`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_ms: Option<u64>,
    /// Whether that flow may be older: its opening was not seen.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oldest_is_at_least: bool,
    /// Why its flows can't be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untracked: Option<String>,
    /// Warnings about its `ebb.dev/` annotations and its wait port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Where a pod's sockets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// In a network namespace of its own.
    Pod,
    /// In the host's namespace; ebb finds them by cgroup.
    Host,
    /// Where ebb can't see them.
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
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ContainerView {
    /// Name in the pod spec.
    pub name: String,
    /// CRI id.
    pub id: ContainerId,
    /// Whether it ran when the agent last listed the containers.
    pub running: bool,
}

/// `GET /v1/flows`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FlowList {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// Flows, by pod.
    pub flows: Vec<FlowView>,
    /// Pods whose flows ebb can't see, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub untracked: Vec<UntrackedPod>,
}

/// A pod whose flows ebb can't see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct UntrackedPod {
    /// The pod.
    #[serde(flatten)]
    pub pod: PodName,
    /// Why.
    pub why: String,
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FlowView {
    /// Its pod. The flows of a pod share it.
    pub pod: Arc<PodName>,
    /// Which side opened it.
    pub direction: Direction,
    /// What it is doing.
    pub state: FlowState,
    /// Whether `state` is neither `idle` nor `lost`.
    pub live: bool,
    /// Whether it would hold a drain now. If not, `exempt` says why; without `exempt`, it is lost, or the pod dialled it
    /// and it is idle.
    pub holds: bool,
    /// Why it does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt: Option<Exempt>,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// The owner of the peer's address: `NAMESPACE/NAME` of a pod of this node, or `node`: the node itself or a pod on
    /// its network. Absent for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Arc<str>>,
    /// Time since it was opened. Absent if not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// The lower bound of its age, if the age is not known: it is older than the agent, or its stamp is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_at_least_ms: Option<u64>,
    /// Time since the last byte either way.
    pub quiet_ms: u64,
    /// Bytes from the peer.
    pub bytes_in: u64,
    /// Bytes to the peer, acknowledged.
    pub bytes_out: u64,
    /// The name of the container in whose cgroup, or one below it, the socket was made. Absent if no known container
    /// has that cgroup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Arc<str>>,
}

/// `GET /v1/drains`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DrainList {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// The number of this snapshot: a larger one is newer.
    pub version: u64,
    /// Drains under way, then finished ones, newest first.
    pub drains: Vec<Report>,
}

/// `GET /v1/advice`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AdviceList {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// The workloads of whose pods the agent remembers drains, by namespace and name.
    pub workloads: Vec<WorkloadAdvice>,
}

/// What the drains of a workload say about its grace period.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WorkloadAdvice {
    /// Its namespace.
    pub namespace: String,
    /// The name of the controller, or of a pod that has none.
    pub workload: String,
    /// The advice.
    #[serde(flatten)]
    pub advice: Advice,
}

impl std::fmt::Display for WorkloadAdvice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.workload)
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum WaitOutcome {
    /// The drain is over; its `reason` says why.
    #[default]
    Released,
    /// The drain has reached the wait's `until`.
    Reached,
    /// The wait's `timeout` has passed.
    Timeout,
    /// ebb only observes the pod, so the wait ended at once.
    Observed,
}

/// `GET /v1/wait` on the node port, and with `pod` on the agent's socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WaitReply {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// Why the wait ended.
    #[serde(default)]
    pub outcome: WaitOutcome,
    /// The caller's drain.
    #[serde(flatten)]
    pub report: Report,
}

/// `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VersionView {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// The agent's version.
    pub version: String,
}

/// What `ebb version` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Versions {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// The version of the program that prints this.
    pub ebb: String,
    /// The agent's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// Why that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_error: Option<String>,
    /// The proxies that run on the host.
    pub proxies: Vec<ProxyVersion>,
}

/// The version of a running proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ProxyVersion {
    /// Its process id on the host.
    pub pid: u32,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Why that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What `kubectl ebb` prints of a verb about a node, such as `doctor`: the document of each node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(rename = "{T}OfNodes"))]
pub struct NodeDocuments<T> {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// The documents of the nodes whose agents answered, by node.
    pub nodes: Vec<NodeDocument<T>>,
}

/// The document of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(rename = "{T}OfNode"))]
pub struct NodeDocument<T> {
    /// The node's name.
    pub node: String,
    /// What the verb prints on this node.
    #[serde(flatten)]
    pub document: T,
}

/// The answer to any request that fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Problem {
    /// One line: what failed, why, and what to do.
    pub error: String,
    /// The pods that match, if several do, as `namespace/name`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<String>,
}

impl Problem {
    /// A problem that one line describes.
    pub fn new(error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            candidates: vec![],
        }
    }
}

impl std::fmt::Display for Problem {
    /// The sentence, and each candidate on a line of its own.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.error)?;
        let mut candidates = self.candidates.iter();
        candidates.try_for_each(|pod| write!(f, "\n  {pod}"))
    }
}

/// `POST /v1/release`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ReleaseRequest {
    /// The pod's whole name, `namespace/name` or UID. A prefix does not match.
    pub pod: String,
}

/// The answer to `POST /v1/release`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Released {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// The drain that was released. `cut` lists the connections that were open then.
    #[serde(flatten)]
    pub report: Report,
}

/// What `ebb drain --dry-run` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DryRun {
    /// The schema: `ebb.dev/v1`.
    pub schema: String,
    /// The pod.
    pub pod: PodName,
    /// Its policy, and the deadline of a stop that arrives now.
    pub policy: PolicyView,
    /// What it would wait for after settling.
    pub until: Until,
    /// Whether it is draining now.
    pub is_draining: bool,
    /// Why its flows can't be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untracked: Option<String>,
    /// The flows that would hold it after settling.
    pub holding: Vec<FlowView>,
    /// How many idle flows ebb would close after settling (`idle-flows: close`).
    #[serde(default)]
    pub idle_closed: u32,
    /// How many flows would not, by the reason.
    pub not_holding: BTreeMap<String, u32>,
}
