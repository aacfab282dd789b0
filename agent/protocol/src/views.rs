//! The JSON of the agent's socket and of `-o json`; see [the crate](crate) for the rules and the routes.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ebb_core::{
    advice::Advice,
    clock::BootTime,
    flow::{Direction, Exempt, FlowCounts, FlowState},
    ids::{ContainerId, PodName},
    policy::Until,
};
use serde::{Deserialize, Serialize};

use crate::drain_report::Report;

/// The name of this JSON schema.
pub const SCHEMA: &str = "ebb.dev/v1";

/// `GET /v1/pods`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PodList {
    /// [`SCHEMA`].
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
    /// Inbound flows that would hold a drain, by state. Absent if ebb can't see them.
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
    /// Lower bound of the age of the oldest inbound flow.
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
    /// Whether `state` is not `idle`.
    pub live: bool,
    /// Whether it would hold a drain; if not, `exempt` says why.
    pub holds: bool,
    /// Why it does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt: Option<Exempt>,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// Who has the peer's address: `NAMESPACE/NAME` of a pod of this node, or `node`: the node itself or a pod on its
    /// network. Absent for others.
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
    /// [`SCHEMA`].
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
    /// [`SCHEMA`].
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
    /// [`SCHEMA`].
    pub schema: String,
    /// Why the wait ended.
    #[serde(default)]
    pub outcome: WaitOutcome,
    /// The caller's drain.
    #[serde(flatten)]
    pub report: Report,
}

/// One stop of a pod's container or sandbox, and the agent's decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
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
    /// The caller's RPC deadline, if it sent one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience_ms: Option<u64>,
    /// Whether it was held; if not, it was forwarded at once.
    pub held: bool,
    /// Whether it was part of the pod's termination. Absent if the agent did not check that or could not find out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<bool>,
    /// The evidence for that, or why there is none: `deleting`, `only-container`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<String>,
    /// Why the hold ended, or why there was none. Absent while it is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The latest time of the release, from its arrival.
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

/// A time as in reports (RFC 3339, UTC).
pub fn rfc3339(t: BootTime) -> String {
    humantime::format_rfc3339_millis(t.to_system_time()).to_string()
}

/// `GET /v1/explain?pod=NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Explanation {
    /// [`SCHEMA`].
    pub schema: String,
    /// The pod.
    pub pod: PodName,
    /// When this agent started.
    pub agent_since: String,
    /// Whether the API server says that the pod is being deleted. Absent without an API server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleting: Option<bool>,
    /// The pod's current policy. Absent if the pod is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<PolicyView>,
    /// Its drain, under way or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Report>,
    /// How long the connections lasted that were opened and closed while the agent ran, the shortest first. Empty if
    /// the pod is gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lifetimes: Vec<LifetimeBucket>,
    /// Its last stops, newest first. The agent remembers 256 in all.
    pub stops: Vec<StopView>,
}

/// Connections whose lifetimes are similar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LifetimeBucket {
    /// They lasted longer than the bound of the bucket before, and at most this long. Absent in the last bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most_ms: Option<u64>,
    /// How many.
    pub connections: u64,
}

/// A pod's current policy, and what follows from it for a stop that arrives now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PolicyView {
    /// Each setting.
    pub settings: Vec<Setting>,
    /// Warnings about its annotations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Its grace period, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
    /// How long its preStop hooks sleep, which the kubelet takes off the grace period. Absent if they don't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_stop_sleep_ms: Option<u64>,
    /// The part of it for the application's own shutdown.
    pub reserve_ms: u64,
    /// The longest hold of a StopContainer with the full grace period, less the sleep of its preStop hooks, from a
    /// kubelet with the default `runtimeRequestTimeout`. 0 if no stop is held.
    pub deadline_ms: u64,
    /// Why no stop of the pod is ever held, if that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub never_held: Option<String>,
}

/// A setting of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Setting {
    /// Its name, as in the annotation `ebb.dev/NAME`.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Where it comes from.
    pub from: SettingSource,
}

/// Where a setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum SettingSource {
    /// The pod's annotation.
    Annotation,
    /// The annotation of the pod's namespace.
    Namespace,
    /// The agent's flags or environment.
    Node,
    /// ebb's default.
    Default,
}

/// `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VersionView {
    /// [`SCHEMA`].
    pub schema: String,
    /// The agent's version.
    pub version: String,
}

/// What `ebb version` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Versions {
    /// [`SCHEMA`].
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
    /// [`SCHEMA`].
    pub schema: String,
    /// The drain that was released. `cut` lists the connections that were open then.
    #[serde(flatten)]
    pub report: Report,
}

/// What `ebb drain --dry-run` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DryRun {
    /// [`SCHEMA`].
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
    /// How many flows would not, by the reason.
    pub not_holding: BTreeMap<String, u32>,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum CheckStatus {
    /// No problem.
    Ok,
    /// ebb can't tell.
    Unknown,
    /// Something limits ebb, or costs requests.
    Warn,
    /// ebb, or the hold, can't work.
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Its result.
    pub status: CheckStatus,
    /// One line: what was found.
    pub detail: String,
    /// What that costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The change that helps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
}

impl Check {
    /// A check and its result.
    pub fn new(name: &str, status: CheckStatus, detail: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status,
            detail: detail.into(),
            why: None,
            change: None,
        }
    }

    /// Adds what the finding costs.
    #[must_use]
    pub fn because(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    /// Adds the change that helps.
    #[must_use]
    pub fn change(mut self, change: impl Into<String>) -> Self {
        self.change = Some(change.into());
        self
    }
}

/// What `ebb doctor` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Diagnosis {
    /// [`SCHEMA`].
    pub schema: String,
    /// The pod, if the command named one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The checks.
    pub checks: Vec<Check>,
}
