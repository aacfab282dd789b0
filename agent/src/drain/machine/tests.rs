//! The machine, one ordering of events at a time.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{
    closing::{A_ROUND, PACE},
    looks::RETRIES,
    *,
};
use crate::{
    drain::{policy::IdleFlows, report::LatePeer},
    flow::{Direction, Exempt, FlowCounts},
    ids::{PodName, PodUid, SocketCookie},
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
        since: Since::Opening,
        quiet_for: Duration::ZERO,
        bytes_in: 1,
        bytes_out: 2,
        cgroup: None,
        others: vec![],
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

/// Lookups have shown these.
fn found(ms: u64, flows: &[Flow]) -> Event {
    Event::LookedUp(Snapshot {
        taken_at: at(ms),
        flows: flows.to_vec(),
    })
}

/// The request to look up these.
fn look_up(cookies: &[u64]) -> Option<Action> {
    let ends = cookies.iter().map(|n| {
        let flow = flow(*n, Active);
        Ends {
            cookie: flow.cookie,
            local: flow.local,
            remote: flow.remote,
        }
    });
    Some(Action::LookUp(ends.collect()))
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

use FlowState::{Active, Awaiting, Flushing, Idle};

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
fn flows_that_arrive_when_settle_is_over_are_said_to_still_arrive() {
    // Settle is cut short by its maximum, while they keep coming.
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    for s in 1..15 {
        m.step(opened(s, s * 1000), at(s * 1000));
        assert!(!m.still_arriving(), "still settling");
    }
    m.step(Event::Tick, at(15_000));
    assert!(m.still_arriving() && m.report(at(15_000)).still_arriving);

    // Settle ends quiet; then one more comes.
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    assert!(!m.still_arriving());
    m.step(opened(2, 4000), at(4000));
    assert!(m.still_arriving());

    // One that came before settle was over, and whose edge is late, does not count.
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(opened(2, 2999), at(3010));
    assert!(!m.still_arriving());
}

#[test]
fn who_has_stopped_connecting_is_not_among_those_who_still_do() {
    let from = |last: u8, ms: u64| Event::FlowOpened {
        cookie: SocketCookie(ms),
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: SocketAddr::from(([10, 0, 0, last], 40_000)),
        at: at(ms),
    };
    let addresses = |peers: Vec<LatePeer>| {
        let addresses = peers.iter().map(|p| p.address.to_string());
        addresses.collect::<Vec<_>>()
    };
    // Settle is cut short by its maximum.
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    for s in 1..15 {
        m.step(from(if s < 8 { 7 } else { 8 }, s * 1000), at(s * 1000));
    }
    m.step(Event::Tick, at(15_000));
    assert_eq!(addresses(m.still_connecting()), ["10.0.0.8"]);
    let all = m.report(at(15_000)).late_peers;
    assert_eq!(addresses(all), ["10.0.0.7", "10.0.0.8"]);

    // Settle ends quiet; then one comes.
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(from(7, 1000), at(1000));
    m.step(Event::Tick, at(4000));
    m.step(from(8, 5000), at(5000));
    assert!(m.still_arriving());
    assert_eq!(addresses(m.still_connecting()), ["10.0.0.8"]);
}

#[test]
fn nobody_who_arrives_is_nobody_who_still_arrives() {
    let mut policy = until(Until::Zero);
    policy.quiet = policy.settle_max * 2;
    let mut m = machine(policy);
    m.step(Event::Tick, START);
    m.step(Event::Tick, at(15_000));
    assert!(!m.still_arriving());
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
        look_up(&[7]),
        "the close of the last is looked at at once"
    );
    assert_eq!(m.step(found(3500, &[]), at(3501)), DRAINED);
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
fn the_last_close_is_confirmed_by_lookups_and_its_lag_told() {
    let flows = [flow(1, Active), flow(2, Idle)];
    let mut m = in_drain(until(Until::Zero), &flows);
    assert_eq!(m.step(looked(3000, &flows), at(3001)), None);
    assert_eq!(m.step(closed(1, 4000), at(4001)), None);
    assert_eq!(m.step(closed(2, 5000), at(5001)), look_up(&[1, 2]));
    assert_eq!(m.step(found(5001, &[flow(2, Flushing)]), at(5004)), DRAINED);
    let report = m.report(at(9000));
    assert_eq!(report.released_by, Some(LookKind::Lookup));
    assert_eq!((report.walks, report.lookups), (2, 1));
    assert_eq!(report.flows_now, Some(FlowCounts::default()));
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
    assert_eq!(m.step(closed(1, 4000), now), look_up(&[1]));
    assert_eq!(m.step(Event::Unclear, now), LOOK);
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
            look_up(&[1])
        );
        assert_eq!(m.step(Event::Unclear, now), None);
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
    assert_eq!(m.step(closed(1, 4000), at(4000)), look_up(&[1]));
    assert_eq!(m.step(Event::Unclear, at(4000)), LOOK);
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
    assert_eq!(
        m.step(looked(8001, &[]), at(8002)),
        None,
        "a walk can pass over a flow"
    );
    assert_eq!(m.report(at(8002)).ended.unwrap(), 0);
    assert_eq!(next(&mut m), (at(8003), Action::Look));
    assert_eq!(m.step(looked(8003, &[]), at(8004)), DRAINED);
    assert_eq!(m.report(at(8004)).ended.unwrap(), 1);
}

#[test]
fn a_walk_that_passes_over_a_live_flow_releases_nothing() {
    let flows = [flow(1, Active), flow(2, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(next(&mut m), (at(8001), Action::Look));
    // It misses one, and the other closes.
    assert_eq!(m.step(looked(8001, &flows[..1]), at(8002)), None);
    m.step(closed(1, 8002), at(8002));
    assert_eq!(next(&mut m), (at(8003), Action::Look));
    assert_eq!(m.step(looked(8003, &flows[1..]), at(8004)), None);
    let report = m.report(at(8004));
    assert_eq!((report.ended, report.cut_total), (Some(1), Some(0)));
    assert_eq!(m.step(closed(2, 9000), at(9000)), look_up(&[2]));
    assert_eq!(m.step(found(9000, &[]), at(9001)), DRAINED);
}

#[test]
fn a_missed_flow_whose_close_is_told_just_afterwards_is_looked_up_as_any() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(looked(3000, &[flow(1, Active)]), at(3001));
    assert_eq!(next(&mut m), (at(8001), Action::Look));
    assert_eq!(m.step(looked(8001, &[]), at(8002)), None);
    assert_eq!(m.step(closed(1, 8001), at(8002)), look_up(&[1]));
    assert_eq!(m.step(found(8002, &[]), at(8003)), DRAINED);
}

/// A connection of several subflows, as a walk shows it.
fn several(cookie: u64, others: &[u64]) -> Flow {
    Flow {
        others: others.iter().copied().map(SocketCookie).collect(),
        ..flow(cookie, Active)
    }
}

#[test]
fn a_connection_of_several_subflows_holds_until_a_walk_shows_that_all_are_gone() {
    let mut m = in_drain(until(Until::Zero), &[]);
    m.step(looked(3000, &[several(1, &[2])]), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), None, "the other goes on");
    let report = m.report(at(4000));
    assert_eq!((report.arrived, report.ended), (Some(0), Some(0)));
    // The next walk shows it under the name of the other.
    let (when, action) = next(&mut m);
    assert_eq!(action, Action::Look);
    let look = Event::Looked(Snapshot {
        taken_at: when,
        flows: vec![flow(2, Active)],
    });
    assert_eq!(m.step(look, when), None);
    assert_eq!(m.report(when).ended, Some(0), "it is the same one");
    let later = when.since(START).as_millis() as u64 + 1500;
    assert_eq!(m.step(closed(2, later), at(later)), look_up(&[2]));
    assert_eq!(m.step(found(later, &[]), at(later + 1)), DRAINED);
    assert_eq!(m.report(at(later + 1)).ended, Some(1));
}

#[test]
fn a_connection_of_several_subflows_that_all_close_is_confirmed_by_a_walk() {
    let mut m = in_drain(until(Until::Zero), &[]);
    m.step(looked(3000, &[several(1, &[2, 3])]), at(3001));
    m.step(closed(2, 4000), at(4000));
    m.step(closed(1, 4001), at(4001));
    assert_eq!(m.step(closed(3, 4002), at(4002)), LOOK);
    assert_eq!(m.step(looked(4002, &[]), at(4003)), DRAINED);
    let report = m.report(at(4003));
    assert_eq!((report.ended, report.release_lag_us), (Some(1), Some(1000)));
}

#[test]
fn a_subflow_that_joins_is_no_second_connection() {
    let mut m = in_drain(until(Until::Zero), &[]);
    m.step(looked(3000, &[several(1, &[2])]), at(3001));
    m.step(opened(2, 2000), at(3002));
    let report = m.report(at(3002));
    assert_eq!((report.arrived, report.ended), (Some(0), Some(0)));
}

#[test]
fn a_flow_without_a_record_that_was_not_there_before_is_an_arrival_and_holds_once() {
    let lost = |cookie, state| Flow {
        since: Since::Unknown,
        age: None,
        ..flow(cookie, state)
    };
    let mut m = in_drain(until(Until::Idle), &[lost(1, Active)]);
    let both = [lost(1, Active), lost(2, Active)];
    assert_eq!(m.step(looked(3000, &both), at(3001)), None);
    let report = m.report(at(3001));
    assert_eq!(report.arrived, Some(1), "the other one may be old");
    assert_eq!(report.late_peers.len(), 1);
    let (when, _) = next(&mut m);
    let idle = Event::Looked(Snapshot {
        taken_at: when,
        flows: vec![lost(1, Idle), lost(2, Idle)],
    });
    assert_eq!(m.step(idle, when), DRAINED, "it has arrived only once");
}

#[test]
fn a_settle_phase_of_very_many_connections_looks_in_between_to_forget_them() {
    let mut m = machine(Policy {
        settle_max: Duration::from_secs(30),
        quiet: Duration::from_secs(30),
        ..until(Until::Zero)
    });
    m.step(Event::Tick, START);
    m.step(looked(0, &[]), at(1));
    let asked = (0..20_000).find(|n| {
        m.step(opened(*n, 2000), at(2000));
        m.step(closed(*n, 2000), at(2000)) == LOOK
    });
    assert_eq!(asked, Some(16_384));
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
    assert_eq!(m.step(Event::Tick, at(3500)), look_up(&[2000, 4500]));
    assert_eq!(m.step(found(3500, &[flow(4500, Idle)]), at(3501)), DRAINED);
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
    assert_eq!(m.step(closed(2, 3300), at(3300)), look_up(&[1, 2]));
    assert_eq!(m.step(found(3300, &flows[..1]), at(3301)), DRAINED);
    assert_eq!(m.report(at(3301)).release_lag_us, Some(1000));
}

#[test]
fn until_idle_a_flow_that_has_woken_up_is_found_by_lookups() {
    let flows = [flow(1, Idle), flow(2, Active)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(m.step(closed(2, 3300), at(3300)), look_up(&[1, 2]));
    assert_eq!(m.step(found(3300, &[flow(1, Awaiting)]), at(3301)), None);
    assert_eq!(m.report(at(3301)).flows_now.unwrap().awaiting, 1);
}

#[test]
fn a_flow_that_lookups_should_show_and_do_not_calls_for_a_walk() {
    let flows = [flow(1, Idle), flow(2, Active)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(looked(3000, &flows), at(3001));
    assert_eq!(m.step(closed(2, 3300), at(3300)), look_up(&[1, 2]));
    assert_eq!(m.step(found(3300, &[]), at(3301)), LOOK);
}

#[test]
fn a_flow_that_lookups_still_show_long_after_its_close_calls_for_a_walk() {
    let flows = [flow(1, Active), flow(2, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    m.step(closed(1, 3100), at(3100));
    assert_eq!(m.step(closed(2, 4200), at(4200)), look_up(&[1, 2]));
    assert_eq!(m.step(found(4200, &flows), at(4201)), LOOK);
    assert_eq!(m.step(looked(4201, &flows[..1]), at(4202)), None);
    assert_eq!(m.next_wake(), Some(at(9202)), "it holds again");
}

#[test]
fn lookups_overtaken_by_a_new_flow_release_nothing() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(looked(3000, &[flow(1, Active)]), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), look_up(&[1]));
    m.step(opened(2, 4000), at(4001));
    assert_eq!(m.step(found(4000, &[]), at(4001)), None);
}

#[test]
fn outdated_lookups_are_made_anew_at_once_but_not_for_ever() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(looked(3000, &[flow(1, Active)]), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), look_up(&[1]));
    for _ in 0..3 {
        assert_eq!(m.step(Event::Outdated, at(4000)), look_up(&[1]));
    }
    assert_eq!(m.step(Event::Outdated, at(4000)), LOOK);
}

#[test]
fn there_are_no_lookups_without_a_walk_since_edges_were_lost_or_a_walk_failed() {
    let one = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &one);
    // The walk that is under way was begun before.
    m.step(Event::Lost, at(3001));
    m.step(looked(3000, &one), at(3002));
    assert_eq!(next(&mut m).1, Action::Look);
    m.step(failed(), at(3010));
    m.step(closed(1, 3020), at(3020));
    assert_eq!(next(&mut m).1, Action::Look);
}

