//! The machine, one ordering of events at a time.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{looks::RETRIES, *};
use crate::{
    drain::report::{LatePeer, PodName},
    flow::{Direction, Exempt, FlowCounts},
    ids::{PodUid, SocketCookie},
};

/// The beginning of every drain here.
pub(super) const START: BootTime = BootTime::from_nanos(1_000_000_000_000);

pub(super) fn at(ms: u64) -> BootTime {
    START + Duration::from_millis(ms)
}

pub(super) fn subject() -> Subject {
    Subject {
        pod: PodName {
            uid: PodUid::new("uid"),
            namespace: "shop".into(),
            name: "web-0".into(),
        },
        started_at: "2026-01-01T00:00:00Z".into(),
        warnings: vec![],
    }
}

pub(super) fn flow(cookie: u64, state: FlowState) -> Flow {
    Flow {
        cookie: SocketCookie(cookie),
        direction: Direction::Inbound,
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: remote(cookie),
        state,
        exempt: None,
        age: Some(Duration::from_secs(600)),
        older_than_agent: false,
        quiet_for: Duration::ZERO,
        bytes_in: 1,
        bytes_out: 2,
    }
}

pub(super) fn remote(cookie: u64) -> SocketAddr {
    let [.., a, b] = cookie.to_be_bytes();
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 9, a, b)), 40_000)
}

pub(super) fn opened(cookie: u64, ms: u64) -> Event {
    Event::FlowOpened {
        cookie: SocketCookie(cookie),
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: remote(cookie),
        at: at(ms),
    }
}

pub(super) fn closed(cookie: u64, ms: u64) -> Event {
    Event::FlowClosed {
        cookie: SocketCookie(cookie),
        at: at(ms),
    }
}

fn looked(ms: u64, flows: &[Flow]) -> Event {
    Event::Looked(Snapshot {
        taken_at: at(ms),
        flows: flows.to_vec(),
    })
}

fn failed() -> Event {
    Event::LookFailed("no such namespace".into())
}

fn until(until: Until) -> Policy {
    Policy {
        until,
        ..Policy::default()
    }
}

fn machine(policy: Policy) -> Machine {
    Machine::new(subject(), policy, START, at(60_000), START)
}

const LOOK: Option<Action> = Some(Action::Look);
const DRAINED: Option<Action> = Some(Action::Release(ReleaseReason::Drained));

use FlowState::{Active, Awaiting, Idle};

/// A machine that has looked at its beginning, and whose look of the drain phase, asked for at 3 s, is
/// under way.
fn in_drain(policy: Policy, flows: &[Flow]) -> Machine {
    let mut m = machine(policy);
    assert_eq!(m.step(Event::Tick, START), LOOK);
    assert_eq!(m.step(looked(0, flows), at(1)), None);
    assert_eq!(m.next_wake(), Some(at(3000)));
    assert_eq!(m.step(Event::Tick, at(3000)), LOOK);
    m
}

/// Steps through time until the machine asks for something, and says when and what.
fn next(m: &mut Machine) -> (BootTime, Action) {
    for _ in 0..100 {
        let now = m.next_wake().expect("not released");
        if let Some(action) = m.step(Event::Tick, now) {
            return (now, action);
        }
    }
    panic!("woken a hundred times for nothing: {m:?}");
}

#[test]
fn a_pod_without_flows_is_released_after_quiet() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(m.step(looked(3000, &[]), at(3002)), DRAINED);
    let report = m.report(at(9000));
    assert_eq!(
        (report.held_ms, report.reason),
        (3002, Some(ReleaseReason::Drained))
    );
    assert_eq!(report.flows_at_start, Some(FlowCounts::default()));
    assert_eq!(report.release_lag_us, None, "no close ended it");
    assert_eq!(
        (m.next_wake(), m.step(Event::ReleaseNow, at(9000))),
        (None, None)
    );
}

#[test]
fn settle_goes_on_for_quiet_after_each_new_flow() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(looked(0, &[]), START);
    m.step(opened(1, 2000), at(2000));
    m.step(closed(1, 2100), at(2100));
    assert_eq!(m.next_wake(), Some(at(5000)));
    m.step(opened(2, 4000), at(4000));
    assert_eq!(m.next_wake(), Some(at(7000)));
}

