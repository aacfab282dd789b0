//! How often clients connect to a pod.

use std::time::Duration;

/// How often clients connect to a pod, as the kernel has counted it since the agent's start. Probes of the kubelet and
/// connections within the pod are not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrivals {
    /// For how long they were counted: since the agent's or the pod's start.
    pub observed: Duration,
    /// How long the silence usually is between two connections: the gap that a random moment of about the last minute
    /// fell into, on average. `None`: no client has connected in all that time.
    pub gap: Option<Duration>,
}
