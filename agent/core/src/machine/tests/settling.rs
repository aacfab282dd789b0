//! The settle phase.

use super::*;

#[test]
fn a_pod_without_flows_is_released_after_quiet() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(m.step(dumped(3000, &[]), at(3002)), DRAINED);
    let report = m.report(at(9000));
    assert_eq!(
        (report.held_ms, report.reason),
        (3002, Some(ReleaseReason::Drained))
    );
    assert_eq!(report.flows_at_start, Some(FlowCounts::default()));
    assert_eq!(report.release_lag_us, None, "no close ended it");
    assert_eq!(
        (
            m.next_wake(),
            m.step(Event::Release(ReleaseReason::Manual), at(9000))
        ),
        (None, None)
    );
}

#[test]
fn settle_lasts_for_quiet_after_each_new_flow() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(dumped(0, &[]), START);
    m.step(opened(1, 2000), at(2000));
    m.step(closed(1, 2100), at(2100));
    assert_eq!(m.next_wake(), Some(at(5000)));
    m.step(opened(2, 4000), at(4000));
    assert_eq!(m.next_wake(), Some(at(7000)));
}

#[test]
fn a_repeated_open_event_does_not_prolong_settle() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(opened(1, 1000), at(1000));
    m.step(opened(1, 1000), at(2500));
    assert_eq!(m.next_wake(), Some(at(4000)));
    assert_eq!(m.report(at(2500)).arrived.unwrap(), 1);
}

#[test]
fn settle_ends_after_settle_max_although_flows_arrive() {
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
        "what events announced is still open"
    );
}

#[test]
fn flows_that_arrive_after_settle_set_still_arriving() {
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

    // One that came before settle was over, and whose event is late, does not count.
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(opened(2, 2999), at(3010));
    assert!(!m.still_arriving());
}

#[test]
fn a_client_that_has_stopped_connecting_is_not_listed_as_still_connecting() {
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
fn without_arrivals_still_arriving_is_not_set() {
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
    m.step(dumped(0, &[flow(1, Active)]), at(1));
    assert_eq!(
        next(&mut m),
        (at(3000), Action::Release(ReleaseReason::Drained))
    );
    assert_eq!(m.report(at(3000)).cut_total.unwrap(), 1);
}

#[test]
fn a_settle_phase_with_very_many_connections_dumps_in_between_to_forget_closed_ones() {
    let mut m = machine(Policy {
        settle_max: Duration::from_secs(30),
        quiet: Duration::from_secs(30),
        ..until(Until::Zero)
    });
    m.step(Event::Tick, START);
    m.step(dumped(0, &[]), at(1));
    let asked = (0..20_000).find(|n| {
        m.step(opened(*n, 2000), at(2000));
        m.step(closed(*n, 2000), at(2000)) == DUMP
    });
    assert_eq!(asked, Some(16_384));
}

#[test]
fn a_pod_in_which_nothing_listens_and_no_flow_holds_is_released_at_the_first_dump() {
    let outbound = Flow {
        direction: Direction::Outbound,
        exempt: Some(Exempt::Outbound),
        ..flow(1, Active)
    };
    for until in [Until::Zero, Until::Idle, Until::Settled] {
        let mut m = machine(self::until(until));
        assert_eq!(m.step(Event::Tick, START), DUMP);
        let dump = without_listener(0, std::slice::from_ref(&outbound));
        assert_eq!(m.step(dump, at(2)), DRAINED);
        let report = m.report(at(9000));
        assert_eq!(report.held_ms, 2);
        let settle = report.settle.unwrap();
        assert_eq!((settle.rule, settle.quiet_ms), (SettleRule::NoListener, 0));
    }
}

#[test]
fn idle_dialled_connections_and_lost_ones_do_not_make_a_pod_settle_in_which_nothing_listens() {
    let dialled = |state| Flow {
        direction: Direction::Outbound,
        ..flow(1, state)
    };
    for (flow, action) in [
        (dialled(Idle), DRAINED),
        (flow(1, FlowState::Lost), DRAINED),
        (dialled(Awaiting), None),
    ] {
        let mut m = machine(Policy {
            outbound: crate::policy::Outbound::Hold,
            ..until(Until::Zero)
        });
        assert_eq!(m.step(Event::Tick, START), DUMP);
        let dump = without_listener(0, std::slice::from_ref(&flow));
        assert_eq!(m.step(dump, at(2)), action, "{flow:?}");
    }
}

#[test]
fn a_pod_settles_if_something_listens_or_a_flow_holds_or_settle_min_is_set() {
    // It is not known whether anything listens.
    in_drain(until(Until::Zero), &[]);
    let listening = Event::Dumped(Snapshot {
        taken_at: START,
        flows: vec![],
        listens: Some(true),
    });
    let idle = without_listener(0, &[flow(1, Idle)]);
    for (until, dump) in [(Until::Zero, listening), (Until::Idle, idle)] {
        let mut m = machine(self::until(until));
        m.step(Event::Tick, START);
        assert_eq!(m.step(dump, at(1)), None);
        assert_eq!(m.next_wake(), Some(at(3000)));
    }
    // A flow has opened since that dump.
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(opened(1, 1), at(1));
    m.step(closed(1, 2), at(2));
    assert_eq!(m.step(without_listener(0, &[]), at(3)), None);
    assert!(m.next_wake() > Some(at(2999)));

    let mut m = machine(Policy {
        settle_min: Duration::from_secs(5),
        ..until(Until::Zero)
    });
    m.step(Event::Tick, START);
    assert_eq!(m.step(without_listener(0, &[]), at(1)), None);
    assert_eq!(m.next_wake(), Some(at(5000)));
}

#[test]
fn the_rate_of_new_connections_decides_how_long_the_pod_settles() {
    let arrivals = |gap: Option<u64>| {
        Event::Arrivals(Arrivals {
            observed: Duration::from_secs(3600),
            gap: gap.map(Duration::from_millis),
        })
    };
    for (gap, wake) in [(Some(10), 500), (Some(1000), 5000), (None, 500)] {
        let mut m = machine(until(Until::Zero));
        m.step(Event::Tick, START);
        m.step(dumped(0, &[]), at(1));
        assert_eq!(m.step(arrivals(gap), at(2)), None);
        assert_eq!(m.next_wake(), Some(at(wake)));
        let settle = m.report(at(2)).settle.unwrap();
        assert_eq!((settle.quiet_ms, settle.gap_ms), (wake, gap));
    }
    // Too late to matter.
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(arrivals(None), at(3001));
    assert_eq!(m.report(at(3001)).settle.unwrap().quiet_ms, 3000);
}

#[test]
fn settle_min_and_settle_max_end_at_the_deadline() {
    let policy = Policy {
        settle_min: Duration::from_secs(120),
        settle_max: Duration::from_secs(180),
        ..until(Until::Zero)
    };
    let mut m = machine(policy);
    m.step(Event::Tick, START);
    m.step(dumped(0, &[]), at(1));
    let (when, action) = next(&mut m);
    assert_eq!((when, action), (at(59_800), Action::Dump));
    m.step(dumped(59_800, &[]), at(59_801));
    let deadline = Action::Release(ReleaseReason::Deadline);
    assert_eq!(next(&mut m), (at(60_000), deadline));
}
