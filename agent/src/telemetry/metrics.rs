//! Prometheus metrics (`GET /metrics` on the node port).
//!
//! Values are counted at events or read at a scrape ([`NodeMetrics`]); nothing polls. docs/metrics.md lists them, made by
//! [`reference`] from the registry itself.

pub(crate) mod exposition;
mod node;
mod process;
pub mod reference;

use std::{
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::Duration,
};

use ebb_core::drain_report::{DumpReason, ReleaseReason, Report};
use ebb_protocol::hold::BypassReason;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

pub(crate) use self::node::{NodeMetrics, ProxyAway};
use self::{exposition::Exposition, node::NodeState, process::OwnProcess};
use super::{events::DropReason, workloads::Workloads};

type CounterFamily<L> = Family<L, Counter<u64, AtomicU64>>;

/// Why a drain ended, a dump was needed or an Event was dropped. The values are a fixed set, which bounds the series.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// Why a call was forwarded without a hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BypassLabels {
    reason: &'static str,
    evidence: &'static str,
}

/// The names of `ebb_common::LOST_…`.
const LOSS_KINDS: [&str; ebb_common::LOSSES] = ["event", "count"];

/// What was lost.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// The buckets of the histogram of holds, in seconds.
const HOLD_BUCKETS: [f64; 12] = [
    0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 600.0, 3600.0,
];

/// The buckets of the histogram of settle phases, in seconds.
const SETTLE_BUCKETS: [f64; 11] = [0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 15.0, 30.0, 60.0];

/// The buckets of the histogram of release lags, in seconds.
const LAG_BUCKETS: [f64; 10] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5,
];

/// The agent's metrics.
#[derive(Debug)]
pub struct Metrics {
    /// The names begin with `ebb_`.
    own: Registry,
    /// The names begin with `process_`, as those of every Prometheus client.
    process: Registry,
    settle: Histogram,
    hold: Histogram,
    observed_hold: Histogram,
    lag: Histogram,
    lookups: Counter<u64, AtomicU64>,
    dumps: CounterFamily<ReasonLabel>,
    bypasses: CounterFamily<BypassLabels>,
    active: Gauge<i64, AtomicI64>,
    lost: CounterFamily<KindLabel>,
    missed: Counter<u64, AtomicU64>,
    events_dropped: CounterFamily<ReasonLabel>,
    node: NodeState,
    /// Connections, drains and pods by workload.
    pub(crate) workloads: Workloads,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            own: Registry::with_prefix("ebb"),
            process: Registry::with_prefix("process"),
            settle: Histogram::new(SETTLE_BUCKETS),
            hold: Histogram::new(HOLD_BUCKETS),
            observed_hold: Histogram::new(HOLD_BUCKETS),
            lag: Histogram::new(LAG_BUCKETS),
            lookups: Counter::default(),
            dumps: Family::default(),
            bypasses: Family::default(),
            active: Gauge::default(),
            lost: Family::default(),
            missed: Counter::default(),
            events_dropped: Family::default(),
            node: NodeState::default(),
            workloads: Workloads::default(),
        };
        metrics.create_series();
        metrics.register();
        metrics
    }
}

impl Metrics {
    /// Creates the series whose labels are known, at 0: `increase()` does not see the first value of a series.
    fn create_series(&self) {
        for reason in DumpReason::ALL.map(DumpReason::name) {
            drop(self.dumps.get_or_create(&ReasonLabel { reason }));
        }
        for reason in DropReason::ALL.map(DropReason::name) {
            drop(self.events_dropped.get_or_create(&ReasonLabel { reason }));
        }
        for why in BypassReason::ALL {
            drop(
                self.bypasses
                    .get_or_create(&BypassLabels::of(why.name(), None)),
            );
        }
        for kind in LOSS_KINDS {
            drop(self.lost.get_or_create(&KindLabel { kind }));
        }
    }

