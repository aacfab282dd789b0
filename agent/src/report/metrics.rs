//! Prometheus metrics (`GET /metrics` on the node port).

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::events::Dropped;
use crate::{audits, drain::report::Report, kernel::WorkloadCount};

/// Why a drain ended, or an Event was dropped. From a fixed set of words, so that a label can't grow without bound.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Why a call was not held.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Passed {
    reason: &'static str,
    evidence: &'static str,
}

/// The names of `ebb_common::LOST_…`.
const LOSS_KINDS: [&str; ebb_common::LOSSES] = ["storage", "workload", "event", "listener"];

/// What was lost, or looked at how.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// What became of something.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// The agent's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    drains: Family<Reason, Counter<u64, AtomicU64>>,
    held: Histogram,
    cut: Counter<u64, AtomicU64>,
    late: Counter<u64, AtomicU64>,
    looks: Family<Kind, Counter<u64, AtomicU64>>,
    passes: Family<Passed, Counter<u64, AtomicU64>>,
    active: Gauge<i64, AtomicI64>,
    flows: Gauge<i64, AtomicI64>,
    lost: Family<Kind, Counter<u64, AtomicU64>>,
    drift: Counter<u64, AtomicU64>,
    audits: Family<Outcome, Counter<u64, AtomicU64>>,
    events_dropped: Family<Reason, Counter<u64, AtomicU64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("ebb");
        let held = Histogram::new(exponential_buckets(0.1, 2.0, 14));
        let metrics = Self {
            drains: Family::default(),
            held: held.clone(),
            cut: Counter::default(),
            late: Counter::default(),
            looks: Family::default(),
            passes: Family::default(),
            active: Gauge::default(),
            flows: Gauge::default(),
            lost: Family::default(),
            drift: Counter::default(),
            audits: Family::default(),
            events_dropped: Family::default(),
            registry: Registry::default(),
        };
        for outcome in audits::Outcome::ALL.map(audits::Outcome::name) {
            drop(metrics.audits.get_or_create(&Outcome { outcome }));
        }
        let r = &mut registry;
        r.register(
            "drains",
            "Drains that ended, by reason",
            metrics.drains.clone(),
        );
        r.register_with_unit(
            "drain_hold",
            "How long drains were held",
            Unit::Seconds,
            held,
        );
        r.register(
            "flows_cut",
            "Flows still open at the release",
            metrics.cut.clone(),
        );
        r.register(
            "flows_late",
            "Flows opened during a drain",
            metrics.late.clone(),
        );
        r.register(
            "drain_looks",
            "Looks at the connections of draining pods, by kind: walks of all connections of the node, or lookups",
            metrics.looks.clone(),
        );
        r.register(
            "holds_passed",
            "Calls that were not held, by reason, and by the evidence where they were not known to be a pod's end",
            metrics.passes.clone(),
        );
        r.register("drains_active", "Drains under way", metrics.active.clone());
        r.register(
            "flows",
            "Inbound TCP flows on the node",
            metrics.flows.clone(),
        );
        r.register(
            "kernel_losses",
            "What the BPF programs could not record, since the start",
            metrics.lost.clone(),
        );
        r.register(
            "accounting_drift",
            "Flows by which the counters differed from the kernel's tables",
            metrics.drift.clone(),
        );
        r.register(
            "audits",
            "Audits of pods whose drains were over, by outcome",
            metrics.audits.clone(),
        );
        r.register(
            "events_dropped",
            "Kubernetes Events that were not written, by reason",
            metrics.events_dropped.clone(),
        );
        Self {
            registry,
            ..metrics
        }
    }
}

impl Metrics {
    /// A drain began.
    pub fn drain_began(&self) {
        self.active.inc();
    }

    /// A drain ended.
    pub fn drain_ended(&self, report: &Report) {
        self.active.dec();
        let reason = report.reason.map_or("unknown", |r| r.name());
        self.drains.get_or_create(&Reason { reason }).inc();
        self.held
            .observe(std::time::Duration::from_millis(report.held_ms).as_secs_f64());
        self.cut.inc_by(report.cut_total.unwrap_or(0).into());
        self.late.inc_by(report.arrived.unwrap_or(0).into());
        for (kind, n) in [("walk", report.walks), ("lookup", report.lookups)] {
            self.looks.get_or_create(&Kind { kind }).inc_by(n.into());
        }
    }

    /// A call was not held.
    pub fn passed(&self, reason: &'static str, evidence: Option<&'static str>) {
        let evidence = evidence.unwrap_or("none");
        self.passes
            .get_or_create(&Passed { reason, evidence })
            .inc();
    }

    /// An audit after a drain was made, or was not.
    pub(crate) fn audited(&self, outcome: audits::Outcome) {
        let outcome = outcome.name();
        self.audits.get_or_create(&Outcome { outcome }).inc();
    }

    /// An Event was not written.
    pub fn event_dropped(&self, why: Dropped) {
        let reason = why.name();
        self.events_dropped.get_or_create(&Reason { reason }).inc();
    }

    /// The exposition text, with the kernel's counters of this moment, its losses by `ebb_common::LOST_…`, and by
    /// how many flows audits have found the counters wrong.
    ///
    /// # Errors
    ///
    /// Formatting failed, which a string does not.
    pub fn render(
        &self,
        counts: &[WorkloadCount],
        losses: [u64; ebb_common::LOSSES],
        drift: u64,
    ) -> Result<String, std::fmt::Error> {
        self.flows.set(counts.iter().map(|c| c.inbound).sum());
        // These two are counted elsewhere.
        for (kind, n) in LOSS_KINDS.into_iter().zip(losses) {
            let counter = self.lost.get_or_create_owned(&Kind { kind });
            counter.inner().store(n, Ordering::Relaxed);
        }
        self.drift.inner().store(drift, Ordering::Relaxed);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
