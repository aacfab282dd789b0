//! What the drains of a workload say about its grace period: `ebb advise`.
//!
//! The grace period that would have been enough is the longest hold that the drains needed, plus the reserve, rounded up
//! to 5 s. A drain that drained needed as long as it lasted. One that was cut short needed longer. For that one, ebb takes
//! the time within which 99 of 100 connections of the workload end, because after the pod has left its endpoints its last
//! connection lasts no longer than that.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    clock::millis,
    drain_report::{DeadlineCause, ReleaseReason, Report},
    flow::FlowState,
    policy::Policy,
};

/// Fewer drains than this are not enough for advice.
const MIN_DRAINS: usize = 5;

/// Grace periods are rounded up to a multiple of this.
const STEP: Duration = Duration::from_secs(5);

/// What is known of a workload.
#[derive(Clone, Debug, Default)]
pub struct WorkloadHistory<'a> {
    /// The drains of its pods that are over, newest first.
    pub drains: Vec<&'a Report>,
    /// How long its connections lasted: the upper bound of each bucket, and how many connections are in it. The last one
    /// has no bound.
    pub lifetimes: Vec<(Option<Duration>, u64)>,
    /// The grace period of its pods, if one runs. Otherwise it is computed from the deadline of the newest drain.
    pub grace: Option<Duration>,
    /// The part of it that is left for the application's own shutdown, by its policy.
    pub reserve: Duration,
    /// Whether its policy closes idle connections.
    pub closes_idle: bool,
}

/// Two of 100 durations, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Spread {
    /// Half of them are no longer.
    pub p50_ms: u64,
    /// 99 of 100 are no longer.
    pub p99_ms: u64,
}

impl Spread {
    /// `None` without durations.
    fn of(mut all: Vec<u64>) -> Option<Self> {
        all.sort_unstable();
        let nth = |percent: usize| {
            all.get((all.len() * percent).div_ceil(100).checked_sub(1)?)
                .copied()
        };
        Some(Self {
            p50_ms: nth(50)?,
            p99_ms: nth(99)?,
        })
    }
}

/// How long connections lasted, in milliseconds, as the upper bounds of histogram buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Lifetimes {
    /// How many connections this rests on.
    pub connections: u64,
    /// Half of them lasted no longer. Absent if they lasted longer than a day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p50_ms: Option<u64>,
    /// 99 of 100 lasted no longer. Absent if they lasted longer than a day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99_ms: Option<u64>,
}

impl Lifetimes {
    /// `None` without connections.
    fn of(buckets: &[(Option<Duration>, u64)]) -> Option<Self> {
        let connections: u64 = buckets.iter().map(|(_, n)| n).sum();
        let nth = |percent: u64| {
            let wanted = (connections * percent).div_ceil(100);
            let mut counted = 0;
            let bucket = buckets.iter().find(|(_, n)| {
                counted += n;
                counted >= wanted
            });
            bucket.and_then(|(bound, _)| bound.map(millis))
        };
        (connections > 0).then(|| Self {
            connections,
            p50_ms: nth(50),
            p99_ms: nth(99),
        })
    }
}

/// What to change, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Recommendation {
    /// The field of the pod's spec, or the annotation, as `NAME: VALUE`.
    pub set: String,
    /// Why, on one line.
    pub why: String,
}

/// What the drains of a workload say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Advice {
    /// How many drains it rests on.
    pub drains: u32,
    /// How many of these were only observed.
    pub observed: u32,
    /// How many of these ended before their pods had drained.
    pub cut_short: u32,
    /// How long settling took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settle: Option<Spread>,
    /// How long the drains took, settling included. A drain that was cut short counts with the time that it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Spread>,
    /// Connections that were cut.
    pub cut: u64,
    /// How long its connections last. Absent if none has ended while the agent ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetimes: Option<Lifetimes>,
    /// The grace period of its pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
    /// The grace period that would have been enough. Absent if there are too few drains, or if it can't be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enough_grace_ms: Option<u64>,
    /// How that was computed, or why it could not be, on one line.
    pub basis: String,
    /// What to change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recommendations: Vec<Recommendation>,
}

/// Whether the advice uses the drain: it drained, reached its deadline, or was observed until its containers exited.
pub fn is_usable(r: &Report) -> bool {
    matches!(
        r.reason,
        Some(ReleaseReason::Drained | ReleaseReason::Deadline | ReleaseReason::Exited)
    )
}

