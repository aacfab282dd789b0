//! The text of `ebb explain`.

use std::fmt::Write as _;

use ebb_core::{
    drain_report::{ReleaseReason, Report},
    format::duration,
};
use ebb_protocol::views::{Explanation, PolicyView, SettingSource, StopView};

pub(in crate::cli) fn text(e: &Explanation) -> String {
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
    let _ = match e.stops.is_empty() {
        true => writeln!(out, "\nNo stop of it is known."),
        false => writeln!(
            out,
            "\nStops, newest first (this agent started at {}):",
            e.agent_since
        ),
    };
    for s in &e.stops {
        stop(&mut out, s);
    }
    out
}

fn policy(out: &mut String, now: &PolicyView) {
    out.push_str("\nPolicy:\n");
    for s in &now.settings {
        let from = match s.from {
            SettingSource::Annotation => "annotation",
            SettingSource::Namespace => "namespace",
            SettingSource::Node => "node flag",
            SettingSource::Default => "default",
        };
        let _ = writeln!(out, "  {:<13} {:<10} {from}", s.name, s.value);
    }
    for w in &now.warnings {
        let _ = writeln!(out, "  warning: {w}");
    }
    let grace = now
        .grace_ms
        .map_or_else(|| "unknown, 30.0s assumed".into(), duration);
    let whole = match now.pre_stop_sleep_ms {
        None => format!("the whole grace period ({grace})"),
        Some(sleep) => format!(
            "the grace period ({grace}) less the sleep of its preStop hook ({})",
            duration(sleep)
        ),
    };
    let _ = match now.never_held.as_deref() {
        Some(why) => writeln!(out, "\nNo stop of it is held: {why}."),
        None => writeln!(
            out,
            "\nA stop with {whole} is held for {} at most, which leaves the application {}.",
            duration(now.deadline_ms),
            duration(now.reserve_ms)
        ),
    };
}

fn drain(out: &mut String, r: &Report) {
    let _ = match r.reason {
        None if r.observed => writeln!(
            out,
            "\nebb observes its drain, and holds nothing: {} of {} so far, until {}.",
            duration(r.held_ms),
            duration(r.deadline_ms),
            r.until
        ),
        Some(ReleaseReason::Exited) => writeln!(
            out,
            "\nebb observed its last drain, which began at {}. Its containers exited after {}; ebb would have held it for \
             longer, for {} at most. {}.",
            r.started_at,
            duration(r.held_ms),
            duration(r.deadline_ms),
            cut(r)
        ),
        Some(reason) if r.observed => writeln!(
            out,
            "\nebb observed its last drain, which began at {}. ebb would have held it for {} of {} ({reason}). {}.",
            r.started_at,
            duration(r.held_ms),
            duration(r.deadline_ms),
            cut(r)
        ),
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
    if let Some(settle) = &r.settle {
        let _ = writeln!(out, "Settling: {settle}.");
    }
}

/// How many connections the stop cut.
fn cut(r: &Report) -> String {
    match r.cut_total {
        None => "ebb could not see its connections".into(),
        Some(0) => "The stop cut no connection".into(),
        Some(1) => "The stop cut 1 connection".into(),
        Some(n) => format!("The stop cut {n} connections"),
    }
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
            write!(
                out,
                ": held for {}, released ({reason}): {}",
                duration(held),
                released(reason)
            )
        }
        (true, _, Some("agent-ended")) => write!(
            out,
            ": was held until the agent ended without a report (killed, or crashed)"
        ),
        (true, ..) => write!(out, ": is held"),
        (false, _, reason) => write!(
            out,
            ": forwarded ({}): {}",
            reason.unwrap_or("unknown"),
            why(reason.unwrap_or_default(), evidence)
        ),
    };
    if let (true, Some(evidence)) = (s.held, evidence) {
        let _ = write!(
            out,
            "; the pod is terminating ({evidence}): {}",
            known_by(evidence)
        );
    }
    out.push('\n');
}

/// Why a call was forwarded without a hold.
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
            "its timeout is 2 s or less, as in a forced kill or a hard eviction, or its RPC deadline was near"
        }
        ("agent-away", _) => "the proxy could not reach the agent",
        ("agent-silent", _) => "the agent did not answer in time",
        (_, Some("sandbox-not-ready")) => {
            "the API server says that the pod is not being deleted, and its sandbox has failed, so the kubelet \
             recreates the sandbox"
        }
        ("observe", _) => {
            "the pod's policy is drain: observe, so ebb only watched what the stop cut"
        }
        ("drain-off", _) => "the pod's policy is drain: off",
        ("nothing-runs", _) => "no container of the pod was running any more",
        ("exited", _) => "the container had exited by itself already",
        _ => "see the agent's log",
    }
}

