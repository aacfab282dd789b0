//! How often clients connect to a pod.

use std::time::Duration;

/// How often clients connect to a pod, as the kernel has counted it since the agent's start. Probes of the kubelet and
/// connections within the pod are not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrivals {
    /// For how long they were counted: since the agent's or the pod's start.
    pub observed: Duration,
    /// The mean of the pauses between connections over about the last minute, weighted by their length: a pause of 10 s
    /// counts ten times as much as one of 1 s. `None`: no client has connected in all that time.
    pub gap: Option<Duration>,
}