/// What these drains say. Only those that [`is_usable`] accepts are used.
pub fn advise(history: &WorkloadHistory<'_>) -> Advice {
    let drains: Vec<&Report> = history
        .drains
        .iter()
        .copied()
        .filter(|r| is_usable(r))
        .collect();
    let number = |test: &dyn Fn(&&&Report) -> bool| {
        u32::try_from(drains.iter().filter(test).count()).unwrap_or(u32::MAX)
    };
    let cut_short = number(&|r| is_cut_short(r));
    // One whose containers exited first, without cutting a connection, would have lasted longer with a hold.
    let lasted = drains
        .iter()
        .filter(|r| r.reason != Some(ReleaseReason::Exited) || is_cut_short(r));
    let mut advice = Advice {
        drains: number(&|_| true),
        observed: number(&|r| r.observed),
        cut_short,
        settle: Spread::of(drains.iter().filter_map(|r| r.settled_ms).collect()),
        drain: Spread::of(lasted.map(|r| r.held_ms).collect()),
        cut: drains
            .iter()
            .map(|r| u64::from(r.cut_total.unwrap_or(0)))
            .sum(),
        lifetimes: Lifetimes::of(&history.lifetimes),
        grace_ms: grace_ms(history),
        enough_grace_ms: None,
        basis: String::new(),
        recommendations: vec![],
    };
    if drains.len() < MIN_DRAINS {
        let drains = match drains.len() {
            1 => "1 drain".to_owned(),
            n => format!("{n} drains"),
        };
        advice.basis = format!("{drains}: too few to advise; {MIN_DRAINS} are needed");
        return advice;
    }
    let longest = drains.iter().map(|r| r.held_ms).max().unwrap_or(0);
    match (cut_short, advice.lifetimes.and_then(|l| l.p99_ms)) {
        (0, _) => {
            advice.basis = "the longest drain and the reserve".into();
            advice.enough_grace_ms = Some(enough(longest, history.reserve));
        }
        (_, Some(p99)) => {
            advice.basis =
                "the longest drain, or how long 99 of 100 connections last, and the reserve".into();
            advice.enough_grace_ms = Some(enough(longest.max(p99), history.reserve));
        }
        (_, None) => {
            advice.basis = format!(
                "{cut_short} of {} drains were cut short, and it is not known how long the connections would have lasted",
                drains.len()
            );
        }
    }
    advice.recommendations = recommendations(&advice, &drains, history);
    advice
}

/// Whether the drain ended before its pod had drained.
fn is_cut_short(r: &Report) -> bool {
    r.reason != Some(ReleaseReason::Drained) && r.cut_total != Some(0)
}

/// The grace period of the workload's pods.
fn grace_ms(history: &WorkloadHistory<'_>) -> Option<u64> {
    let of_deadline = || {
        let mut drains = history.drains.iter();
        let newest = drains.find(|r| is_usable(r) && r.deadline_cause == DeadlineCause::Grace)?;
        // Grace periods are whole seconds. The call had taken some of it before the drain began.
        let longest_hold = newest.deadline_ms.div_ceil(1000) * 1000;
        Some(longest_hold + millis(history.reserve).min(longest_hold / 2))
    };
    history.grace.map(millis).or_else(of_deadline)
}

/// The grace period in which a hold of `hold_ms` fits, in milliseconds. The reserve is at most a third of it.
fn enough(hold_ms: u64, reserve: Duration) -> u64 {
    let reserve = millis(reserve).min(hold_ms / 2);
    let step = millis(STEP);
    (hold_ms + reserve).div_ceil(step).max(1) * step
}

