//! What a drain waits for and for how long.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// When a pod is drained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// No tracked inbound flow is left, live or idle.
    #[default]
    Zero,
    /// No live flow is left.
    Idle,
    /// The settle phase is over.
    Settled,
}

/// A pod's drain policy, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `ebb.dev/drain` is not "off".
    pub enabled: bool,
    /// What to wait for.
    pub until: Until,
    /// The settle phase ends when no new inbound flow has arrived for this long …
    pub quiet: Duration,
    /// … or after this long in any case.
    pub settle_max: Duration,
    /// A flow without bytes for this long may be idle.
    pub idle_after: Duration,
    /// What to leave of the grace period for the application's own shutdown; never more than a third of it.
    pub reserve: Duration,
    /// The longest hold; `None`: as long as the grace period allows.
    pub max_hold: Option<Duration>,
    /// Only flows to these local ports hold; empty: all.
    pub ports: Vec<u16>,
    /// Flows to these local ports do not hold.
    pub ignore_ports: Vec<u16>,
}
