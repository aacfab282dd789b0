//! The state of a connection, decided from kernel data alone.
//!
//! [`sample`] is the kernel's data about one socket at one moment. [`origin`] decides which side opened it.
//! [`classify`](mod@classify) turns a sample into a [`FlowState`]. [`snapshot`] holds all flows of one pod and
//! whether each can hold a drain. Reports use the types of this module, too.

pub mod classify;
pub mod origin;
pub mod sample;
pub mod snapshot;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::{
    classify::{ClassifyOptions, classify},
    origin::{NamespacePorts, Noted, Origin, OriginTraits},
    sample::{Retransmissions, Sample, SequenceStart, TcpState},
    snapshot::{Age, Flow, Snapshot},
};

/// Which side opened the connection. If that is not known, it counts as inbound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Passive open: the pod accepted it, or is about to.
    Inbound,
    /// Active open: the pod dialled it.
    Outbound,
}

/// What a flow is doing. Everything but [`FlowState::Idle`] and [`FlowState::Lost`] is live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum FlowState {
    /// Handshake done, the application has not accepted it yet.
    Backlog,
    /// Bytes moved within `idle-after`, or bytes wait in a queue.
    Active,
    /// The peer sent last and the pod has not answered, however long ago.
    Awaiting,
    /// The pod sent last, the peer has acknowledged everything, and no byte moved for `idle-after`.
    Idle,
    /// The pod closed its side; the peer has not acknowledged all data and the FIN yet.
    Flushing,
    /// The peer closed its side and the pod has not.
    HalfClosed,
    /// The peer has not answered what the kernel sends again and again, for `peer-timeout`. Holds no drain.
    Lost,
}

impl FlowState {
    /// All states, in the order in which tables show them.
    pub const ALL: [Self; 7] = [
        Self::Backlog,
        Self::Active,
        Self::Awaiting,
        Self::Idle,
        Self::Flushing,
        Self::HalfClosed,
        Self::Lost,
    ];

    /// Whether the flow may be in the middle of a request or response.
    pub const fn is_live(self) -> bool {
        !matches!(self, Self::Idle | Self::Lost)
    }

    /// The state's name, as in the CLI, in JSON and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Backlog => "backlog",
            Self::Active => "active",
            Self::Awaiting => "awaiting",
            Self::Idle => "idle",
            Self::Flushing => "flushing",
            Self::HalfClosed => "half-closed",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for FlowState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Why a flow does not hold a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Exempt {
    /// Dialled by the pod.
    Outbound,
    /// Both ends are in the pod.
    InPod,
    /// Dialled by the kubelet.
    Probe,
    /// On a port that the policy excludes.
    IgnoredPort,
    /// To ebb's own listener in the pod.
    WaitPort,
}

impl Exempt {
    /// The name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::InPod => "in-pod",
            Self::Probe => "probe",
            Self::IgnoredPort => "ignored-port",
            Self::WaitPort => "wait-port",
        }
    }
}

/// Numbers of flows that are not exempt, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names of the flow states")]
pub struct FlowCounts {
    pub backlog: u32,
    pub active: u32,
    pub awaiting: u32,
    pub idle: u32,
    pub flushing: u32,
    pub half_closed: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lost: u32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde asks for"
)]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl FlowCounts {
    /// The number of flows in `state`.
    pub const fn of(&self, state: FlowState) -> u32 {
        match state {
            FlowState::Backlog => self.backlog,
            FlowState::Active => self.active,
            FlowState::Awaiting => self.awaiting,
            FlowState::Idle => self.idle,
            FlowState::Flushing => self.flushing,
            FlowState::HalfClosed => self.half_closed,
            FlowState::Lost => self.lost,
        }
    }

    /// Counts one more flow in `state`.
    pub const fn add(&mut self, state: FlowState) {
        self.add_many(state, 1);
    }

    /// Counts `more` flows in `state`.
    pub const fn add_many(&mut self, state: FlowState, more: u32) {
        let n = match state {
            FlowState::Backlog => &mut self.backlog,
            FlowState::Active => &mut self.active,
            FlowState::Awaiting => &mut self.awaiting,
            FlowState::Idle => &mut self.idle,
            FlowState::Flushing => &mut self.flushing,
            FlowState::HalfClosed => &mut self.half_closed,
            FlowState::Lost => &mut self.lost,
        };
        *n = n.saturating_add(more);
    }

    /// Flows in any state but idle and lost.
    pub fn live(&self) -> u32 {
        self.total() - self.idle - self.lost
    }

    /// All these flows.
    pub fn total(&self) -> u32 {
        FlowState::ALL.iter().map(|s| self.of(*s)).sum()
    }
}
