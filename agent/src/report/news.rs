//! What is told of a pod, in words: the same for the log and for the cluster's Events.

use std::fmt::Write as _;

use super::{table::by_state, text::duration};
use crate::{
    drain::report::{CutFlow, LatePeer, ReleaseReason, Report},
    ids::PodName,
};

/// How many flows or peers are named; the rest are counted.
const NAMED: usize = 3;

/// What happened to a pod. The names are the reasons of its Events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// A drain began.
    DrainStarted,
    /// It ended, and nobody was cut off.
    Drained,
    /// It ended at its deadline.
    DrainDeadline,
    /// It ended because somebody said so, the agent stopped, or nobody could see the pod's connections.
    DrainReleased,
    /// Settle is over, and new connections still come.
    DrainBlocked,
    /// An annotation can't be obeyed.
    PolicyInvalid,
    /// The wait port can't be had.
    WaitPortTaken,
}

impl What {
    /// The reason of an Event.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DrainStarted => "DrainStarted",
            Self::Drained => "Drained",
            Self::DrainDeadline => "DrainDeadline",
            Self::DrainReleased => "DrainReleased",
            Self::DrainBlocked => "DrainBlocked",
            Self::PolicyInvalid => "PolicyInvalid",
            Self::WaitPortTaken => "WaitPortTaken",
        }
    }

    /// What ebb was doing, as Events want to know (`action`).
    pub const fn action(self) -> &'static str {
        match self {
            Self::PolicyInvalid => "ReadPolicy",
            Self::WaitPortTaken => "Listen",
            _ => "Drain",
        }
    }
}

/// One thing that is told of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct News {
    /// The pod.
    pub pod: PodName,
    /// What happened.
    pub what: What,
    /// Somebody may want to look at it: the Event is a warning, and so is the line in the log.
    pub warning: bool,
    /// One line.
    pub note: String,
}

impl News {
    /// A drain began: what was wrong with the pod's annotations, and that it began.
    pub fn began(r: &Report) -> Vec<Self> {
        let warnings = r.warnings.iter().map(|w| Self::policy(&r.pod, w));
        let note = format!(
            "waiting until {}, {} at most",
            r.until,
            duration(r.deadline_ms)
        );
        let began = Self {
            pod: r.pod.clone(),
            what: What::DrainStarted,
            warning: false,
            note,
        };
        warnings.chain([began]).collect()
    }

    /// Settle is over, and new connections still come.
    pub fn blocked(r: &Report) -> Self {
        let note = format!(
            "new connections still come after {}, from {}",
            duration(r.held_ms),
            peers(&r.late_peers)
        );
        Self::warning(&r.pod, What::DrainBlocked, &note)
    }

    /// A drain ended: why, after how long, and what became of the flows.
    pub fn finished(r: &Report) -> Self {
        let what = match r.reason {
            Some(ReleaseReason::Drained) => What::Drained,
            Some(ReleaseReason::Deadline) => What::DrainDeadline,
            _ => What::DrainReleased,
        };
        let mut note = String::new();
        // Writing to a string does not fail.
        if what == What::DrainReleased {
            let _ = write!(note, "{}, ", r.reason.map_or("unknown", |r| r.name()));
        }
        if what == What::DrainDeadline {
            let _ = match r.cut_total {
                Some(0) => write!(note, "nothing cut, "),
                Some(n) => write!(note, "{n} cut: {}; ", cut(&r.cut, n)),
                None => Ok(()),
            };
        }
        let _ = write!(note, "in {}", duration(r.held_ms));
        let _ = match &r.flows_at_start {
            Some(flows) => write!(note, ": {} at start", by_state(flows)),
            None => write!(note, ": nobody could see its connections"),
        };
        if let (Some(arrived), Some(ended)) = (r.arrived, r.ended) {
            let _ = write!(note, ", {arrived} arrived, {ended} ended");
        }
        if r.idle_closed > 0 {
            let _ = write!(note, ", {} idle closed", r.idle_closed);
        }
        if what != What::DrainDeadline
            && let Some(n @ 1..) = r.cut_total
        {
            let _ = write!(note, "; {n} cut: {}", cut(&r.cut, n));
        }
        if let Some(detail) = &r.detail {
            let _ = write!(note, " ({detail})");
        }
        Self {
            pod: r.pod.clone(),
            what,
            warning: what != What::Drained && r.reason != Some(ReleaseReason::Manual),
            note,
        }
    }

