//! What the agent's socket serves and `-o json` prints.
//!
//! Every document has `"schema": "ebb.dev/v1"`. Within a schema fields are only ever added, durations are
//! whole milliseconds (`…_ms`) and addresses are `IP:PORT` (IPv6 in brackets). Unknown is absent, never zero.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    clock::millis,
    drain::report::{PodName, Report},
    flow::{Direction, Exempt, Flow, FlowCounts, FlowState, Snapshot},
    ids::ContainerId,
    pods::{Pod, Scope},
};

/// The name of this set of shapes.
pub const SCHEMA: &str = "ebb.dev/v1";

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
    /// Flows that would not hold a drain: outbound, within the pod, on ignored ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt: Option<u32>,
    /// Age of the oldest inbound flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_ms: Option<u64>,
    /// Why its flows can't be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untracked: Option<String>,
    /// What is wrong with its `ebb.dev/` annotations.
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
    /// `NAMESPACE/NAME` of the pod.
    pub pod: String,
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
    /// It was open before the agent started.
    pub older_than_agent: bool,
    /// Time since the last byte either way.
    pub quiet_ms: u64,
    /// Bytes from the peer.
    pub bytes_in: u64,
    /// Bytes to the peer, acknowledged.
    pub bytes_out: u64,
}

impl FlowView {
    /// A flow of a pod.
    pub fn new(pod: &PodName, flow: &Flow) -> Self {
        Self {
            pod: pod.to_string(),
            direction: flow.direction,
            state: flow.state,
            live: flow.state.is_live(),
            holds: flow.exempt.is_none(),
            exempt: flow.exempt,
            local: flow.local,
            remote: flow.remote,
            age_ms: flow.age.map(millis),
            older_than_agent: flow.older_than_agent,
            quiet_ms: millis(flow.quiet_for),
            bytes_in: flow.bytes_in,
            bytes_out: flow.bytes_out,
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

/// What went wrong, for any request that fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// One line: what failed on what, why, and what to do.
    pub error: String,
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