#[test]
fn a_repeated_open_edge_does_not_prolong_settle() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(opened(1, 1000), at(1000));
    m.step(opened(1, 1000), at(2500));
    assert_eq!(m.next_wake(), Some(at(4000)));
    assert_eq!(m.report(at(2500)).arrived.unwrap(), 1);
}

#[test]
fn settle_ends_after_settle_max_however_many_arrive() {
    let mut m = machine(until(Until::Settled));
    m.step(Event::Tick, START);
    for s in 1..15 {
        assert_eq!(m.step(opened(s, s * 1000), at(s * 1000)), None);
    }
    assert_eq!(m.next_wake(), Some(at(15_000)));
    assert_eq!(m.step(Event::Tick, at(15_000)), DRAINED);
    let report = m.report(at(15_000));
    assert_eq!(
        (report.arrived.unwrap(), report.cut_total.unwrap()),
        (14, 14),
        "what edges announced is still open"
    );
}

#[test]
fn until_settled_does_not_wait_for_flows() {
    let mut m = machine(until(Until::Settled));
    m.step(Event::Tick, START);
    m.step(looked(0, &[flow(1, Active)]), at(1));
    assert_eq!(
        next(&mut m),
        (at(3000), Action::Release(ReleaseReason::Drained))
    );
    assert_eq!(m.report(at(3000)).cut_total.unwrap(), 1);
}

#[test]
fn lost_edges_count_as_an_arrival_and_call_for_a_look() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(looked(0, &[]), START);
    assert_eq!(m.step(Event::Lost, at(2000)), LOOK);
    m.step(looked(2000, &[]), at(2001));
    assert_eq!(m.next_wake(), Some(at(5000)));
}

#[test]
fn a_look_begun_before_edges_were_lost_releases_nothing() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(m.step(Event::Lost, at(3001)), None);
    assert_eq!(m.step(looked(3000, &[]), at(3002)), None);
    assert_eq!(next(&mut m), (at(3003), Action::Look));
    assert_eq!(m.step(looked(3003, &[]), at(3004)), DRAINED);
}

#[test]
fn a_look_overtaken_by_a_new_flow_releases_nothing() {
    let mut m = in_drain(until(Until::Zero), &[]);
    m.step(opened(7, 3000), at(3001));
    assert_eq!(m.step(looked(3000, &[]), at(3002)), None);
    assert_eq!(
        m.step(closed(7, 3500), at(3500)),
        LOOK,
        "the close of the last is looked at at once"
    );
    assert_eq!(m.step(looked(3500, &[]), at(3501)), DRAINED);
    let report = m.report(at(3501));
    assert_eq!((report.arrived.unwrap(), report.ended.unwrap()), (1, 1));
    assert_eq!(
        report.late_peers,
        [LatePeer {
            address: remote(7).ip(),
            flows: 1
        }]
    );
}

#[test]
fn the_last_close_is_confirmed_by_a_look_and_its_lag_told() {
    let flows = [flow(1, Active), flow(2, Idle)];
    let mut m = in_drain(until(Until::Zero), &flows);
    assert_eq!(m.step(looked(3000, &flows), at(3001)), None);
    assert_eq!(m.step(closed(1, 4000), at(4001)), None);
    assert_eq!(m.step(closed(2, 5000), at(5001)), LOOK);
    assert_eq!(m.step(looked(5001, &[]), at(5004)), DRAINED);
    let report = m.report(at(9000));
    assert_eq!(report.release_lag_us, Some(4000));
    assert_eq!((report.ended.unwrap(), report.cut_total.unwrap()), (2, 0));
}

#[test]
fn closing_twice_ends_one_flow() {
    let flows = [flow(1, Active), flow(2, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), None);
    assert_eq!(
        m.step(closed(1, 4000), at(4001)),
        None,
        "flow 2 still holds"
    );
    assert_eq!(m.report(at(4001)).ended.unwrap(), 1);
}

#[test]
fn a_look_that_disagrees_is_repeated_with_growing_pauses() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    let mut now = at(4000);
    assert_eq!(m.step(closed(1, 4000), now), LOOK);
    let mut pauses = vec![];
    while now < at(4990) {
        // The kernel has not stored the new state yet.
        assert_eq!(
            m.step(
                Event::Looked(Snapshot {
                    taken_at: now,
                    flows: flows.to_vec()
                }),
                now
            ),
            None
        );
        let (due, action) = next(&mut m);
        assert_eq!(action, Action::Look);
        pauses.push(due.since(now).as_millis());
        now = due;
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 250, 250, 250]);
    assert_eq!(m.report(now).ended.unwrap(), 1);
}

