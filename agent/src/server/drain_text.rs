//! The report of a drain as text, for callers of the wait endpoint that accept text.

use std::fmt::Write as _;

use ebb_core::{
    drain_report::{Phase, Report},
    format::duration,
};

use ebb_protocol::table::by_state;

use crate::telemetry::pod_event::PodEvent;

/// The state or the end of a drain and its flows on one line, then a line per warning.
pub(super) fn report(r: &Report) -> String {
    let mut out = format!("{}: ", r.pod);
    match (r.reason, r.phase) {
        (Some(_), _) => {
            let PodEvent { reason, note, .. } = PodEvent::finished(r);
            let _ = write!(out, "{}: {note}", reason.name());
        }
        (None, phase) => {
            let doing = if phase == Phase::Settle {
                "settling"
            } else {
                "draining"
            };
            let (held, most) = (duration(r.held_ms), duration(r.deadline_ms));
            let _ = write!(out, "still {doing} after {held}, {most} at most");
            if let Some(now) = &r.flows_now {
                let _ = write!(out, ": {} now", by_state(now));
            }
        }
    }
    out.push('\n');
    for warning in &r.warnings {
        let _ = writeln!(out, "{}: {warning}", r.pod);
    }
    out
}
