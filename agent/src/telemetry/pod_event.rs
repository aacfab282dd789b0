//! What happens to a pod, in the words of both the log and the Events.

use std::fmt::Write as _;

use ebb_core::{
    drain_report::{CutFlow, DeadlineCause, LatePeer, ReleaseReason, Report, SettleRule},
    format::duration,
    ids::PodName,
};
use ebb_protocol::table::{age, by_state};

/// How many flows or peers are named; the rest are counted.
const NAMED: usize = 3;

/// The reason of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EventReason {
    /// A drain began.
    DrainStarted,
    /// The drain ended because its condition was met.
    Drained,
    /// A drain that ebb only observed is over.
    DrainObserved,
    /// The drain ended at its deadline.
    DrainDeadline,
    /// The drain ended because a user released it, the agent stopped, the pod does not terminate, or ebb cannot see the
    /// pod's connections.
    DrainReleased,
    /// The settle phase is over, and new connections still arrive.
    DrainBlocked,
    /// An annotation is invalid.
    PolicyInvalid,
    /// ebb can't listen on the wait port.
    WaitPortTaken,
}

impl EventReason {
    /// The `reason` of the Event.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::DrainStarted => "DrainStarted",
            Self::Drained => "Drained",
            Self::DrainObserved => "DrainObserved",
            Self::DrainDeadline => "DrainDeadline",
            Self::DrainReleased => "DrainReleased",
            Self::DrainBlocked => "DrainBlocked",
            Self::PolicyInvalid => "PolicyInvalid",
            Self::WaitPortTaken => "WaitPortTaken",
        }
    }

    /// The `action` of the Event: what ebb was doing.
    pub(crate) const fn action(self) -> &'static str {
        match self {
            Self::PolicyInvalid => "ReadPolicy",
            Self::WaitPortTaken => "Listen",
            _ => "Drain",
        }
    }
}

/// Something that happened to a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodEvent {
    pub(crate) pod: PodName,
    pub(crate) reason: EventReason,
    /// Whether the Event and the log line are warnings.
    pub(crate) warning: bool,
    /// One line.
    pub(crate) note: String,
}

impl PodEvent {
    /// A drain began: an event for each invalid annotation, and one for the beginning.
    pub(crate) fn began(r: &Report) -> Vec<Self> {
        let warnings = r.warnings.iter().map(|w| Self::policy(&r.pod, w));
        let note = format!(
            "waiting until {}, {} at most",
            r.until,
            duration(r.deadline_ms)
        );
        let began = Self {
            pod: r.pod.clone(),
            reason: EventReason::DrainStarted,
            warning: false,
            note,
        };
        warnings.chain([began]).collect()
    }

    /// The settle phase is over, and new connections still arrive.
    pub(crate) fn blocked(r: &Report) -> Self {
        let note = format!(
            "new connections still arrive after {}, from {}",
            duration(r.held_ms),
            peers(&r.late_peers)
        );
        Self::warning(&r.pod, EventReason::DrainBlocked, &note)
    }

