//! The protocol between the CRI proxy and the agent, over the agent's unix socket.
//!
//! The proxy sends `POST /v1/holds` with a [`HoldRequest`]. The agent answers at once with status 200 and a body of
//! JSON lines, each a [`HoldMessage`]: `holding` at most once, then `release` or `pass`, then the end. Closing the
//! connection cancels the hold. After a `release` with reason `shutdown` the proxy may send the request to the next
//! agent, with `resumed` if the call was held. An agent that stops also leaves a note ([`stop_note`]), so that calls
//! wait for the next agent although no agent runs. Times are on the boot-time clock, which all processes of the host
//! share. If no message arrives in time, or the proxy does not understand it, the proxy forwards the call.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use ebb_core::{
    clock::BootTime,
    ids::{ContainerId, PodUid, SandboxId},
    release::ReleaseReason,
};
use serde::{Deserialize, Serialize};

/// The path of the hold request on the agent's unix socket.
pub const HOLDS_PATH: &str = "/v1/holds";

/// The path of reports about calls that the proxy forwarded without a hold request.
pub const BYPASS_PATH: &str = "/v1/passed";

/// How long the proxy waits for the first message. To find out whether a pod is terminating, the agent may need 0.5 s
/// for the runtime's list of pods (1.3 s if the last list does not have the container), 0.8 s for the API server and
/// 0.3 s for logind, and at least 1 s from the call's arrival for the stops of the pod's other containers.
pub const FIRST_MESSAGE_WITHIN: Duration = Duration::from_millis(2500);

/// The file beside the agent's `socket` in which an agent that stops notes when that was. An agent that starts removes
/// it, and one that crashes leaves none.
pub fn stop_note(socket: &Path) -> PathBuf {
    socket.with_extension("stopped")
}

/// The content of a [`stop_note`]: a moment on the boot-time clock, in nanoseconds.
pub fn format_stop_note(stopped: BootTime) -> String {
    format!("{}\n", stopped.as_nanos())
}

/// When the agent stopped, by its note; `None` if there is no note.
pub fn read_stop_note(path: &Path) -> Option<BootTime> {
    let nanos = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    Some(BootTime::from_nanos(nanos))
}

/// The call to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case")]
pub enum HeldCall {
    /// CRI StopContainer.
    StopContainer {
        /// The container to stop.
        container: ContainerId,
        /// The timeout of the call, in milliseconds: what is left of the grace period.
        timeout_ms: u64,
    },
    /// CRI StopPodSandbox.
    StopPodSandbox {
        /// The sandbox to stop.
        sandbox: SandboxId,
    },
}

/// A request to hold a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldRequest {
    /// The call.
    #[serde(flatten)]
    pub call: HeldCall,
    /// The caller's RPC deadline (`grpc-timeout`), in milliseconds from the arrival, if it sent one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpc_timeout_ms: Option<u64>,
    /// When the call arrived.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived: Option<BootTime>,
    /// Another agent held the call, as part of its pod's termination, and has stopped since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resumed: bool,
    /// The trace that the call belongs to (`traceparent` of W3C Trace Context): the kubelet's, if it traces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// A call that the proxy forwarded without the agent's answer: `POST /v1/passed`, answered with 204.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BypassReport {
    /// The call.
    #[serde(flatten)]
    pub call: HeldCall,
    /// Why the proxy did not hold it.
    pub why: BypassReason,
    /// When the proxy forwarded it; the report may come later.
    pub at: BootTime,
}

/// Why the proxy forwarded a call without the agent's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BypassReason {
    /// A timeout of 2 s or less, or an RPC deadline that is near.
    NoTime,
    /// The proxy could not reach an agent.
    AgentAway,
    /// The agent did not answer in time.
    AgentSilent,
    /// The proxy could not read the call, because it is compressed or malformed. The call in the report has no id.
    Unreadable,
    /// A reason that only a newer proxy knows.
    #[serde(other)]
    Other,
}

impl BypassReason {
    /// All reasons.
    pub const ALL: [Self; 5] = [
        Self::NoTime,
        Self::AgentAway,
        Self::AgentSilent,
        Self::Unreadable,
        Self::Other,
    ];

    /// The name in reports and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoTime => "no-time",
            Self::AgentAway => "agent-away",
            Self::AgentSilent => "agent-silent",
            Self::Unreadable => "unreadable",
            Self::Other => "other",
        }
    }
}

/// What a held call stops, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldNames {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container's name, if the call stops a container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// A message of the agent, one JSON object per line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum HoldMessage {
    /// The call is held.
    Holding {
        /// The pod whose drain it waits for.
        pod: PodUid,
        /// The latest time of the release. The proxy forwards the call by itself soon afterwards.
        deadline: BootTime,
        /// The part of the timeout to leave for the application's own shutdown, in milliseconds.
        reserve_ms: u64,
        /// The hold may exceed the timeout of the call, but not the caller's RPC deadline (`--extend`).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        extended: bool,
        /// The names for the proxy's log. An older agent sends none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        names: Option<HeldNames>,
    },
    /// The hold is over: forward the call.
    Release {
        /// Why.
        reason: ReleaseReason,
        /// How long it was held, in milliseconds.
        held_ms: u64,
    },
    /// Forward the call: the agent does not hold it, or not any longer.
    #[serde(rename = "pass")]
    Forward {
        /// Why, for the log: `not-terminating (others-run)`, `drain-off`, `unknown-container`, …
        why: String,
    },
}
