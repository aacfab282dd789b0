//! docs/metrics.md, made from the registry itself, so that the document and the agent cannot disagree.

use std::fmt::Write as _;

use ebb_core::drain_report::ReleaseReason;
use ebb_protocol::proxy_metrics::{CallCount, HoldCount, ProxyMetrics};

use super::{Exposition, Metrics, NodeMetrics, exposition::family};

/// A metric, as a scrape names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricReference {
    /// Its name, with `_total` if it is a counter.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// `seconds`, `bytes`, or nothing: then it counts things, or is 1 or 0.
    pub unit: String,
    /// The names of its labels, without the `le` of a histogram.
    pub labels: Vec<String>,
    /// What it says.
    pub help: String,
}

/// All metrics, in the order of a scrape.
///
/// # Errors
///
/// The registry can't be written as text.
pub fn metrics() -> Result<Vec<MetricReference>, std::fmt::Error> {
    let text = complete().render(facts(), Exposition::OpenMetrics)?;
    let (mut all, mut help) = (Vec::<MetricReference>::new(), "");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some((name, kind)) = family(line) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            all.push(MetricReference {
                name: format!("{name}{suffix}"),
                kind: kind.to_owned(),
                unit: String::new(),
                labels: vec![],
                help: help.to_owned(),
            });
        } else if let Some(last) = all.last_mut() {
            match line.strip_prefix("# UNIT ") {
                Some(unit) => unit
                    .rsplit(' ')
                    .next()
                    .unwrap_or_default()
                    .clone_into(&mut last.unit),
                None if line.starts_with('#') => {}
                None => last.labels = labels(line),
            }
        }
    }
    Ok(all)
}

/// Metrics in which every family has a series.
fn complete() -> Metrics {
    let metrics = Metrics::default();
    let reason = ReleaseReason::Drained.name();
    metrics.workloads.add_example(reason);
    metrics
}

fn facts() -> NodeMetrics {
    let proxy = ProxyMetrics {
        calls: vec![CallCount {
            method: "Status".into(),
            outcome: "ok".into(),
            count: 1,
        }],
        holds: vec![HoldCount {
            reason: "drained".into(),
            count: 1,
        }],
        ..ProxyMetrics::default()
    };
    NodeMetrics {
        is_api_server_up: Some(true),
        does_kubelet_use_proxy: Some(true),
        proxy: Some(Ok(proxy)),
        ..NodeMetrics::default()
    }
}

/// The names of the labels of a series.
fn labels(series: &str) -> Vec<String> {
    let inside = series
        .split_once('{')
        .and_then(|(_, rest)| rest.rsplit_once('}'));
    let labels = inside.map_or("", |(labels, _)| labels).split(',');
    let names = labels.filter_map(|label| Some(label.split_once('=')?.0));
    names
        .filter(|name| *name != "le")
        .map(str::to_owned)
        .collect()
}

/// The document.
///
/// # Errors
///
/// As [`metrics`].
pub fn document() -> Result<String, std::fmt::Error> {
    let mut out = String::from(HEAD);
    for metric in metrics()? {
        let labels: Vec<_> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
        writeln!(
            out,
            "| `{}` | {} | {} | {} | {} |",
            metric.name,
            metric.kind,
            metric.unit,
            labels.join(", "),
            metric.help
        )?;
    }
    Ok(out)
}

const HEAD: &str = "\
# Metrics

The agent serves these at `/metrics` of its node port, as OpenMetrics to clients that ask for it, else in Prometheus' text
format. Nothing is polled: a value is counted when something happens, or read when `/metrics` is. A metric without a unit
counts what its name says, or is 1 or 0.

`workload` is the name of the controller (`web` for pod `web-7f9c5d-abcde` of a Deployment), or `none` for a bare pod. An
agent keeps 512 workloads and counts further ones as `others`. No metric has a pod's name. The metrics that begin with
`ebb_proxy_` are the CRI proxy's own, which the agent reads from the proxy's socket when it is scraped; without a proxy on
the node they are absent. Flows are counted by state only while they hold a drain, because the state of every flow would
take a dump of every pod at each scrape; `ebb pods` and `ebb flows` make those dumps.

[deploy/components/monitoring](../deploy/components/monitoring) has a PodMonitor, alerts and a Grafana dashboard.

This page is made from the agent's registry; `EBB_WRITE_DOCS=1 cargo test -p ebb --test deploy metrics` writes it. In 0.1
names may still change: `ebb_holds_bypassed_total` was `ebb_holds_passed_total`, `ebb_drain_lookups_total` and
`ebb_drain_dumps_total` replace `ebb_drain_looks_total`, and the counters of drains and their flows have got `namespace`
and `workload`.

| metric | type | unit | labels | |
| --- | --- | --- | --- | --- |
";