#[test]
fn a_look_that_goes_on_showing_a_closed_flow_is_believed() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), LOOK);
    m.step(looked(5000, &flows), at(5000));
    assert_eq!(
        m.next_wake(),
        Some(at(10_000)),
        "it holds again, and nothing is urgent"
    );
}

#[test]
fn a_close_edge_that_never_came_is_made_up_for_by_a_later_look() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(next(&mut m), (at(8001), Action::Look));
    assert_eq!(m.step(looked(8001, &[]), at(8002)), DRAINED);
    assert_eq!(m.report(at(8002)).ended.unwrap(), 1);
}

#[test]
fn exempt_flows_hold_nothing() {
    let exempt = Flow {
        exempt: Some(Exempt::Outbound),
        ..flow(1, Active)
    };
    let mut m = in_drain(until(Until::Zero), std::slice::from_ref(&exempt));
    assert_eq!(m.step(looked(3000, &[exempt]), at(3001)), DRAINED);
    assert_eq!(
        m.report(at(3001)).flows_at_start,
        Some(FlowCounts::default())
    );
}

#[test]
fn an_arrival_whose_edge_was_lost_is_found_by_a_look_and_counted_once() {
    let mut m = in_drain(until(Until::Zero), &[]);
    let late = Flow {
        age: Some(Duration::from_millis(500)),
        ..flow(4, Active)
    };
    m.step(looked(3000, &[late]), at(3001));
    m.step(opened(4, 2500), at(3002));
    let report = m.report(at(3002));
    assert_eq!((report.arrived.unwrap(), report.late_peers.len()), (1, 1));
}

#[test]
fn a_flow_that_closes_during_the_first_look_has_ended() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(closed(1, 1), at(1));
    m.step(looked(0, &[flow(1, Active)]), at(2));
    let report = m.report(at(2));
    assert_eq!(
        (
            report.ended.unwrap(),
            report.flows_at_start.map(|c| c.total())
        ),
        (1, Some(1))
    );
}

#[test]
fn until_idle_releases_with_idle_flows_and_reports_them_as_cut() {
    let mut m = in_drain(until(Until::Idle), &[]);
    assert_eq!(m.step(looked(3000, &[flow(1, Idle)]), at(3001)), DRAINED);
    let report = m.report(at(3001));
    assert_eq!((report.cut_total.unwrap(), report.cut[0].state), (1, Idle));
    assert_eq!(report.cut[0].age_ms, Some(600_001));
}

