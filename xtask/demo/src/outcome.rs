//! The comparison.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context as _, Result, ensure};
use ebb_node::clients::{Kind, Tally};
use serde::Serialize;
use serde_json::Value;

use crate::round::Round;

/// The round with ebb, and what ebb reported of it.
pub(crate) struct WithEbb {
    pub(crate) round: Round,
    pub(crate) report: Value,
}

/// What `--json` prints. Everything in it was measured in this run.
#[derive(Serialize)]
pub(crate) struct Outcome {
    without: Side,
    with: With,
}

#[derive(Serialize)]
struct Side {
    requests: u64,
    failed: u64,
    stop_ms: u128,
    by_kind: BTreeMap<Kind, Tally>,
}

#[derive(Serialize)]
struct With {
    #[serde(flatten)]
    side: Side,
    /// How long the hold lasted.
    held_ms: u64,
    /// Last close seen by the kernel to hold released.
    release_lag_us: u64,
    /// Flows that held at the beginning, by state.
    flows_at_start: Value,
    /// ebb's whole report.
    report: Value,
}

impl Side {
    fn new(round: &Round) -> Self {
        let total = round.total();
        Self {
            requests: total.requests,
            failed: total.failed,
            stop_ms: round.stop.as_millis(),
            by_kind: round.tallies.clone(),
        }
    }
}

impl Outcome {
    pub(crate) fn new(without: &Round, with: &WithEbb) -> Result<Self> {
        let number = |field: &str| {
            with.report[field]
                .as_u64()
                .with_context(|| format!("ebb's report has no {field}: {}", with.report))
        };
        Ok(Self {
            without: Side::new(without),
            with: With {
                side: Side::new(&with.round),
                held_ms: number("held_ms")?,
                release_lag_us: number("release_lag_us")?,
                flows_at_start: with.report["flows_at_start"].clone(),
                report: with.report.clone(),
            },
        })
    }

    /// The demo has shown what it is for, or it has failed.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(
            self.without.failed > 0,
            "no request failed without ebb: this run shows nothing"
        );
        ensure!(
            self.with.side.failed == 0,
            "{} of {} requests failed with ebb",
            self.with.side.failed,
            self.with.side.requests
        );
        Ok(())
    }

    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(out, "\n{:<34}{:>14}{:>14}", "", "without ebb", "with ebb");
        let mut row = |what: &str, without: String, with: String| {
            let _ = writeln!(out, "{what:<34}{without:>14}{with:>14}");
        };
        for kind in self.without.by_kind.keys() {
            let cell = |side: &Side| {
                let t = side.by_kind.get(kind).cloned().unwrap_or_default();
                format!("{} of {}", t.failed, t.requests)
            };
            row(label(*kind), cell(&self.without), cell(&self.with.side));
        }
        let all = |s: &Side| format!("{} of {}", s.failed, s.requests);
        row(
            "failed requests in all",
            all(&self.without),
            all(&self.with.side),
        );
        let seconds = |ms: u128| format!("{}.{} s", ms / 1000, ms % 1000 / 100);
        row(
            "pod stopped after",
            seconds(self.without.stop_ms),
            seconds(self.with.side.stop_ms),
        );
        row("held for", "-".into(), seconds(self.with.held_ms.into()));
        row(
            "last close to release",
            "-".into(),
            format!("{} µs", self.with.release_lag_us),
        );
        for (kind, tally) in &self.without.by_kind {
            for (error, times) in &tally.errors {
                let _ = writeln!(
                    out,
                    "without ebb: {}: {error} ({times} times)",
                    label(*kind)
                );
            }
        }
        out
    }
}

const fn label(kind: Kind) -> &'static str {
    match kind {
        Kind::Download => "failed slow downloads",
        Kind::Slow => "failed slow requests",
        Kind::Idle => "failed requests on idle keep-alive",
        Kind::Stale => "failed requests of stale clients",
        Kind::Backlog => "failed requests in accept backlog",
    }
}
