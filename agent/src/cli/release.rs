//! `ebb release`.

use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;
use ebb_core::{drain_report::Report, format::duration};
use ebb_protocol::{
    table::age,
    views::{ReleaseRequest, Released},
};

use super::output::ViewFlags;

#[derive(Args)]
pub(super) struct ReleaseFlags {
    /// The pod: its whole name, NAMESPACE/NAME or UID. A prefix does not match, because the stop that follows cuts the
    /// pod's connections.
    pub(super) pod: String,
    #[command(flatten)]
    pub(super) view: ViewFlags,
}

pub(super) async fn run(flags: &ReleaseFlags) -> Result<()> {
    let request = ReleaseRequest {
        pod: flags.view.scope.pod(&flags.pod)?,
    };
    let client = flags.view.agent.client();
    let released: Released = client.post_json("/v1/release", &request).await?;
    flags.view.print(&released)
}

/// What was released after how long, and what is still open.
pub(super) fn text(r: &Report) -> String {
    let mut out = format!(
        "{}: released after {} of at most {}\n",
        r.pod,
        duration(r.held_ms),
        duration(r.deadline_ms)
    );
    // Writing to a string does not fail.
    let _ = match r.cut_total {
        None => writeln!(out, "ebb cannot see which connections are still open"),
        Some(0) => writeln!(out, "no connection is open"),
        Some(1) => writeln!(
            out,
            "1 connection is still open, and the stop that follows cuts it:"
        ),
        Some(n) => writeln!(
            out,
            "{n} connections are still open, and the stop that follows cuts them:"
        ),
    };
    for c in &r.cut {
        let open = age(c.age_ms, c.age_at_least_ms);
        let _ = writeln!(out, "  {}  {}, open for {open}", c.peer_text(), c.state);
    }
    let listed = u32::try_from(r.cut.len()).unwrap_or(u32::MAX);
    match r.cut_total.unwrap_or(0).saturating_sub(listed) {
        0 => {}
        n => {
            let _ = writeln!(out, "  and {n} more");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::{
        drain_report::{CutFlow, ReleaseReason, testing::report},
        flow::FlowState,
    };

    #[test]
    fn a_release_says_what_was_held_how_long_and_what_is_still_open() {
        let mut r = report(Some(ReleaseReason::Manual));
        r.cut_total = Some(0);
        let pod = r.pod.to_string();
        assert_eq!(
            text(&r),
            format!("{pod}: released after 8.2s of at most 25.0s\nno connection is open\n")
        );
        r.cut_total = Some(3);
        let flow = CutFlow {
            remote: "10.0.0.7:5000".parse().unwrap(),
            peer: None,
            local: "10.0.0.1:80".parse().unwrap(),
            state: FlowState::Active,
            age_ms: None,
            age_at_least_ms: Some(4_000),
            bytes_in: 1,
            bytes_out: 2,
        };
        r.cut = vec![flow.clone(), flow];
        let said = text(&r);
        assert!(
            said.ends_with(
                "3 connections are still open, and the stop that follows cuts them:\n  \
                 10.0.0.7:5000  active, open for >4.0s\n  10.0.0.7:5000  active, open for >4.0s\n  and 1 more\n"
            ),
            "{said}"
        );
        r.cut_total = None;
        assert!(text(&r).contains("cannot see"));
    }
}