#[test]
fn until_idle_looks_when_the_last_flow_can_have_become_idle() {
    let quiet_for = |ms| Flow {
        quiet_for: Duration::from_millis(ms),
        ..flow(ms, Active)
    };
    let flows = [quiet_for(4500), quiet_for(2000)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(
        m.next_wake(),
        Some(at(6000)),
        "the one that was quiet for 2 s lacks 3 s"
    );
    m.step(closed(2000, 3100), at(3100));
    assert_eq!(m.next_wake(), Some(at(3500)), "the other one lacks 0.5 s");
    assert_eq!(m.step(Event::Tick, at(3500)), LOOK);
    assert_eq!(m.step(looked(3500, &[flow(4500, Idle)]), at(3501)), DRAINED);
    assert_eq!(
        m.report(at(3501)).release_lag_us,
        None,
        "time ended it, not a close"
    );
}

#[test]
fn until_idle_never_looks_more_often_than_the_floor() {
    let almost = [Flow {
        quiet_for: Duration::from_millis(4999),
        ..flow(1, Active)
    }];
    let mut m = in_drain(until(Until::Idle), &almost);
    m.step(looked(3000, &almost), at(3001));
    assert_eq!(m.next_wake(), Some(at(3101)));
}

#[test]
fn an_unanswered_request_can_not_become_idle_before_its_answer_and_idle_after() {
    let policy = Policy {
        idle_after: Duration::from_secs(2),
        ..until(Until::Idle)
    };
    let waiting = [Flow {
        quiet_for: Duration::from_secs(500),
        ..flow(1, Awaiting)
    }];
    let mut m = in_drain(policy, &waiting);
    m.step(looked(3000, &waiting), at(3001));
    assert_eq!(m.next_wake(), Some(at(5000)));
}

#[test]
fn until_idle_looks_at_once_when_the_last_live_flow_closes() {
    let flows = [flow(1, Idle), flow(2, Active)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(m.step(closed(2, 3300), at(3300)), LOOK);
    assert_eq!(m.step(looked(3300, &flows[..1]), at(3301)), DRAINED);
    assert_eq!(m.report(at(3301)).release_lag_us, Some(1000));
}

#[test]
fn until_zero_waits_for_idle_flows() {
    let flows = [flow(1, Idle)];
    let mut m = in_drain(until(Until::Zero), &flows);
    assert_eq!(m.step(looked(3000, &flows), at(3001)), None);
}

#[test]
fn a_look_shortly_before_the_deadline_makes_the_cut_true() {
    let mut m = in_drain(until(Until::Zero), &[]);
    let mut now = at(3000);
    let (early, late) = ([flow(1, Active)], [flow(1, Awaiting), flow(2, Active)]);
    while now < at(59_800) {
        m.step(
            Event::Looked(Snapshot {
                taken_at: now,
                flows: early.to_vec(),
            }),
            now,
        );
        (now, _) = next(&mut m);
    }
    assert_eq!(now, at(59_800));
    m.step(looked(59_800, &late), at(59_801));
    m.step(closed(2, 59_900), at(59_900));
    assert_eq!(
        next(&mut m),
        (at(60_000), Action::Release(ReleaseReason::Deadline))
    );
    let report = m.report(at(70_000));
    assert_eq!(
        report
            .cut
            .iter()
            .map(|c| (c.remote, c.state))
            .collect::<Vec<_>>(),
        [(remote(1), Awaiting)]
    );
    assert_eq!((report.held_ms, report.deadline_ms), (60_000, 60_000));
}

#[test]
fn the_deadline_wins_over_a_look_that_comes_too_late() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(
        m.step(looked(3000, &[]), at(60_000)),
        Some(Action::Release(ReleaseReason::Deadline))
    );
}

#[test]
fn a_joining_hold_shortens_the_deadline_and_never_lengthens_it() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(Event::Limit(at(90_000)), at(1));
    assert_eq!(m.deadline(), at(60_000));
    m.step(Event::Limit(at(2000)), at(2));
    assert_eq!(m.deadline(), at(2000));
    assert_eq!(
        m.step(Event::Limit(at(5)), at(10)),
        Some(Action::Release(ReleaseReason::Deadline))
    );
}

#[test]
fn one_failed_look_is_retried() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(m.step(failed(), at(3001)), None);
    assert_eq!(next(&mut m), (at(3051), Action::Look));
    assert_eq!(m.step(looked(3051, &[]), at(3052)), DRAINED);
}

#[test]
fn a_pod_that_can_not_be_looked_at_is_kept_for_the_settle_time_and_untracked() {
    let mut m = machine(until(Until::Zero));
    let (mut now, mut looks) = (START, 0);
    m.step(Event::Tick, START);
    let end = loop {
        looks += 1;
        m.step(failed(), now);
        match next(&mut m) {
            (at, Action::Look) => now = at,
            end => break end,
        }
    };
    assert_eq!(end, (at(15_000), Action::Release(ReleaseReason::Untracked)));
    assert_eq!(looks, RETRIES);
    let report = m.report(at(15_000));
    assert_eq!(report.detail.as_deref(), Some("no such namespace"));
    assert_eq!(
        (
            report.flows_at_start,
            report.flows_now,
            report.changes.len()
        ),
        (None, None, 0)
    );
}

#[test]
fn a_pod_untracked_from_the_beginning_is_never_looked_at() {
    for policy in [
        until(Until::Zero),
        until(Until::Idle),
        until(Until::Settled),
    ] {
        let mut m = machine(policy);
        assert_eq!(
            m.step(Event::Untracked("a sandboxed runtime".into()), START),
            None
        );
        assert_eq!(
            next(&mut m),
            (at(15_000), Action::Release(ReleaseReason::Untracked))
        );
        let report = m.report(at(15_000));
        assert_eq!(
            (report.arrived, report.ended, report.cut_total),
            (None, None, None),
            "not zero: not known"
        );
    }
}

#[test]
fn an_untracked_pod_is_released_at_a_deadline_before_its_settle_time() {
    let mut m = Machine::new(subject(), until(Until::Zero), START, at(4000), START);
    m.step(Event::Untracked("a sandboxed runtime".into()), START);
    assert_eq!(
        next(&mut m),
        (at(4000), Action::Release(ReleaseReason::Deadline))
    );
}

