//! What the proxy counts, for `GET /ebb/metrics` ([`ebb_protocol::proxy_metrics`]).
//!
//! All counters are behind one lock, which is never held across an await, and the proxy has one thread. Every label has
//! a fixed set of values, so clients cannot make the memory grow.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ebb_protocol::proxy_metrics::{CallCount, HistogramView, HoldCount, ProxyMetrics};
use http::{HeaderMap, HeaderName};

/// The methods of the CRI (`runtime/v1/api.proto` of k8s.io/cri-api). Calls of others are counted as [`OTHER`].
const METHODS: [&str; 35] = [
    "/runtime.v1.ImageService/ImageFsInfo",
    "/runtime.v1.ImageService/ImageStatus",
    "/runtime.v1.ImageService/ListImages",
    "/runtime.v1.ImageService/PullImage",
    "/runtime.v1.ImageService/RemoveImage",
    "/runtime.v1.RuntimeService/Attach",
    "/runtime.v1.RuntimeService/CheckpointContainer",
    "/runtime.v1.RuntimeService/ContainerStats",
    "/runtime.v1.RuntimeService/ContainerStatus",
    "/runtime.v1.RuntimeService/CreateContainer",
    "/runtime.v1.RuntimeService/Exec",
    "/runtime.v1.RuntimeService/ExecSync",
    "/runtime.v1.RuntimeService/GetContainerEvents",
    "/runtime.v1.RuntimeService/ListContainerStats",
    "/runtime.v1.RuntimeService/ListContainers",
    "/runtime.v1.RuntimeService/ListMetricDescriptors",
    "/runtime.v1.RuntimeService/ListPodSandbox",
    "/runtime.v1.RuntimeService/ListPodSandboxMetrics",
    "/runtime.v1.RuntimeService/ListPodSandboxStats",
    "/runtime.v1.RuntimeService/PodSandboxStats",
    "/runtime.v1.RuntimeService/PodSandboxStatus",
    "/runtime.v1.RuntimeService/PortForward",
    "/runtime.v1.RuntimeService/RemoveContainer",
    "/runtime.v1.RuntimeService/RemovePodSandbox",
    "/runtime.v1.RuntimeService/ReopenContainerLog",
    "/runtime.v1.RuntimeService/RunPodSandbox",
    "/runtime.v1.RuntimeService/RuntimeConfig",
    "/runtime.v1.RuntimeService/StartContainer",
    "/runtime.v1.RuntimeService/Status",
    "/runtime.v1.RuntimeService/StopContainer",
    "/runtime.v1.RuntimeService/StopPodSandbox",
    "/runtime.v1.RuntimeService/UpdateContainerResources",
    "/runtime.v1.RuntimeService/UpdatePodSandboxResources",
    "/runtime.v1.RuntimeService/UpdateRuntimeConfig",
    "/runtime.v1.RuntimeService/Version",
];

const OTHER: &str = "other";

/// The bounds of the histogram of holds, in seconds.
const HOLD_BOUNDS: [f64; 12] = [
    0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 600.0, 3600.0,
];

/// The bounds of the histogram of added latency, in seconds. A stop waits for the agent's decision, at most 2.5 s.
const LATENCY_BOUNDS: [f64; 11] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5,
];

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CallOutcome {
    /// The runtime answered with success.
    Ok,
    /// The runtime answered with an error.
    Error,
    /// The caller got UNAVAILABLE: the runtime could not be reached, was lost during the call, or returned it itself.
    Unavailable,
    /// The runtime reset the stream.
    Reset,
    /// The caller cancelled it, or was lost.
    Cancelled,
}

impl CallOutcome {
    /// The outcome by a reply's headers or trailers, if they have it.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        Some(match headers.get(GRPC_STATUS)?.as_bytes() {
            b"0" => Self::Ok,
            b"14" => Self::Unavailable,
            _ => Self::Error,
        })
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Unavailable => "unavailable",
            Self::Reset => "reset",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The proxy's counters. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProxyCounters(Arc<Mutex<CounterState>>);

#[derive(Debug, Default)]
struct CounterState {
    clients: u64,
    calls: BTreeMap<(&'static str, CallOutcome), u64>,
    held: u64,
    holds: BTreeMap<&'static str, u64>,
    hold: BucketCounts<{ HOLD_BOUNDS.len() + 1 }>,
    latency: BucketCounts<{ LATENCY_BOUNDS.len() + 1 }>,
}

impl ProxyCounters {
    fn lock(&self) -> MutexGuard<'_, CounterState> {
        // Counters stay valid after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client has connected, until the guard is dropped.
    pub(crate) fn client(&self) -> ClientGuard {
        self.lock().clients += 1;
        ClientGuard(self.clone())
    }

    /// A call of the method at `path` has arrived.
    pub(crate) fn call(&self, path: &str) -> CallGuard {
        let found = METHODS.binary_search(&path).ok();
        let name = found.and_then(|n| METHODS[n].rsplit('/').next());
        CallGuard {
            counters: self.clone(),
            method: name.unwrap_or(OTHER),
            outcome: CallOutcome::Cancelled,
            arrived: Instant::now(),
        }
    }

