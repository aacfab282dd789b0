//! `ebb wait`.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use ebb_core::{
    drain_report::{ReleaseReason, Report},
    format::duration,
    policy::Until,
};
use ebb_protocol::{
    table::{RenderedTable, TableStyle, drains},
    views::{DrainList, SCHEMA, WaitOutcome, WaitReply},
};

use super::output::{Document, ViewFlags};

/// What the agent may take on top of the timeout.
const MARGIN: Duration = Duration::from_secs(10);

#[derive(Args)]
pub(super) struct WaitFlags {
    /// The pod: its whole name, NAMESPACE/NAME or UID. Its drain begins, unless it has begun.
    pub(super) pod: String,
    /// Wait only until the drain has reached this: zero, idle or settled. The drain goes on.
    #[arg(long, value_name = "WHAT")]
    until: Option<Until>,
    /// Wait no longer than this, such as 30s.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    pub(super) view: ViewFlags,
}

/// The pod has not drained.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct NotDrained(String);

pub(super) async fn run(flags: &WaitFlags) -> Result<()> {
    let timeout = flags
        .timeout
        .map(|t| humantime::format_duration(t).to_string());
    let until = flags.until.map(|until| until.name().to_owned());
    let query = [
        ("pod", Some(flags.view.scope.pod(&flags.pod)?)),
        ("until", until),
        ("timeout", timeout),
    ];
    let query = query
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    let query = serde_urlencoded::to_string(query.collect::<Vec<_>>())?;
    let within = flags.timeout.map(|timeout| timeout.saturating_add(MARGIN));
    let client = flags.view.agent.client();
    let reply: WaitReply = client
        .get_json_within(&format!("/v1/wait?{query}"), within)
        .await?;
    flags.view.print(&reply)?;
    not_drained(&reply).map_or(Ok(()), |why| Err(NotDrained(why).into()))
}

/// Why the pod has not drained, if it has not.
fn not_drained(reply: &WaitReply) -> Option<String> {
    let Report {
        pod,
        reason,
        cut_total,
        held_ms,
        ..
    } = &reply.report;
    let after = duration(*held_ms);
    match (reply.outcome, reason) {
        (WaitOutcome::Reached, _) | (_, Some(ReleaseReason::Drained)) => None,
        (WaitOutcome::Observed, None) => Some(format!(
            "ebb only observes {pod} (ebb.dev/drain: observe), so nothing waits for its drain"
        )),
        (_, None) => Some(format!("{pod} has not drained after {after}")),
        (_, Some(ReleaseReason::NotTerminating)) => Some(format!(
            "{pod} is not being deleted, so ebb ended the wait after {after}"
        )),
        (_, Some(reason)) => Some(match cut_total {
            Some(n @ 1..) => format!("{pod} has not drained: {reason} after {after}, {n} cut"),
            _ => format!("{pod} has not drained: {reason} after {after}"),
        }),
    }
}

impl Document for WaitReply {
    fn names(&self) -> Vec<String> {
        vec![self.report.pod.to_string()]
    }

    fn text(&self, style: TableStyle) -> RenderedTable {
        let list = DrainList {
            schema: SCHEMA.into(),
            version: 0,
            drains: vec![self.report.clone()],
        };
        drains(&list, style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::drain_report::testing::report;

    #[test]
    fn only_a_pod_that_has_drained_or_reached_until_is_a_success() {
        let of = |reason, outcome, cut| {
            not_drained(&WaitReply {
                schema: SCHEMA.into(),
                outcome,
                report: Report {
                    cut_total: Some(cut),
                    ..report(reason)
                },
            })
        };
        let released = WaitOutcome::Released;
        assert_eq!(of(Some(ReleaseReason::Drained), released, 0), None);
        assert_eq!(of(None, WaitOutcome::Reached, 0), None);
        let says = |reason, outcome, cut, text: &str| {
            let why = of(reason, outcome, cut).unwrap();
            assert!(why.contains(text), "{why}");
        };
        says(None, WaitOutcome::Timeout, 0, "has not drained after 8.2s");
        says(None, WaitOutcome::Observed, 0, "only observes shop/web");
        says(
            Some(ReleaseReason::Deadline),
            released,
            3,
            "deadline after 8.2s, 3 cut",
        );
        says(
            Some(ReleaseReason::Manual),
            released,
            0,
            "manual after 8.2s",
        );
        says(
            Some(ReleaseReason::NotTerminating),
            released,
            0,
            "is not being deleted",
        );
    }
}