#[test]
fn a_continued_drain_keeps_its_beginning_and_settles_anew_within_it() {
    let mut m = Machine::new(subject(), until(Until::Zero), START, at(60_000), at(14_000));
    assert_eq!(m.step(Event::Tick, at(14_000)), LOOK);
    assert_eq!(
        m.next_wake(),
        Some(at(15_000)),
        "settle_max counts from the first beginning"
    );
    assert_eq!(m.report(at(14_000)).held_ms, 14_000);
}

#[test]
fn manual_and_shutdown_release_in_any_phase() {
    for (event, reason) in [
        (Event::ReleaseNow, ReleaseReason::Manual),
        (Event::Shutdown, ReleaseReason::Shutdown),
    ] {
        let mut m = machine(until(Until::Zero));
        assert_eq!(m.step(event.clone(), at(1)), Some(Action::Release(reason)));
        let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
        assert_eq!(m.step(event, at(3001)), Some(Action::Release(reason)));
        assert_eq!(m.report(at(3001)).cut_total.unwrap(), 1);
    }
}

#[test]
fn the_report_tells_the_phases_with_what_held_in_each() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    m.step(closed(1, 4000), at(4000));
    m.step(looked(4000, &[]), at(4001));
    let changes: Vec<_> = m
        .report(at(4001))
        .changes
        .iter()
        .map(|c| (c.at_ms, c.phase, c.flows.total()))
        .collect();
    assert_eq!(
        changes,
        [
            (1, Phase::Settle, 1),
            (3000, Phase::Drain, 1),
            (4001, Phase::Drain, 0),
            (4001, Phase::Released, 0),
        ]
    );
}

fn closing() -> Policy {
    Policy {
        idle_flows: IdleFlows::Close,
        ..Policy::default()
    }
}

#[test]
fn idle_flows_are_closed_after_settle_once_and_their_end_is_waited_for() {
    let (busy, idle) = (flow(1, Active), flow(2, Idle));
    let mut m = in_drain(closing(), &[busy.clone(), idle.clone()]);
    let close = Some(Action::CloseIdle(vec![idle.clone()]));
    assert_eq!(
        m.step(looked(3000, &[busy.clone(), idle.clone()]), at(3001)),
        close
    );
    assert_eq!(
        m.step(Event::IdleClosed(vec![SocketCookie(2)]), at(3002)),
        None
    );

    assert_eq!(
        m.next_wake(),
        Some(at(8000)),
        "when the busy one may be idle"
    );
    assert_eq!(m.step(Event::Tick, at(8000)), LOOK);
    let both = [flow(1, Idle), idle];
    let close = Some(Action::CloseIdle(vec![flow(1, Idle)]));
    assert_eq!(
        m.step(looked(8000, &both), at(8001)),
        close,
        "not the other one again"
    );
    assert_eq!(
        m.step(Event::IdleClosed(vec![SocketCookie(1)]), at(8002)),
        None
    );

    assert_eq!(m.step(closed(1, 8003), at(8003)), None);
    let asked = m.step(closed(2, 8004), at(8004));
    let asked = asked.unwrap_or_else(|| next(&mut m).1);
    assert_eq!(asked, Action::Look);
    assert_eq!(m.step(looked(8010, &[]), at(8011)), DRAINED);
    let report = m.report(at(8011));
    assert_eq!(
        (
            report.idle_closed,
            report.ended.unwrap(),
            report.cut_total.unwrap()
        ),
        (2, 2, 0)
    );
}

#[test]
fn idle_flows_of_a_pod_that_did_not_ask_for_it_are_kept() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Idle)]);
    assert_eq!(m.step(looked(3000, &[flow(1, Idle)]), at(3001)), None);
}

#[test]
fn an_idle_flow_that_moved_before_it_could_be_closed_is_closed_when_it_is_idle_again() {
    let mut m = in_drain(closing(), &[flow(1, Idle)]);
    let close = Some(Action::CloseIdle(vec![flow(1, Idle)]));
    assert_eq!(m.step(looked(3000, &[flow(1, Idle)]), at(3001)), close);
    assert_eq!(m.step(Event::IdleClosed(vec![]), at(3002)), None);
    let (when, action) = next(&mut m);
    assert_eq!(action, Action::Look);
    let again = Event::Looked(Snapshot {
        taken_at: when,
        flows: vec![flow(1, Idle)],
    });
    assert_eq!(m.step(again, when), close);
}