    /// An annotation of `pod` can't be obeyed; `why` names it.
    pub fn policy(pod: &PodName, why: &str) -> Self {
        Self::warning(pod, What::PolicyInvalid, why)
    }

    /// The wait port of `pod` can't be had; `why` names it.
    pub fn wait_port(pod: &PodName, why: &str) -> Self {
        Self::warning(pod, What::WaitPortTaken, why)
    }

    fn warning(pod: &PodName, what: What, note: &str) -> Self {
        Self {
            pod: pod.clone(),
            what,
            warning: true,
            note: note.to_owned(),
        }
    }
}

fn cut(flows: &[CutFlow], total: u32) -> String {
    let named = flows.iter().take(NAMED).map(|f| match f.age_ms {
        Some(age) => format!("{} {} {}", f.remote, f.state, duration(age)),
        None => format!("{} {}", f.remote, f.state),
    });
    list(named.collect(), total as usize)
}

fn peers(peers: &[LatePeer]) -> String {
    let named = peers
        .iter()
        .take(NAMED)
        .map(|p| format!("{} ({})", p.address, p.flows));
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
    use crate::{drain::report::testing::report, flow::FlowState};

    fn flow(port: u16) -> CutFlow {
        CutFlow {
            remote: format!("10.1.2.3:{port}").parse().unwrap(),
            local: "10.0.0.1:80".parse().unwrap(),
            state: FlowState::Active,
            age_ms: Some(751_000),
            bytes_in: 1,
            bytes_out: 2,
        }
    }

    #[test]
    fn a_beginning_names_what_is_wrong_first() {
        let mut r = report(None);
        r.warnings = vec!["annotation ebb.dev/untl: unknown".into()];
        let news = News::began(&r);
        let told: Vec<_> = news.iter().map(|n| (n.what, n.warning)).collect();
        assert_eq!(
            told,
            [(What::PolicyInvalid, true), (What::DrainStarted, false)]
        );
        assert_eq!(news[1].note, "waiting until zero, 25.0s at most");
    }

    #[test]
    fn a_drained_pod_is_no_warning() {
        let mut r = report(Some(ReleaseReason::Drained));
        r.idle_closed = 3;
        let news = News::finished(&r);
        assert_eq!((news.what, news.warning), (What::Drained, false));
        assert_eq!(
            news.note,
            "in 8.2s: 40 active, 1 idle at start, 2 arrived, 43 ended, 3 idle closed"
        );
    }

    #[test]
    fn a_deadline_names_the_first_flows_that_were_cut() {
        let mut r = report(Some(ReleaseReason::Deadline));
        r.cut = (1..=5).map(flow).collect();
        r.cut_total = Some(5);
        let news = News::finished(&r);
        assert_eq!((news.what, news.warning), (What::DrainDeadline, true));
        let named = "5 cut: 10.1.2.3:1 active 12m31s, 10.1.2.3:2 active 12m31s, 10.1.2.3:3 active 12m31s \
                     and 2 more; in 8.2s";
        assert!(news.note.starts_with(named), "{}", news.note);
    }

    #[test]
    fn what_nobody_could_see_is_not_told_as_nothing() {
        let mut r = report(Some(ReleaseReason::Untracked));
        (r.flows_at_start, r.arrived, r.ended, r.cut_total) = (None, None, None, None);
        r.detail = Some("runsc".into());
        let news = News::finished(&r);
        assert_eq!((news.what, news.warning), (What::DrainReleased, true));
        assert_eq!(
            news.note,
            "untracked, in 8.2s: nobody could see its connections (runsc)"
        );
    }

    #[test]
    fn a_release_by_hand_is_no_warning() {
        let news = News::finished(&report(Some(ReleaseReason::Manual)));
        assert_eq!((news.what, news.warning), (What::DrainReleased, false));
    }

    #[test]
    fn who_still_connects_is_named() {
        let mut r = report(None);
        r.late_peers = vec![LatePeer {
            address: "10.0.0.7".parse().unwrap(),
            flows: 12,
        }];
        let note = News::blocked(&r).note;
        assert_eq!(
            note,
            "new connections still come after 8.2s, from 10.0.0.7 (12)"
        );
    }
}
