//! What a holder says to the agent over its unix socket, and what it hears.
//!
//! `POST /v1/holds` with a [`HoldRequest`] is answered at once with status 200 and a body of JSON lines,
//! each a [`HoldMessage`]: `holding` (at most once), then `release` or `pass`, then the end. The request
//! lives as long as its connection: closing it gives the hold up. After a `release` with reason `shutdown` a holder
//! may ask the agent that comes next, with `resumed`. A holder that hears nothing within its
//! own patience, or anything it does not understand, goes on as if there were no agent.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    clock::BootTime,
    drain::report::ReleaseReason,
    ids::{ContainerId, PodUid, SandboxId},
};

/// The path of the hold request on the agent's unix socket.
pub const HOLDS_PATH: &str = "/v1/holds";

/// The path of notices about calls that were passed unasked.
pub const PASSED_PATH: &str = "/v1/passed";

/// How long a holder waits for the first message. The agent may need some of it to find out whether a pod
/// is terminating: 0.5 s for a slow runtime, 0.8 s where it asks the API server, and 1 s from the arrival for the
/// stops of the pod's other containers.
pub const FIRST_MESSAGE: Duration = Duration::from_millis(2500);

/// What is being held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case")]
pub enum HeldCall {
    /// CRI StopContainer.
    StopContainer {
        /// The container to be stopped.
        container: ContainerId,
        /// The timeout of the call, in milliseconds: what is left of the grace period.
        timeout_ms: u64,
    },
    /// CRI StopPodSandbox.
    StopPodSandbox {
        /// The sandbox to be stopped.
        sandbox: SandboxId,
    },
}

/// A request to hold a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldRequest {
    /// The call.
    #[serde(flatten)]
    pub call: HeldCall,
    /// How long the caller itself waits for its answer (`grpc-timeout`), in milliseconds, if it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller_patience_ms: Option<u64>,
    /// When the call arrived, by the clock that all processes of the host share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived: Option<BootTime>,
    /// Another agent has held the call and has stopped since. It was judged to be its pod's end then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resumed: bool,
}

/// A call that the proxy passed without the agent's say: `POST /v1/passed`, answered with 204.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedNotice {
    /// The call.
    #[serde(flatten)]
    pub call: HeldCall,
    /// `no-time` (a timeout of 2 s or less, or a caller about to leave), `agent-away` or `agent-silent`.
    pub why: String,
    /// When it was passed, which may be a while ago.
    pub at: BootTime,
}

/// What the agent answers, one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum HoldMessage {
    /// The call is held.
    Holding {
        /// The pod whose drain it waits for.
        pod: PodUid,
        /// The latest moment of release, in milliseconds from now. The holder goes on by itself then.
        deadline_ms: u64,
        /// What must be left of the timeout for the application's own shutdown, in milliseconds.
        reserve_ms: u64,
        /// The hold may be longer than the timeout of the call, as long as the caller waits (`--extend`).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        extended: bool,
    },
    /// Go on.
    Release {
        /// Why.
        reason: ReleaseReason,
        /// For how long it was held, in milliseconds.
        held_ms: u64,
    },
    /// Go on: this call is not to be held at all.
    Pass {
        /// Why, for the log: `not-terminating (others-run)`, `drain-off`, `unknown-container`, …
        why: String,
    },
}
