//! Telling the world about drains. The one place where a drain's beginning and end become a log line and
//! metrics, so that they can't disagree.

use std::{fmt::Write as _, sync::Arc};

use tokio::sync::mpsc;

use super::{metrics::Metrics, table::by_state, text::duration};
use crate::drain::{driver::DrainNotice, report::Report};

/// Tells until there is nobody left to tell of.
pub async fn tell(mut notices: mpsc::UnboundedReceiver<DrainNotice>, metrics: Arc<Metrics>) {
    while let Some(notice) = notices.recv().await {
        match notice {
            DrainNotice::Began(report) => {
                metrics.drain_began();
                for warning in &report.warnings {
                    tracing::warn!(pod = %report.pod, "{warning}");
                }
                tracing::info!(pod = %report.pod, "{}", began(&report));
            }
            DrainNotice::Finished(report) => {
                metrics.drain_ended(&report);
                tracing::info!(pod = %report.pod, "{}", finished(&report));
            }
        }
    }
}

fn began(r: &Report) -> String {
    format!(
        "drain started: until {}, {} at most",
        r.until,
        duration(r.deadline_ms)
    )
}

/// One line: why it ended, after how long, and what became of the flows.
fn finished(r: &Report) -> String {
    let reason = r.reason.map_or("unknown", |r| r.name());
    let mut line = format!("released ({reason}) after {}", duration(r.held_ms));
    // Writing to a string does not fail.
    if let Some(flows) = &r.flows_at_start {
        let _ = write!(line, ": {} at start", by_state(flows));
    }
    let _ = match (r.arrived, r.ended, r.cut_total) {
        (Some(arrived), Some(ended), Some(cut)) => {
            write!(line, ", {arrived} arrived, {ended} ended, {cut} cut")
        }
        _ => write!(line, ", nobody could see its connections"),
    };
    for c in r.cut.iter().take(3) {
        let _ = write!(line, "; cut {} {}", c.remote, c.state);
    }
    if let Some(detail) = &r.detail {
        let _ = write!(line, " ({detail})");
    }
    line
}
