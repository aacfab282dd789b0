//! What `ebb explain` shows: a pod's policy, its stops, its drain.

use ebb_core::{clock::BootTime, ids::PodName};
use serde::{Deserialize, Serialize};

use crate::drain_report::Report;

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
    /// The caller's RPC timeout, in milliseconds from the call's arrival, if it sent one.
    #[serde(
        default,
        rename = "patience_ms",
        skip_serializing_if = "Option::is_none"
    )]
    pub rpc_timeout_ms: Option<u64>,
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
            at: BootTime::now().rfc3339(),
            pod: pod.clone(),
            call: call.into(),
            container: None,
            timeout_ms: None,
            rpc_timeout_ms: None,
            held: false,
            ending: None,
            evidence: None,
            reason: None,
            deadline_ms: None,
            held_ms: None,
        }
    }
}

/// `GET /v1/explain?pod=NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Explanation {
    /// The schema: `ebb.dev/v1`.
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
