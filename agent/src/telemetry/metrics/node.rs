//! What is read at a scrape: the node's components, its flows, and the proxy's own metrics.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use ebb_core::flow::{FlowCounts, FlowState};
use ebb_protocol::proxy_metrics::{HistogramView, ProxyMetrics};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use crate::{kernel::WorkloadCount, linux::sync::lock};

/// What the node is like at a scrape.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeMetrics {
    /// The kernel's counters of connections.
    pub(crate) counts: Vec<WorkloadCount>,
    /// What the kernel has lost, indexed by `ebb_common::LOST_…`.
    pub(crate) losses: [u64; ebb_common::LOSSES],
    /// State changes that the kernel has left out.
    pub(crate) missed_changes: u64,
    /// The flows that hold the drains under way.
    pub(crate) draining: FlowCounts,
    pub(crate) is_runtime_up: bool,
    /// `None` if the agent uses no API server.
    pub(crate) is_api_server_up: Option<bool>,
    /// `None` if ebb finds no kubelet, or cannot read its configuration.
    pub(crate) does_kubelet_use_proxy: Option<bool>,
    /// `None` if there is no proxy; an error if it does not answer.
    pub(crate) proxy: Option<Result<ProxyMetrics, ProxyAway>>,
}

/// The proxy's socket exists, and no proxy answers there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProxyAway;

/// The facts of the last scrape. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeState(Arc<Mutex<NodeMetrics>>);

impl NodeState {
    pub(super) fn set(&self, facts: NodeMetrics) {
        *lock(&self.0) = facts;
    }
}

impl Collector for NodeState {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let facts = lock(&self.0).clone();
        let mut out = Out(&mut encoder);
        let version = [("version", env!("CARGO_PKG_VERSION").to_owned())];
        out.gauges("build_info", "The agent's version.", [(version, 1)])?;
        let help = "Whether the container runtime answers.";
        out.flag("runtime_up", help, Some(facts.is_runtime_up))?;
        let help = "Whether the API server answers the watch of pods. Absent if the agent uses no API server.";
        out.flag("api_server_up", help, facts.is_api_server_up)?;
        let help =
            "Whether the kubelet is configured to use the CRI proxy. Absent if ebb cannot tell.";
        out.flag("kubelet_uses_proxy", help, facts.does_kubelet_use_proxy)?;
        let open: u64 = facts.counts.iter().map(|c| c.open).sum();
        let help =
            "Accepted TCP connections that are open on the node, those outside of pods included.";
        out.gauge("flows", help, open)?;
        let help = "Connections that hold the drains under way, by state.";
        let states = FlowState::ALL.map(|state| {
            let label = [("state", state.name().to_owned())];
            (label, u64::from(facts.draining.of(state)))
        });
        out.gauges("draining_flows", help, states)?;
        let help = "Whether the CRI proxy answers. Absent if there is no proxy on this node.";
        out.flag("proxy_up", help, facts.proxy.as_ref().map(Result::is_ok))?;
        match facts.proxy {
            Some(Ok(proxy)) => out.proxy(&proxy),
            Some(Err(ProxyAway)) | None => Ok(()),
        }
    }
}

struct Out<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl Out<'_, '_> {
    /// 1 or 0; nothing if the value is not known.
    fn flag(&mut self, name: &str, help: &str, value: Option<bool>) -> fmt::Result {
        match value {
            Some(value) => self.gauge(name, help, u64::from(value)),
            None => Ok(()),
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(family)
    }

    fn gauges<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ([(&'static str, String); N], u64)>,
    ) -> fmt::Result {
        let gauge = |value| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let values = values.into_iter().map(|(labels, n)| (labels, gauge(n)));
        self.family(name, help, MetricType::Gauge, values)
    }

    fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ([(&'static str, String); N], u64)>,
    ) -> fmt::Result {
        let values = values.into_iter();
        let values = values.map(|(labels, n)| (labels, ConstCounter::new(n)));
        self.family(name, help, MetricType::Counter, values)
    }

    fn family<const N: usize, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        metrics: impl Iterator<Item = ([(&'static str, String); N], M)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, metric) in metrics {
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn seconds(&mut self, name: &str, help: &str, histogram: &HistogramView) -> fmt::Result {
        let unit = Some(&Unit::Seconds);
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Histogram)?;
        let bounds = histogram.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(histogram.counts.iter().copied()).collect();
        let count = buckets.iter().map(|(_, n)| n).sum();
        family.encode_histogram::<NoLabelSet>(histogram.sum, count, &buckets, None)
    }

    fn proxy(&mut self, proxy: &ProxyMetrics) -> fmt::Result {
        let version = [("version", proxy.version.clone())];
        self.gauges("proxy_build_info", "The proxy's version.", [(version, 1)])?;
        let help = "Clients that are connected to the proxy, such as the kubelet.";
        self.gauge("proxy_clients", help, proxy.clients)?;
        let calls = proxy.calls.iter().map(|c| {
            let (method, outcome) = (c.method.clone(), c.outcome.clone());
            ([("method", method), ("outcome", outcome)], c.count)
        });
        let help = "Calls of the CRI that went through the proxy, by method and outcome.";
        self.counters("proxy_calls", help, calls)?;
        let help = "Stop calls that the proxy holds.";
        self.gauge("proxy_held_calls", help, proxy.held)?;
        let holds = proxy.holds.iter();
        let holds = holds.map(|h| ([("reason", h.reason.clone())], h.count));
        let help = "Stop calls that the proxy has held, by the reason of the end.";
        self.counters("proxy_holds", help, holds)?;
        let help = "How long the proxy held stop calls.";
        self.seconds("proxy_hold", help, &proxy.hold_seconds)?;
        let help = "From the arrival of a call to its sending to the runtime, of calls that were not held.";
        self.seconds("proxy_added_latency", help, &proxy.added_latency_seconds)
    }
}
