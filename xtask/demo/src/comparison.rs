//! Compares both rounds.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::clients::{ClientKind, RequestCounts};
use serde::Serialize;
use serde_json::Value;

use crate::round::Round;

/// The round with ebb, and ebb's report of the drain.
pub(crate) struct WithEbb {
    pub(crate) round: Round,
    pub(crate) report: Value,
}

/// What `--json` prints: only measurements of this run.
#[derive(Serialize)]
pub(crate) struct Comparison {
    without: RoundSummary,
    with: EbbRoundSummary,
}

#[derive(Serialize)]
struct RoundSummary {
    requests: u64,
    failed: u64,
    stop_ms: u128,
    by_kind: BTreeMap<ClientKind, RequestCounts>,
}

#[derive(Serialize)]
struct EbbRoundSummary {
    #[serde(flatten)]
    round: RoundSummary,
    /// How long the hold lasted.
    held_ms: u64,
    /// From the last close, by the kernel's time stamp, to the release.
    release_lag_us: u64,
    /// Flows that held the drain at its start, by state.
    flows_at_start: Value,
    /// ebb's complete report.
    report: Value,
}

impl RoundSummary {
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

impl Comparison {
    pub(crate) fn new(without: &Round, with: &WithEbb) -> Result<Self> {
        let number = |field: &str| {
            with.report[field]
                .as_u64()
                .with_context(|| format!("ebb's report has no {field}: {}", with.report))
        };
        Ok(Self {
            without: RoundSummary::new(without),
            with: EbbRoundSummary {
                round: RoundSummary::new(&with.round),
                held_ms: number("held_ms")?,
                release_lag_us: number("release_lag_us")?,
                flows_at_start: with.report["flows_at_start"].clone(),
                report: with.report.clone(),
            },
        })
    }

    /// Fails unless requests failed without ebb, and none with it.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(
            self.without.failed > 0,
            "no request failed without ebb: this run shows nothing"
        );
        ensure!(
            self.with.round.failed == 0,
            "{} of {} requests failed with ebb",
            self.with.round.failed,
            self.with.round.requests
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
            let cell = |side: &RoundSummary| {
                let t = side.by_kind.get(kind).cloned().unwrap_or_default();
                format!("{} of {}", t.failed, t.requests)
            };
            row(label(*kind), cell(&self.without), cell(&self.with.round));
        }
        let all = |s: &RoundSummary| format!("{} of {}", s.failed, s.requests);
        row(
            "failed requests in all",
            all(&self.without),
            all(&self.with.round),
        );
        let seconds = |ms: u128| format!("{}.{} s", ms / 1000, ms % 1000 / 100);
        row(
            "pod stopped after",
            seconds(self.without.stop_ms),
            seconds(self.with.round.stop_ms),
        );
        row("held for", "-".into(), seconds(self.with.held_ms.into()));
        row(
            "last close to release",
            "-".into(),
            format!("{} µs", self.with.release_lag_us),
        );
        for (kind, counts) in &self.without.by_kind {
            for (error, times) in &counts.errors {
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

const fn label(kind: ClientKind) -> &'static str {
    match kind {
        ClientKind::Download => "failed slow downloads",
        ClientKind::Slow => "failed slow requests",
        ClientKind::Idle => "failed requests on idle keep-alive",
        ClientKind::Stale => "failed requests of stale clients",
        ClientKind::Backlog => "failed requests in accept backlog",
    }
}