    /// A stop is held. [`ProxyCounters::hold_ended`] must follow.
    pub(crate) fn hold_began(&self) {
        self.lock().held += 1;
    }

    /// A hold has ended.
    pub(crate) fn hold_ended(&self, reason: &'static str, held: Duration) {
        let mut counters = self.lock();
        counters.held = counters.held.saturating_sub(1);
        *counters.holds.entry(reason).or_default() += 1;
        counters.hold.observe(&HOLD_BOUNDS, held);
    }

    /// The counters now. The client that asks is not among the clients.
    pub(crate) fn view(&self) -> ProxyMetrics {
        let counters = self.lock();
        let calls = counters.calls.iter();
        let holds = counters.holds.iter();
        ProxyMetrics {
            version: env!("CARGO_PKG_VERSION").into(),
            clients: counters.clients.saturating_sub(1),
            calls: calls
                .map(|((method, outcome), count)| CallCount {
                    method: (*method).into(),
                    outcome: outcome.name().into(),
                    count: *count,
                })
                .collect(),
            held: counters.held,
            holds: holds
                .map(|(reason, count)| HoldCount {
                    reason: (*reason).into(),
                    count: *count,
                })
                .collect(),
            hold_seconds: counters.hold.view(&HOLD_BOUNDS),
            added_latency_seconds: counters.latency.view(&LATENCY_BOUNDS),
        }
    }
}

/// An open connection of a client.
#[derive(Debug)]
pub(crate) struct ClientGuard(ProxyCounters);

impl Drop for ClientGuard {
    fn drop(&mut self) {
        let mut counters = self.0.lock();
        counters.clients = counters.clients.saturating_sub(1);
    }
}

/// A call. It is counted when the guard is dropped: as cancelled, unless another outcome was set.
#[derive(Debug)]
pub(crate) struct CallGuard {
    counters: ProxyCounters,
    method: &'static str,
    outcome: CallOutcome,
    arrived: Instant,
}

impl CallGuard {
    /// The call is sent to the runtime now, and was not held.
    pub(crate) fn sent(&self) {
        let latency = self.arrived.elapsed();
        let mut state = self.counters.lock();
        state.latency.observe(&LATENCY_BOUNDS, latency);
    }

    pub(crate) const fn set(&mut self, outcome: CallOutcome) {
        self.outcome = outcome;
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        let mut counters = self.counters.lock();
        *counters
            .calls
            .entry((self.method, self.outcome))
            .or_default() += 1;
    }
}

/// A histogram with `N` buckets, the last of which has no bound.
#[derive(Debug)]
struct BucketCounts<const N: usize> {
    counts: [u64; N],
    sum: Duration,
}

impl<const N: usize> Default for BucketCounts<N> {
    fn default() -> Self {
        Self {
            counts: [0; N],
            sum: Duration::ZERO,
        }
    }
}

impl<const N: usize> BucketCounts<N> {
    fn observe(&mut self, bounds: &[f64], value: Duration) {
        let bucket = bounds.partition_point(|bound| *bound < value.as_secs_f64());
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum = self.sum.saturating_add(value);
    }

    fn view(&self, bounds: &[f64]) -> HistogramView {
        HistogramView {
            bounds: bounds.to_vec(),
            counts: self.counts.to_vec(),
            sum: self.sum.as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_of_the_cri_is_named_and_any_other_is_not() {
        assert!(METHODS.is_sorted(), "the search needs an order");
        let counters = ProxyCounters::default();
        for path in METHODS {
            assert_ne!(counters.call(path).method, OTHER, "{path}");
        }
        for n in 0..1000 {
            assert_eq!(counters.call(&format!("/a.B/{n}")).method, OTHER);
        }
        let calls = counters.view().calls;
        assert_eq!(calls.len(), METHODS.len() + 1);
        let other = calls.iter().find(|c| c.method == OTHER).unwrap();
        assert_eq!((other.outcome.as_str(), other.count), ("cancelled", 1000));
    }

    #[test]
    fn a_value_is_counted_in_the_first_bucket_that_it_fits() {
        let mut histogram = BucketCounts::<3>::default();
        for ms in [1, 1000, 1001, 5000] {
            histogram.observe(&[1.0, 2.0], Duration::from_millis(ms));
        }
        let view = histogram.view(&[1.0, 2.0]);
        assert_eq!(view.counts, [2, 1, 1]);
        assert!((view.sum - 7.002).abs() < 1e-9, "{}", view.sum);
    }

    #[test]
    fn a_hold_counts_while_it_lasts_and_by_its_end() {
        let counters = ProxyCounters::default();
        counters.hold_began();
        assert_eq!((counters.view().held, counters.view().holds.len()), (1, 0));
        counters.hold_ended("drained", Duration::from_secs(3));
        let view = counters.view();
        assert_eq!((view.held, view.holds[0].count), (0, 1));
        assert_eq!(view.hold_seconds.counts.iter().sum::<u64>(), 1);
    }
}