fn recommendations(
    advice: &Advice,
    drains: &[&Report],
    history: &WorkloadHistory<'_>,
) -> Vec<Recommendation> {
    let mut all = Vec::new();
    let cut = drains.iter().flat_map(|r| &r.cut);
    let (idle, listed) = cut.fold((0_u64, 0_u64), |(idle, all), flow| {
        (idle + u64::from(flow.state == FlowState::Idle), all + 1)
    });
    let is_longer = |enough: u64| advice.grace_ms.is_some_and(|grace| grace < enough);
    if idle * 2 > listed && !history.closes_idle {
        all.push(Recommendation {
            set: "ebb.dev/idle-flows: close".into(),
            why: format!("{idle} of {listed} connections that were cut were idle"),
        });
    } else if let Some(enough) = advice.enough_grace_ms {
        let mut set = Vec::new();
        if is_longer(enough) {
            set.push(format!("terminationGracePeriodSeconds: {}", enough / 1000));
        }
        // Then a longer grace period alone changes nothing.
        let is_capped = |r: &&Report| r.deadline_cause == DeadlineCause::MaxHold && is_cut_short(r);
        if drains.iter().any(is_capped) {
            let hold = enough - millis(history.reserve).min(enough / 3);
            set.push(format!("ebb.dev/max-hold: {}s", hold / 1000));
        }
        all.extend(set.into_iter().map(|set| Recommendation {
            set,
            why: format!(
                "{} of {} drains were cut short",
                advice.cut_short, advice.drains
            ),
        }));
    }
    let observed = drains.iter().filter(|r| r.observed);
    let would_help = observed.filter(|r| r.cut_total != Some(0)).count();
    if would_help > 0 {
        all.push(Recommendation {
            set: "ebb.dev/drain: on".into(),
            why: format!(
                "{would_help} of {} stops that were only observed cut connections",
                advice.observed
            ),
        });
    }
    let late: Vec<_> = drains.iter().filter(|r| r.still_arriving).collect();
    if late.len() * 2 > drains.len() {
        let longest = late.iter().filter_map(|r| r.settled_ms).max();
        let longest = longest.unwrap_or(millis(Policy::default().settle_max));
        // It was whole seconds, and the phase ended a moment later.
        let twice = (longest / 1000 * 2).div_ceil(STEP.as_secs()).max(1) * STEP.as_secs();
        all.push(Recommendation {
            set: format!("ebb.dev/settle-max: {twice}s"),
            why: format!(
                "clients still connected after settling in {} of {} drains",
                late.len(),
                drains.len()
            ),
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::drain_report::{CutFlow, testing};

    fn drained(held_ms: u64) -> Report {
        Report {
            held_ms,
            settled_ms: Some(held_ms / 2),
            ..testing::report(Some(ReleaseReason::Drained))
        }
    }

    fn deadline(states: &[FlowState]) -> Report {
        let address: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let cut = states.iter().map(|state| CutFlow {
            remote: address,
            peer: None,
            local: address,
            state: *state,
            age_ms: None,
            age_at_least_ms: None,
            bytes_in: 0,
            bytes_out: 0,
        });
        Report {
            held_ms: 25_000,
            cut: cut.collect(),
            cut_total: Some(u32::try_from(states.len()).unwrap()),
            ..testing::report(Some(ReleaseReason::Deadline))
        }
    }

    fn history(drains: &[Report]) -> WorkloadHistory<'_> {
        WorkloadHistory {
            drains: drains.iter().collect(),
            grace: Some(Duration::from_secs(30)),
            reserve: Duration::from_secs(5),
            ..WorkloadHistory::default()
        }
    }

    /// 100 connections: 98 of at most 1 s, and the others of at most this.
    fn lifetimes(longest: Option<Duration>) -> Vec<(Option<Duration>, u64)> {
        vec![(Some(Duration::from_secs(1)), 98), (longest, 2)]
    }

    #[test]
    fn few_drains_are_too_few() {
        let three = [drained(1000), drained(2000), drained(3000)];
        let advice = advise(&history(&three));
        assert_eq!(advice.basis, "3 drains: too few to advise; 5 are needed");
        assert_eq!(
            (advice.enough_grace_ms, advice.recommendations.len()),
            (None, 0)
        );
        assert_eq!(advice.drain.unwrap().p50_ms, 2000);
        assert!(advise(&history(&[])).basis.starts_with("0 drains: too few"));
        assert!(
            advise(&history(&[drained(1)]))
                .basis
                .starts_with("1 drain: too few")
        );
    }

    #[test]
    fn drains_that_tell_nothing_do_not_count() {
        let mut drains: Vec<_> = (0..4).map(|_| drained(1000)).collect();
        for reason in [
            ReleaseReason::Manual,
            ReleaseReason::Shutdown,
            ReleaseReason::Untracked,
            ReleaseReason::NotTerminating,
        ] {
            drains.push(testing::report(Some(reason)));
        }
        assert_eq!(advise(&history(&drains)).drains, 4);
    }

    #[test]
    fn drains_that_came_to_their_end_need_the_longest_of_them_and_the_reserve() {
        let drains: Vec<_> = (1..=100).map(|n| drained(n * 100)).collect();
        let advice = advise(&history(&drains));
        assert_eq!(
            advice.drain,
            Some(Spread {
                p50_ms: 5000,
                p99_ms: 9900
            })
        );
        assert_eq!(
            advice.settle,
            Some(Spread {
                p50_ms: 2500,
                p99_ms: 4950
            })
        );
        // 10 s and 5 s.
        assert_eq!(advice.enough_grace_ms, Some(15_000));
        assert_eq!(advice.recommendations, []);
    }

    #[test]
    fn where_clients_still_connected_after_settling_twice_the_time_is_recommended() {
        for (settled_ms, set) in [(15_003, "30s"), (60_000, "120s"), (2_000, "5s")] {
            let late = Report {
                still_arriving: true,
                settled_ms: Some(settled_ms),
                ..drained(90_000)
            };
            let drains = vec![late; 5];
            let advice = advise(&history(&drains));
            let settle_max = format!("ebb.dev/settle-max: {set}");
            assert!(
                advice.recommendations.iter().any(|r| r.set == settle_max),
                "{advice:?}"
            );
        }
    }

    #[test]
    fn without_a_pod_the_deadline_tells_the_grace_period() {
        for (deadline_ms, grace_ms) in [(24_990, 30_000), (25_000, 30_000), (3_998, 6_000)] {
            let drains = [Report {
                deadline_ms,
                ..drained(1000)
            }];
            let no_pod = WorkloadHistory {
                grace: None,
                ..history(&drains)
            };
            assert_eq!(advise(&no_pod).grace_ms, Some(grace_ms));
        }
    }

    #[test]
    fn a_grace_period_holds_the_hold_and_the_reserve() {
        for hold in [0, 1, 900, 4_000, 9_999, 10_000, 61_000, 3_600_000] {
            let policy = crate::policy::Policy {
                max_hold: Some(Duration::from_secs(86_400)),
                ..Default::default()
            };
            let grace = enough(hold, policy.reserve);
            let limits = crate::policy::CallLimits {
                grace: Some(Duration::from_millis(grace)),
                rpc_timeout: None,
            };
            assert!(
                millis(policy.deadline(limits).after) >= hold,
                "{hold}: {grace}"
            );
        }
    }

    #[test]
    fn where_drains_were_cut_short_the_lifetime_of_connections_decides() {
        let mut drains: Vec<_> = (0..5).map(|_| drained(1000)).collect();
        drains.push(deadline(&[FlowState::Active]));
        let unknown = advise(&history(&drains));
        assert_eq!(unknown.enough_grace_ms, None);
        assert!(
            unknown.basis.starts_with("1 of 6 drains were cut short"),
            "{}",
            unknown.basis
        );
        let minutes = Some(Duration::from_secs(300));
        let long = WorkloadHistory {
            lifetimes: lifetimes(minutes),
            ..history(&drains)
        };
        let advice = advise(&long);
        let lasted = advice.lifetimes.unwrap();
        assert_eq!((lasted.p50_ms, lasted.p99_ms), (Some(1000), Some(300_000)));
        assert_eq!((advice.cut, advice.cut_short), (1, 1));
        assert_eq!(advice.enough_grace_ms, Some(305_000));
        assert_eq!(
            advice.recommendations[0].set,
            "terminationGracePeriodSeconds: 305"
        );
        // Not where max-hold ends the holds.
        let by_max_hold = |r: &Report| Report {
            deadline_cause: DeadlineCause::MaxHold,
            ..r.clone()
        };
        let capped: Vec<_> = drains.iter().map(by_max_hold).collect();
        let advice = advise(&WorkloadHistory {
            grace: Some(Duration::from_secs(3600)),
            lifetimes: lifetimes(minutes),
            ..history(&capped)
        });
        let set: Vec<_> = advice.recommendations.iter().map(|r| &*r.set).collect();
        assert_eq!(set, ["ebb.dev/max-hold: 300s"]);
        // Longer than a day is no bound.
        let forever = WorkloadHistory {
            lifetimes: lifetimes(None),
            ..history(&drains)
        };
        assert_eq!(advise(&forever).enough_grace_ms, None);
    }

    #[test]
    fn if_idle_connections_are_cut_they_should_be_closed() {
        let drains: Vec<_> = (0..5)
            .map(|_| deadline(&[FlowState::Idle, FlowState::Idle, FlowState::Active]))
            .collect();
        let advice = advise(&history(&drains));
        assert_eq!(advice.recommendations[0].set, "ebb.dev/idle-flows: close");
        let closes = WorkloadHistory {
            closes_idle: true,
            ..history(&drains)
        };
        assert_eq!(advise(&closes).recommendations, []);
    }

    #[test]
    fn stops_that_were_observed_to_cut_are_a_reason_to_hold() {
        let observed = Report {
            observed: true,
            reason: Some(ReleaseReason::Exited),
            ..deadline(&[FlowState::Active])
        };
        let drains: Vec<_> = (0..5).map(|_| observed.clone()).collect();
        let advice = advise(&history(&drains));
        assert_eq!((advice.observed, advice.cut_short), (5, 5));
        let last = advice.recommendations.last().unwrap();
        assert_eq!(last.set, "ebb.dev/drain: on");
        assert!(last.why.starts_with("5 of 5 stops"), "{}", last.why);
    }
}