    /// A drain ended: why, after how long, and what became of the flows.
    pub(crate) fn finished(r: &Report) -> Self {
        if r.observed {
            return Self::observed(r);
        }
        let reason = match r.reason {
            Some(ReleaseReason::Drained) => EventReason::Drained,
            Some(ReleaseReason::Deadline) => EventReason::DrainDeadline,
            _ => EventReason::DrainReleased,
        };
        let mut note = String::new();
        // Writing to a string does not fail.
        if reason == EventReason::DrainReleased {
            let _ = write!(note, "{}, ", r.reason.map_or("unknown", |r| r.name()));
        }
        if reason == EventReason::DrainDeadline {
            // The grace period is the usual cause, so only others are named.
            if r.deadline_cause != DeadlineCause::Grace {
                let _ = write!(note, "ended by {}: ", r.deadline_cause.phrase());
            }
            let _ = match r.cut_total {
                Some(0) => write!(note, "nothing cut, "),
                Some(n) => write!(note, "{n} cut: {}; ", cut(&r.cut, n)),
                None => Ok(()),
            };
        }
        let _ = write!(note, "in {}", duration(r.held_ms));
        let _ = match &r.flows_at_start {
            Some(flows) => write!(note, ": {} at start", by_state(flows)),
            None => write!(note, ": ebb could not see its connections"),
        };
        if let (Some(arrived), Some(ended)) = (r.arrived, r.ended) {
            let _ = write!(note, ", {arrived} arrived, {ended} ended");
        }
        if r.idle_closed > 0 {
            let _ = write!(note, ", {} idle closed", r.idle_closed);
        }
        if reason != EventReason::DrainDeadline
            && let Some(n @ 1..) = r.cut_total
        {
            let _ = write!(note, "; {n} cut: {}", cut(&r.cut, n));
        }
        for told in r.notified.phrases().iter().take(NAMED) {
            let _ = write!(note, "; {told}");
        }
        if let Some(settle) = &r.settle
            && !matches!(settle.rule, SettleRule::Set | SettleRule::Unknown)
        {
            let _ = write!(note, "; settling: {settle}");
        }
        if let Some(detail) = &r.detail {
            let _ = write!(note, " ({detail})");
        }
        Self {
            pod: r.pod.clone(),
            reason,
            // After a shutdown, the next agent continues the drain.
            warning: !matches!(
                r.reason,
                Some(
                    ReleaseReason::Drained
                        | ReleaseReason::Manual
                        | ReleaseReason::NotTerminating
                        | ReleaseReason::Shutdown
                )
            ),
            note,
        }
    }

    /// A drain is over that ebb only observed: how long ebb would have held the pod, and what the stop cut.
    fn observed(r: &Report) -> Self {
        let held = duration(r.held_ms);
        let mut note = match (r.reason, r.cut_total) {
            (Some(ReleaseReason::Exited), Some(0)) => {
                format!("its containers exited after {held}")
            }
            (Some(ReleaseReason::Exited), _) => {
                format!("ebb would have held it for longer than {held}, when its containers exited")
            }
            (reason, _) => format!(
                "ebb would have held it for {held} ({})",
                reason.map_or("unknown", ReleaseReason::name)
            ),
        };
        // Writing to a string does not fail.
        let _ = match r.cut_total {
            Some(0) => write!(note, "; nothing cut"),
            Some(n) => write!(note, "; {n} cut: {}", cut(&r.cut, n)),
            None => write!(note, "; ebb could not see its connections"),
        };
        if let Some(flows) = &r.flows_at_start {
            let _ = write!(note, "; {} at start", by_state(flows));
        }
        if let (Some(arrived), Some(ended)) = (r.arrived, r.ended) {
            let _ = write!(note, ", {arrived} arrived, {ended} ended");
        }
        if let Some(detail) = &r.detail {
            let _ = write!(note, " ({detail})");
        }
        Self {
            pod: r.pod.clone(),
            reason: EventReason::DrainObserved,
            warning: r.cut_total != Some(0),
            note,
        }
    }

    /// An annotation of `pod` is invalid; `why` names it.
    pub fn policy(pod: &PodName, why: &str) -> Self {
        Self::warning(pod, EventReason::PolicyInvalid, why)
    }

    /// ebb can't listen on a wait port of `pod`; `why` names it.
    pub(crate) fn wait_port(pod: &PodName, why: &str) -> Self {
        Self::warning(pod, EventReason::WaitPortTaken, why)
    }

    fn warning(pod: &PodName, reason: EventReason, note: &str) -> Self {
        Self {
            pod: pod.clone(),
            reason,
            warning: true,
            note: note.to_owned(),
        }
    }
}

/// The settle phase of a drain is over: after how long, and which flows the drain phase waits for.
pub(crate) fn settled(r: &Report) -> String {
    let after = duration(r.settled_ms.unwrap_or(r.held_ms));
    match &r.flows_now {
        Some(flows) if flows.total() == 0 => format!("after {after}, with no connection left"),
        Some(flows) => format!("after {after}, with {} left", by_state(flows)),
        None => format!("after {after}; ebb has not seen the connections yet"),
    }
}