/// What ended a hold.
pub(in crate::cli) fn released(reason: &str) -> &'static str {
    match reason {
        "drained" => "what it waited for was reached",
        "deadline" => "its deadline had come",
        "manual" => "by `ebb release`",
        "not-terminating" => "the pod does not terminate",
        "untracked" => "ebb cannot see its connections, so it held for the settle time alone",
        "shutdown" => "the agent stopped",
        "exited" => "the container, or all of the sandbox, exited by itself",
        _ => "see the agent's log",
    }
}

/// What shows that the pod is terminating.
fn known_by(evidence: &str) -> &'static str {
    match evidence {
        "deleting" => "it has a deletionTimestamp, or is gone from the API server",
        "prestop-wait" => "it was draining already",
        "sandbox-stop" => "its sandbox was being stopped",
        "all-containers" => "all its running containers were stopped within a second",
        "node-shutdown" => "the node is shutting down",
        "resumed" => "an earlier agent held this stop, and the proxy asked again",
        "hold-unknown" => "there is no evidence for it, but --hold-unknown is set",
        _ => "see the agent's log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::{
        drain_report::ReleaseReason,
        ids::{PodName, PodUid},
        termination::{Ending, NotEnding},
    };
    use ebb_protocol::{
        hold::BypassReason,
        views::{SCHEMA, Setting},
    };

    #[test]
    fn every_reason_and_every_evidence_has_a_text() {
        const UNKNOWN: &str = "see the agent's log";
        let of_proxy = [
            BypassReason::NoTime,
            BypassReason::AgentAway,
            BypassReason::AgentSilent,
        ];
        let of_agent = ["drain-off", "nothing-runs", "exited"];
        for reason in of_proxy.map(BypassReason::name).into_iter().chain(of_agent) {
            assert_ne!(why(reason, None), UNKNOWN, "{reason}");
        }
        let no = [
            NotEnding::NotDeleting,
            NotEnding::OthersRun,
            NotEnding::OnlyContainer,
        ];
        for evidence in no.map(NotEnding::name) {
            assert_ne!(
                why("not-terminating", Some(evidence)),
                UNKNOWN,
                "{evidence}"
            );
        }
        let yes = [
            Ending::Deleting,
            Ending::PrestopWait,
            Ending::SandboxStop,
            Ending::AllContainers,
            Ending::HoldUnknown,
        ];
        for evidence in yes.map(Ending::name).into_iter().chain(["resumed"]) {
            assert_ne!(known_by(evidence), UNKNOWN, "{evidence}");
        }
        let releases = [
            ReleaseReason::Drained,
            ReleaseReason::Deadline,
            ReleaseReason::Manual,
            ReleaseReason::NotTerminating,
            ReleaseReason::Untracked,
            ReleaseReason::Shutdown,
        ];
        for reason in releases
            .map(ReleaseReason::name)
            .into_iter()
            .chain(["exited"])
        {
            assert_ne!(released(reason), UNKNOWN, "{reason}");
        }
    }

    #[test]
    fn the_stop_of_a_restarted_container_is_explained() {
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
                    from: SettingSource::Annotation,
                }],
                warnings: vec![],
                grace_ms: Some(30_000),
                pre_stop_sleep_ms: None,
                reserve_ms: 5_000,
                deadline_ms: 25_000,
                never_held: None,
            }),
            drain: None,
            lifetimes: vec![],
            stops: vec![stop],
        };
        assert_eq!(
            text(&explanation),
            "shop/web (u1)\n\
             No API server says whether it is being deleted.\n\n\
             Policy:\n  until         idle       annotation\n\n\
             A stop with the whole grace period (30.0s) is held for 25.0s at most, which leaves the application 5.0s.\n\n\
             No drain of it is known.\n\n\
             Stops, newest first (this agent started at 2026-01-01T00:00:00.000Z):\n  \
             2026-01-02T03:04:05.000Z  StopContainer of app, timeout 30.0s: forwarded (not-terminating): it is the pod's \
             only running container, and without an API server that may be a restart (--hold-unknown holds it)\n"
        );
    }
}
