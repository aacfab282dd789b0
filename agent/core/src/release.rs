//! Why a hold is released.

use serde::{Deserialize, Serialize};

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseReason {
    /// The pod is drained, as its policy's `until` defines it.
    Drained,
    /// The deadline passed before the pod was drained.
    Deadline,
    /// An operator ran `ebb release`.
    Manual,
    /// The pod is not known to be terminating.
    NotTerminating,
    /// ebb can't see the pod's flows, or lost sight of them, so the hold lasted for the settle time only.
    Untracked,
    /// The agent stopped.
    Shutdown,
    /// The containers exited before the drain that ebb only observed was over.
    Exited,
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
            Self::Exited => "exited",
        }
    }
}

/// What the deadline of a drain comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum DeadlineCause {
    /// The grace period, minus the reserve.
    #[default]
    Grace,
    /// The caller's RPC deadline.
    RpcTimeout,
    /// `max-hold`.
    MaxHold,
    /// A later delete shortened the grace period.
    ShorterGrace,
    /// The pod is gone from the API server: it was deleted by force, or another pod has its name.
    Removed,
}

impl DeadlineCause {
    /// The cause as a phrase.
    pub const fn phrase(self) -> &'static str {
        match self {
            Self::Grace => "its grace period minus the reserve",
            Self::RpcTimeout => "the kubelet's RPC deadline",
            Self::MaxHold => "max-hold, not its grace period",
            Self::ShorterGrace => "a later delete with a shorter grace period",
            Self::Removed => "the pod's removal from the API server",
        }
    }
}

impl std::fmt::Display for ReleaseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}