fn cut(flows: &[CutFlow], total: u32) -> String {
    let named = flows.iter().take(NAMED).map(|f| {
        let age = age(f.age_ms, f.age_at_least_ms);
        format!("{} {} {age}", f.peer_text(), f.state)
    });
    list(named.collect(), total as usize)
}

fn peers(peers: &[LatePeer]) -> String {
    let named = peers
        .iter()
        .take(NAMED)
        .map(|p| format!("{} ({})", p.peer_text(), p.flows));
    list(named.collect(), peers.len())
}

fn list(named: Vec<String>, total: usize) -> String {
    let rest = total.saturating_sub(named.len());
    let named = named.join(", ");
    match rest {
        0 => named,
        n => format!("{named} and {n} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::{
        drain_report::{SettleReport, testing::report},
        flow::FlowState,
        notification::{Notified, RequestReport, SignalOutcome, SignalReport, StopSignal},
    };

    fn flow(port: u16) -> CutFlow {
        CutFlow {
            remote: format!("10.1.2.3:{port}").parse().unwrap(),
            peer: None,
            local: "10.0.0.1:80".parse().unwrap(),
            state: FlowState::Active,
            age_ms: Some(751_000),
            age_at_least_ms: None,
            bytes_in: 1,
            bytes_out: 2,
        }
    }

    #[test]
    fn invalid_annotations_are_reported_before_the_beginning() {
        let mut r = report(None);
        r.warnings = vec!["annotation ebb.dev/untl: unknown".into()];
        let event = PodEvent::began(&r);
        let reported: Vec<_> = event.iter().map(|n| (n.reason, n.warning)).collect();
        assert_eq!(
            reported,
            [
                (EventReason::PolicyInvalid, true),
                (EventReason::DrainStarted, false)
            ]
        );
        assert_eq!(event[1].note, "waiting until zero, 25.0s at most");
    }

    #[test]
    fn a_drained_pod_is_no_warning() {
        let mut r = report(Some(ReleaseReason::Drained));
        r.idle_closed = 3;
        let event = PodEvent::finished(&r);
        assert_eq!((event.reason, event.warning), (EventReason::Drained, false));
        assert_eq!(
            event.note,
            "in 8.2s: 40 active, 1 idle at start, 2 arrived, 43 ended, 3 idle closed"
        );
    }

    #[test]
    fn the_end_of_the_settle_phase_names_the_flows_that_are_left() {
        let mut r = report(None);
        r.settled_ms = Some(3100);
        r.flows_now = r.flows_at_start;
        assert_eq!(settled(&r), "after 3.1s, with 40 active, 1 idle left");
    }

    #[test]
    fn the_report_says_how_long_settle_lasted_and_why() {
        let mut r = report(Some(ReleaseReason::Drained));
        for (rule, told) in [
            (
                SettleRule::Gap,
                "; settling: 500ms of silence, where 100ms is usual",
            ),
            (SettleRule::NoListener, "; settling: none, nothing listens"),
            (SettleRule::Set, " ended"),
            (SettleRule::Unknown, " ended"),
        ] {
            r.settle = Some(SettleReport {
                quiet_ms: 500,
                rule,
                gap_ms: Some(100),
            });
            let note = PodEvent::finished(&r).note;
            assert!(note.ends_with(told), "{note}");
        }
    }

    #[test]
    fn a_deadline_names_the_first_flows_that_were_cut() {
        let mut r = report(Some(ReleaseReason::Deadline));
        r.cut = (1..=5).map(flow).collect();
        r.cut_total = Some(5);
        let event = PodEvent::finished(&r);
        assert_eq!(
            (event.reason, event.warning),
            (EventReason::DrainDeadline, true)
        );
        let named = "5 cut: 10.1.2.3:1 active 12m31s, 10.1.2.3:2 active 12m31s, 10.1.2.3:3 active 12m31s \
                     and 2 more; in 8.2s";
        assert!(event.note.starts_with(named), "{}", event.note);
    }

    #[test]
    fn connections_that_ebb_could_not_see_are_not_reported_as_none() {
        let mut r = report(Some(ReleaseReason::Untracked));
        (r.flows_at_start, r.arrived, r.ended, r.cut_total) = (None, None, None, None);
        r.detail = Some("runsc".into());
        let event = PodEvent::finished(&r);
        assert_eq!(
            (event.reason, event.warning),
            (EventReason::DrainReleased, true)
        );
        assert_eq!(
            event.note,
            "untracked, in 8.2s: ebb could not see its connections (runsc)"
        );
    }

    #[test]
    fn the_event_says_how_the_application_was_notified() {
        let mut r = report(Some(ReleaseReason::Drained));
        r.notified = Notified {
            signals: Some(vec![SignalReport {
                container: "web".into(),
                signal: StopSignal::Quit,
                pid: Some(4242),
                outcome: SignalOutcome::Sent,
                detail: None,
            }]),
            request: Some(RequestReport {
                request: "GET :8080/drain".into(),
                status: None,
                error: Some("no answer within 2s".into()),
            }),
        };
        let note = PodEvent::finished(&r).note;
        let told = "; GET :8080/drain failed: no answer within 2s; SIGQUIT to web (process 4242)";
        assert!(note.ends_with(told), "{note}");
    }

    #[test]
    fn a_release_by_hand_is_no_warning() {
        let event = PodEvent::finished(&report(Some(ReleaseReason::Manual)));
        assert_eq!(
            (event.reason, event.warning),
            (EventReason::DrainReleased, false)
        );
    }

    #[test]
    fn the_end_of_a_wait_for_a_restart_is_no_warning() {
        let event = PodEvent::finished(&report(Some(ReleaseReason::NotTerminating)));
        assert!(
            !event.warning && !event.note.contains("cut"),
            "{}",
            event.note
        );
    }

    #[test]
    fn a_deadline_that_is_not_the_grace_period_names_its_cause() {
        let mut r = report(Some(ReleaseReason::Deadline));
        r.cut_total = Some(0);
        for (cause, words) in [
            (
                DeadlineCause::MaxHold,
                "ended by max-hold, not its grace period: nothing cut",
            ),
            (
                DeadlineCause::Removed,
                "ended by the pod's removal from the API server: nothing",
            ),
            (DeadlineCause::Grace, "nothing cut"),
        ] {
            r.deadline_cause = cause;
            let note = PodEvent::finished(&r).note;
            assert!(note.starts_with(words), "{note}");
        }
    }

    #[test]
    fn an_observed_drain_says_what_a_hold_would_have_been_and_what_was_cut() {
        let mut r = report(Some(ReleaseReason::Exited));
        r.observed = true;
        let event = PodEvent::finished(&r);
        assert_eq!(event.reason, EventReason::DrainObserved);
        assert!(!event.warning, "nothing was cut");
        assert!(
            event
                .note
                .starts_with("its containers exited after 8.2s; nothing cut"),
            "{}",
            event.note
        );
        r.cut = vec![flow(1)];
        r.cut_total = Some(1);
        let event = PodEvent::finished(&r);
        assert!(event.warning);
        assert_eq!(
            event.note,
            "ebb would have held it for longer than 8.2s, when its containers exited; 1 cut: 10.1.2.3:1 active 12m31s; 40 \
             active, 1 idle at start, 2 arrived, 43 ended"
        );
        r.reason = Some(ReleaseReason::Drained);
        r.cut_total = Some(0);
        let note = PodEvent::finished(&r).note;
        assert!(
            note.starts_with("ebb would have held it for 8.2s (drained); nothing cut"),
            "{note}"
        );
    }

    #[test]
    fn peers_that_still_connect_are_named() {
        let mut r = report(None);
        r.late_peers = vec![LatePeer {
            address: "10.0.0.7".parse().unwrap(),
            peer: None,
            flows: 12,
        }];
        let note = PodEvent::blocked(&r).note;
        assert_eq!(
            note,
            "new connections still arrive after 8.2s, from 10.0.0.7 (12)"
        );
    }
}