#[test]
fn more_than_a_few_flows_are_not_looked_up_one_by_one() {
    let flows: Vec<_> = (1..=FEW as u64 + 1).map(|n| flow(n, Active)).collect();
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(looked(3000, &flows), at(3001));
    let mut last = None;
    for n in 1..=flows.len() as u64 {
        last = m.step(closed(n, 4000), at(4000));
    }
    assert_eq!(last, LOOK);
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
    m.step(found(4000, &[]), at(4001));
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
            (3001, Phase::Drain, 1),
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
    assert_eq!(Some(asked), look_up(&[1, 2]));
    assert_eq!(m.step(found(8010, &[]), at(8011)), DRAINED);
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

/// The cookies of an answer to close idle flows.
fn closing_these(action: Option<Action>) -> Vec<SocketCookie> {
    match action {
        Some(Action::CloseIdle(idle)) => idle.iter().map(|f| f.cookie).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn many_idle_flows_are_closed_a_round_at_a_time() {
    let mut left: Vec<_> = (0..3 * A_ROUND as u64 - 10)
        .map(|n| flow(n, Idle))
        .collect();
    let mut m = in_drain(closing(), &left);
    let mut now = at(3000);
    let mut rounds = vec![];
    while !left.is_empty() {
        let look = Event::Looked(Snapshot {
            taken_at: now,
            flows: left.clone(),
        });
        let round = closing_these(m.step(look, now));
        rounds.push((round.len(), now));
        left.retain(|f| !round.contains(&f.cookie));
        for cookie in &round {
            let at = now;
            m.step(
                Event::FlowClosed {
                    cookie: *cookie,
                    at,
                },
                now,
            );
        }
        m.step(Event::IdleClosed(round), now);
        // A look that comes early, for another reason, is no reason for another round.
        let early = Event::Looked(Snapshot {
            taken_at: now + PACE / 2,
            flows: left.clone(),
        });
        if !left.is_empty() {
            assert_eq!(m.step(early, now + PACE / 2), None);
            let (when, action) = next(&mut m);
            assert_eq!(action, Action::Look);
            assert!(when <= now + 2 * PACE, "{when:?} after {now:?}");
            now = when;
        }
    }
    let sizes: Vec<_> = rounds.iter().map(|(n, _)| *n).collect();
    assert_eq!(sizes, [A_ROUND, A_ROUND, A_ROUND - 10]);
    for pair in rounds.windows(2) {
        assert!(pair[1].1.since(pair[0].1) >= PACE, "{rounds:?}");
    }
}

#[test]
fn idle_flows_that_can_not_be_closed_do_not_keep_the_others_from_their_turn() {
    let all: Vec<_> = (0..2 * A_ROUND as u64).map(|n| flow(n, Idle)).collect();
    let mut m = in_drain(closing(), &all);
    let first = closing_these(m.step(looked(3000, &all), at(3000)));
    m.step(Event::IdleClosed(vec![]), at(3001));
    assert_eq!(next(&mut m), (at(3000) + PACE, Action::Look));
    let second = closing_these(m.step(looked(3500, &all), at(3500)));
    assert!(second.iter().all(|c| !first.contains(c)), "{second:?}");
    assert_eq!(second.len(), A_ROUND);
    m.step(Event::IdleClosed(second.clone()), at(3501));
    // Then those of the first round once more, but not at that pace.
    let (when, _) = next(&mut m);
    assert!(when > at(3500) + 2 * PACE, "{when:?}");
    let again = Event::Looked(Snapshot {
        taken_at: when,
        flows: all,
    });
    let third = closing_these(m.step(again, when));
    assert!(third.iter().all(|c| first.contains(c)), "{third:?}");
}
