//! The proxy's metrics, as it gives them to the agent, whose `/metrics` shows them.
//!
//! The proxy answers `GET /ebb/metrics` on its CRI socket with a [`ProxyMetrics`] as JSON. So it needs no port, no
//! other socket and no agent, and only root can ask. A call of the CRI is a POST to `/SERVICE/METHOD`, so the path is
//! never one of the runtime's.

use serde::{Deserialize, Serialize};

/// The path on the proxy's socket.
pub const PROXY_METRICS_PATH: &str = "/ebb/metrics";

/// What a proxy has counted since its start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProxyMetrics {
    /// The proxy's version.
    pub version: String,
    /// Open connections of clients, without the one of this request.
    pub clients: u64,
    /// The calls that have ended.
    pub calls: Vec<CallCount>,
    /// The stop calls that are held now.
    pub held: u64,
    /// The holds that have ended.
    pub holds: Vec<HoldCount>,
    /// How long stop calls were held.
    pub hold_seconds: HistogramView,
    /// From the arrival of a call to its sending to the runtime, of calls that were not held.
    pub added_latency_seconds: HistogramView,
}

/// How many calls of a method had an outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallCount {
    /// The method of the CRI, or `other`.
    pub method: String,
    /// The outcome.
    pub outcome: String,
    /// How many.
    pub count: u64,
}

/// How many holds had an end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldCount {
    /// Why they ended.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// A histogram.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HistogramView {
    /// The upper bounds of the buckets, without infinity.
    pub bounds: Vec<f64>,
    /// How many values are in each bucket and in no lower one. One element more than `bounds`: the last bucket has the
    /// values above all bounds.
    pub counts: Vec<u64>,
    /// The sum of the values.
    pub sum: f64,
}
