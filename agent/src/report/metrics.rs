//! Prometheus metrics (`GET /metrics` on the node port).

use std::sync::atomic::{AtomicI64, AtomicU64};

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

use crate::{drain::report::Report, kernel::WorkloadCount};

/// Why a drain ended. From a fixed set of words, so that a label can't grow without bound.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// What was lost.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// Who opened the flows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Direction {
    direction: &'static str,
}

/// The agent's metrics.
pub struct Metrics {
    registry: Registry,
    drains: Family<Reason, Counter<u64, AtomicU64>>,
    held: Histogram,
    cut: Counter<u64, AtomicU64>,
    late: Counter<u64, AtomicU64>,
    passes: Family<Reason, Counter<u64, AtomicU64>>,
    active: Gauge<i64, AtomicI64>,
    flows: Family<Direction, Gauge<i64, AtomicI64>>,
    lost: Family<Kind, Gauge<i64, AtomicI64>>,
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
            passes: Family::default(),
            active: Gauge::default(),
            flows: Family::default(),
            lost: Family::default(),
            registry: Registry::default(),
        };
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
            "holds_passed",
            "Calls that were not held, by reason",
            metrics.passes.clone(),
        );
        r.register("drains_active", "Drains under way", metrics.active.clone());
        r.register(
            "flows",
            "TCP flows on the node, by direction",
            metrics.flows.clone(),
        );
        r.register(
            "kernel_losses",
            "What the BPF programs could not record, since the start",
            metrics.lost.clone(),
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
    }

    /// A call was not held.
    pub fn passed(&self, why: &'static str) {
        self.passes.get_or_create(&Reason { reason: why }).inc();
    }

    /// The exposition text, with the kernel's counters of this moment.
    ///
    /// # Errors
    ///
    /// Formatting failed, which a string does not.
    pub fn render(
        &self,
        counts: &[WorkloadCount],
        losses: [u64; ebb_common::LOSSES],
    ) -> Result<String, std::fmt::Error> {
        let sum = |of: fn(&WorkloadCount) -> i64| counts.iter().map(of).sum();
        let flows = |direction| self.flows.get_or_create_owned(&Direction { direction });
        flows("inbound").set(sum(|c| c.inbound));
        flows("outbound").set(sum(|c| c.outbound));
        for (kind, n) in ["storage", "workload", "event"].into_iter().zip(losses) {
            let n = i64::try_from(n).unwrap_or(i64::MAX);
            self.lost.get_or_create_owned(&Kind { kind }).set(n);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
