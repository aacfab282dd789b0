//! `ebb explain`, for people.

use std::fmt::Write as _;

use super::{
    text::duration,
    view::{Explanation, Origin, PolicyView, StopView},
};
use crate::drain::report::Report;

/// The text.
pub fn text(e: &Explanation) -> String {
    let mut out = format!("{} ({})\n", e.pod, e.pod.uid);
    // Writing to a string does not fail.
    let _ = match e.deleting {
        Some(true) => writeln!(out, "The API server says that it is being deleted."),
        Some(false) => writeln!(out, "The API server does not say that it is being deleted."),
        None => writeln!(out, "No API server says whether it is being deleted."),
    };
    match &e.now {
        Some(now) => policy(&mut out, now),
        None => out.push_str("It is not on this node any more.\n"),
    }
    match &e.drain {
        Some(report) => drain(&mut out, report),
        None => out.push_str("\nNo drain of it is known.\n"),
    }
    let _ = writeln!(out, "\nStops since the agent started at {}:", e.agent_since);
    if e.stops.is_empty() {
        out.push_str("  none\n");
    }
    for s in &e.stops {
        stop(&mut out, s);
    }
    out
}

fn policy(out: &mut String, now: &PolicyView) {
    out.push_str("\nPolicy:\n");
    for s in &now.settings {
        let from = match s.from {
            Origin::Annotation => "annotation",
            Origin::Node => "node flag",
            Origin::Default => "default",
        };
        let _ = writeln!(out, "  {:<13} {:<10} {from}", s.name, s.value);
    }
    for w in &now.warnings {
        let _ = writeln!(out, "  warning: {w}");
    }
    let grace = now
        .grace_ms
        .map_or_else(|| "unknown, taken to be 30.0s".into(), duration);
    let _ = writeln!(
        out,
        "\nA stop with all of its grace period ({grace}) is held for {} at most, and leaves the application {}.",
        duration(now.deadline_ms),
        duration(now.reserve_ms)
    );
}

fn drain(out: &mut String, r: &Report) {
    let _ = match r.reason {
        None => writeln!(
            out,
            "\nIt is draining: {} of {} so far, until {}, {} calls are held.",
            duration(r.held_ms),
            duration(r.deadline_ms),
            r.until,
            r.holds
        ),
        Some(reason) => writeln!(
            out,
            "\nIts last drain began at {} and was released ({reason}) after {} of {}.",
            r.started_at,
            duration(r.held_ms),
            duration(r.deadline_ms)
        ),
    };
}

fn stop(out: &mut String, s: &StopView) {
    let _ = write!(out, "  {}  {}", s.at, s.call);
    if let Some(container) = &s.container {
        let _ = write!(out, " of {container}");
    }
    if let Some(timeout) = s.timeout_ms {
        let _ = write!(out, ", timeout {}", duration(timeout));
    }
    let evidence = s.evidence.as_deref();
    let _ = match (s.held, s.held_ms, s.reason.as_deref()) {
        (true, Some(held), Some(reason)) => {
            write!(out, ": held for {}, released ({reason})", duration(held))
        }
        (true, ..) => write!(out, ": is held"),
        (false, _, reason) => write!(
            out,
            ": passed ({}): {}",
            reason.unwrap_or("unknown"),
            why(reason.unwrap_or_default(), evidence)
        ),
    };
    if let (true, Some(evidence)) = (s.held, evidence) {
        let _ = write!(out, "; the pod's end by {evidence}: {}", known_by(evidence));
    }
    out.push('\n');
}

/// Why a call was passed.
fn why(reason: &str, evidence: Option<&str>) -> &'static str {
    match (reason, evidence) {
        (_, Some("not-deleting")) => {
            "the API server says that the pod is not being deleted, so a container was restarted, or the kubelet \
             evicts the pod"
        }
        (_, Some("others-run")) => {
            "other containers of the pod were not stopped within a second, so this is a restart"
        }
        (_, Some("only-container")) => {
            "it is the pod's only running container, and without an API server that may be a restart \
             (--hold-unknown holds it)"
        }
        ("no-time", _) => {
            "its timeout is 2 s or less, or its caller was about to leave: a forced kill or a hard eviction"
        }
        ("agent-away", _) => "the agent could not be asked",
        ("agent-silent", _) => "the agent did not answer in time",
        ("drain-off", _) => "the annotation ebb.dev/drain says off",
        ("nothing-runs", _) => "no container of the pod ran any more",
        _ => "see the agent's log",
    }
}

/// How a pod's end was known.
fn known_by(evidence: &str) -> &'static str {
    match evidence {
        "deleting" => "it has a deletionTimestamp, or is gone from the API server",
        "prestop-wait" => "it was in a drain already",
        "sandbox-stop" => "its sandbox was being stopped",
        "all-containers" => "all its running containers were stopped within a second",
        "hold-unknown" => "nobody could tell, and --hold-unknown says to hold",
        _ => "see the agent's log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{PodName, PodUid},
        report::view::{SCHEMA, Setting},
    };

    #[test]
    fn a_pod_that_was_restarted_reads_so() {
        let pod = PodName {
            uid: PodUid::new("u1"),
            namespace: "shop".into(),
            name: "web".into(),
        };
        let stop = StopView {
            at: "2026-01-02T03:04:05.000Z".into(),
            container: Some("app".into()),
            timeout_ms: Some(30_000),
            reason: Some("not-terminating".into()),
            evidence: Some("only-container".into()),
            ..StopView::new(&pod, "StopContainer")
        };
        let explanation = Explanation {
            schema: SCHEMA.into(),
            pod,
            agent_since: "2026-01-01T00:00:00.000Z".into(),
            deleting: None,
            now: Some(PolicyView {
                settings: vec![Setting {
                    name: "until".into(),
                    value: "idle".into(),
                    from: Origin::Annotation,
                }],
                warnings: vec![],
                grace_ms: Some(30_000),
                reserve_ms: 5_000,
                deadline_ms: 25_000,
            }),
            drain: None,
            stops: vec![stop],
        };
        assert_eq!(
            text(&explanation),
            "shop/web (u1)\n\
             No API server says whether it is being deleted.\n\n\
             Policy:\n  until         idle       annotation\n\n\
             A stop with all of its grace period (30.0s) is held for 25.0s at most, and leaves the application 5.0s.\n\n\
             No drain of it is known.\n\n\
             Stops since the agent started at 2026-01-01T00:00:00.000Z:\n  \
             2026-01-02T03:04:05.000Z  StopContainer of app, timeout 30.0s: passed (not-terminating): it is the pod's \
             only running container, and without an API server that may be a restart (--hold-unknown holds it)\n"
        );
    }
}