    fn register(&mut self) {
        let r = &mut self.own;
        r.register_collector(Box::new(self.node.clone()));
        r.register_collector(Box::new(self.workloads.clone()));
        let help = "Drains under way";
        r.register("drains_active", help, self.active.clone());
        let help = "How long the settle phase of drains lasted, of those whose settle phase ended before the release";
        r.register_with_unit("drain_settle", help, Unit::Seconds, self.settle.clone());
        let help = "How long drains were held, until their release";
        r.register_with_unit("drain_hold", help, Unit::Seconds, self.hold.clone());
        let help = "How long drains that were only observed would have been held, without those whose containers exited first";
        let observed = self.observed_hold.clone();
        r.register_with_unit("observed_drain_hold", help, Unit::Seconds, observed);
        let help = "From the close of the last connection to the release, of drains that such a close ended";
        r.register_with_unit("drain_release_lag", help, Unit::Seconds, self.lag.clone());
        let help = "Dumps of the connections of draining pods, by reason";
        r.register("drain_dumps", help, self.dumps.clone());
        let help = "Rounds of lookups of connections of draining pods, in place of a dump";
        r.register("drain_lookups", help, self.lookups.clone());
        let help = "Stops that were forwarded without a hold, by reason, and by the evidence against a termination";
        r.register("holds_bypassed", help, self.bypasses.clone());
        let help = "Events and counts that the BPF programs could not record because a buffer or a map was full, by kind";
        r.register("kernel_losses", help, self.lost.clone());
        let help = "State changes of TCP sockets for which the kernel did not run the program because it was running already";
        r.register("missed_changes", help, self.missed.clone());
        let help = "Kubernetes Events that were not written, by reason";
        r.register("events_dropped", help, self.events_dropped.clone());
        self.process.register_collector(Box::new(OwnProcess));
    }

    pub(crate) fn drain_began(&self) {
        self.active.inc();
    }

    pub(crate) fn drain_ended(&self, report: &Report) {
        self.active.dec();
        self.workloads.drain_ended(report);
        let seconds = |ms| Duration::from_millis(ms).as_secs_f64();
        self.hold.observe(seconds(report.held_ms));
        if let Some(ms) = report.settled_ms {
            self.settle.observe(seconds(ms));
        }
        if let Some(lag) = report.release_lag_us {
            self.lag.observe(Duration::from_micros(lag).as_secs_f64());
        }
        self.lookups.inc_by(report.lookups.into());
        for (reason, n) in &report.dumps {
            let reason = reason.name();
            let dumps = self.dumps.get_or_create(&ReasonLabel { reason });
            dumps.inc_by((*n).into());
        }
    }

    /// Counts a drain that was only observed.
    pub(crate) fn drain_observed(&self, report: &Report) {
        self.workloads.drain_observed(report);
        if report.reason != Some(ReleaseReason::Exited) {
            let held = Duration::from_millis(report.held_ms);
            self.observed_hold.observe(held.as_secs_f64());
        }
    }

    /// Counts a call that was forwarded without a hold.
    pub(crate) fn bypassed(&self, reason: &'static str, evidence: Option<&'static str>) {
        let labels = BypassLabels::of(reason, evidence);
        self.bypasses.get_or_create(&labels).inc();
    }

    pub(crate) fn event_dropped(&self, why: DropReason) {
        let reason = why.name();
        let dropped = self.events_dropped.get_or_create(&ReasonLabel { reason });
        dropped.inc();
    }

    /// The text of all metrics.
    pub(crate) fn render(
        &self,
        facts: NodeMetrics,
        exposition: Exposition,
    ) -> Result<String, std::fmt::Error> {
        self.workloads.count(&facts.counts);
        // The kernel counts these two.
        for (kind, n) in LOSS_KINDS.into_iter().zip(facts.losses) {
            let counter = self.lost.get_or_create_owned(&KindLabel { kind });
            counter.inner().store(n, Ordering::Relaxed);
        }
        let missed = self.missed.inner();
        missed.store(facts.missed_changes, Ordering::Relaxed);
        self.node.set(facts);
        let mut rendered = String::new();
        text::encode_registry(&mut rendered, &self.own)?;
        text::encode_registry(&mut rendered, &self.process)?;
        text::encode_eof(&mut rendered)?;
        Ok(exposition.of(rendered))
    }
}

impl BypassLabels {
    fn of(reason: &'static str, evidence: Option<&'static str>) -> Self {
        Self {
            reason,
            evidence: evidence.unwrap_or("none"),
        }
    }
}
