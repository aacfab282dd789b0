//! Events that contradict dumps or lookups: which of them counts, and when a dump is repeated.

use super::*;

#[test]
fn lost_events_count_as_an_arrival_and_cause_a_dump() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(dumped(0, &[]), START);
    assert_eq!(m.step(Event::Lost, at(2000)), DUMP);
    m.step(dumped(2000, &[]), at(2001));
    assert_eq!(m.next_wake(), Some(at(5000)));
}

#[test]
fn a_dump_that_began_before_events_were_lost_releases_nothing() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(m.step(Event::Lost, at(3001)), None);
    assert_eq!(m.step(dumped(3000, &[]), at(3002)), None);
    assert_eq!(next(&mut m), (at(3003), Action::Dump));
    assert_eq!(m.step(dumped(3003, &[]), at(3004)), DRAINED);
}

#[test]
fn a_dump_that_began_before_a_new_flow_releases_nothing() {
    let mut m = in_drain(until(Until::Zero), &[]);
    m.step(opened(7, 3000), at(3001));
    assert_eq!(m.step(dumped(3000, &[]), at(3002)), None);
    assert_eq!(
        m.step(closed(7, 3500), at(3500)),
        look_up(&[7]),
        "the close of the last is confirmed at once"
    );
    assert_eq!(m.step(found(3500, &[]), at(3501)), DRAINED);
    let report = m.report(at(3501));
    assert_eq!((report.arrived.unwrap(), report.ended.unwrap()), (1, 1));
    assert_eq!(
        report.late_peers,
        [LatePeer {
            address: remote(7).ip(),
            peer: None,
            flows: 1
        }]
    );
}

#[test]
fn lookups_confirm_the_last_close_and_the_report_has_its_lag() {
    let flows = [flow(1, Active), flow(2, Idle)];
    let mut m = in_drain(until(Until::Zero), &flows);
    assert_eq!(m.step(dumped(3000, &flows), at(3001)), None);
    assert_eq!(m.step(closed(1, 4000), at(4001)), None);
    assert_eq!(m.step(closed(2, 5000), at(5001)), look_up(&[1, 2]));
    assert_eq!(m.step(found(5001, &[flow(2, Flushing)]), at(5004)), DRAINED);
    let report = m.report(at(9000));
    assert_eq!(report.released_by, Some(ReleasedBy::Lookup));
    assert_eq!((report.dumps_ended, report.lookups), (2, 1));
    assert_eq!(report.flows_now, Some(FlowCounts::default()));
    assert_eq!(report.release_lag_us, Some(4000));
    assert_eq!((report.ended.unwrap(), report.cut_total.unwrap()), (2, 0));
}

#[test]
fn two_close_events_end_one_flow() {
    let flows = [flow(1, Active), flow(2, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), None);
    assert_eq!(
        m.step(closed(1, 4000), at(4001)),
        None,
        "flow 2 still holds"
    );
    assert_eq!(m.report(at(4001)).ended.unwrap(), 1);
}

#[test]
fn a_dump_that_contradicts_events_is_repeated_with_growing_pauses() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    let mut now = at(4000);
    assert_eq!(m.step(closed(1, 4000), now), look_up(&[1]));
    assert_eq!(m.step(Event::Unclear(DumpReason::LookupFailed), now), DUMP);
    let mut pauses = vec![];
    while now < at(4990) {
        // The kernel has not stored the new state yet.
        assert_eq!(
            m.step(
                Event::Dumped(Snapshot {
                    taken_at: now,
                    flows: flows.to_vec(),
                    listens: None,
                }),
                now
            ),
            look_up(&[1])
        );
        assert_eq!(m.step(Event::Unclear(DumpReason::LookupFailed), now), None);
        let (due, action) = next(&mut m);
        assert_eq!(action, Action::Dump);
        pauses.push(due.since(now).as_millis());
        now = due;
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 250, 250, 250]);
    assert_eq!(m.report(now).ended.unwrap(), 1);
}

#[test]
fn a_flow_that_repeated_dumps_show_is_open_although_a_close_event_came() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), look_up(&[1]));
    assert_eq!(
        m.step(Event::Unclear(DumpReason::LookupFailed), at(4000)),
        DUMP
    );
    m.step(dumped(5000, &flows), at(5000));
    assert_eq!(
        m.next_wake(),
        Some(at(10_000)),
        "it holds again, and nothing is urgent"
    );
}

#[test]
fn a_later_dump_replaces_a_close_event_that_never_came() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(next(&mut m), (at(8001), Action::Dump));
    assert_eq!(
        m.step(dumped(8001, &[]), at(8002)),
        None,
        "a dump can pass over a flow"
    );
    assert_eq!(m.report(at(8002)).ended.unwrap(), 0);
    assert_eq!(next(&mut m), (at(8003), Action::Dump));
    assert_eq!(m.step(dumped(8003, &[]), at(8004)), DRAINED);
    assert_eq!(m.report(at(8004)).ended.unwrap(), 1);
}

#[test]
fn a_dump_that_misses_a_live_flow_releases_nothing() {
    let flows = [flow(1, Active), flow(2, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(next(&mut m), (at(8001), Action::Dump));
    // It misses one, and the other closes.
    assert_eq!(m.step(dumped(8001, &flows[..1]), at(8002)), None);
    m.step(closed(1, 8002), at(8002));
    assert_eq!(next(&mut m), (at(8003), Action::Dump));
    assert_eq!(m.step(dumped(8003, &flows[1..]), at(8004)), None);
    let report = m.report(at(8004));
    assert_eq!((report.ended, report.cut_total), (Some(1), Some(0)));
    assert_eq!(m.step(closed(2, 9000), at(9000)), look_up(&[2]));
    assert_eq!(m.step(found(9000, &[]), at(9001)), DRAINED);
}

#[test]
fn a_missed_flow_whose_close_event_comes_just_afterwards_is_looked_up() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(dumped(3000, &[flow(1, Active)]), at(3001));
    assert_eq!(next(&mut m), (at(8001), Action::Dump));
    assert_eq!(m.step(dumped(8001, &[]), at(8002)), None);
    assert_eq!(m.step(closed(1, 8001), at(8002)), look_up(&[1]));
    assert_eq!(m.step(found(8002, &[]), at(8003)), DRAINED);
}

#[test]
fn a_new_flow_of_unknown_age_is_one_arrival() {
    let lost = |cookie, state| Flow {
        age: Age::AtLeast(Duration::ZERO),
        ..flow(cookie, state)
    };
    let mut m = in_drain(until(Until::Idle), &[lost(1, Active)]);
    let both = [lost(1, Active), lost(2, Active)];
    assert_eq!(m.step(dumped(3000, &both), at(3001)), None);
    let report = m.report(at(3001));
    assert_eq!(report.arrived, Some(1), "the other one may be old");
    assert_eq!(report.late_peers.len(), 1);
    let (when, _) = next(&mut m);
    let idle = Event::Dumped(Snapshot {
        taken_at: when,
        flows: vec![lost(1, Idle), lost(2, Idle)],
        listens: None,
    });
    assert_eq!(m.step(idle, when), DRAINED, "it has arrived only once");
}

#[test]
fn exempt_flows_hold_nothing() {
    let exempt = Flow {
        exempt: Some(Exempt::Outbound),
        ..flow(1, Active)
    };
    let mut m = in_drain(until(Until::Zero), std::slice::from_ref(&exempt));
    assert_eq!(m.step(dumped(3000, &[exempt]), at(3001)), DRAINED);
    assert_eq!(
        m.report(at(3001)).flows_at_start,
        Some(FlowCounts::default())
    );
}

#[test]
fn a_dump_finds_an_arrival_whose_event_was_lost_and_counts_it_once() {
    let mut m = in_drain(until(Until::Zero), &[]);
    let late = Flow {
        age: Age::Known(Duration::from_millis(500)),
        ..flow(4, Active)
    };
    m.step(dumped(3000, &[late]), at(3001));
    m.step(opened(4, 2500), at(3002));
    let report = m.report(at(3002));
    assert_eq!((report.arrived.unwrap(), report.late_peers.len()), (1, 1));
}

#[test]
fn a_flow_that_closes_during_the_first_dump_has_ended() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(closed(1, 1), at(1));
    m.step(dumped(0, &[flow(1, Active)]), at(2));
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
fn one_failed_dump_is_repeated() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(m.step(failed(), at(3001)), None);
    assert_eq!(next(&mut m), (at(3051), Action::Dump));
    assert_eq!(m.step(dumped(3051, &[]), at(3052)), DRAINED);
}

#[test]
fn a_pod_that_cannot_be_dumped_is_held_for_the_settle_time_and_untracked() {
    let mut m = machine(until(Until::Zero));
    let (mut now, mut snapshots) = (START, 0);
    m.step(Event::Tick, START);
    let end = loop {
        snapshots += 1;
        m.step(failed(), now);
        match next(&mut m) {
            (at, Action::Dump) => now = at,
            end => break end,
        }
    };
    assert_eq!(end, (at(15_000), Action::Release(ReleaseReason::Untracked)));
    assert_eq!(snapshots, MAX_FAILED_DUMPS);
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
fn failed_dumps_do_not_end_a_drain_in_which_flows_were_seen() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(dumped(3000, &[flow(1, Active)]), at(3001));
    let (mut now, mut dumps) = (3001, 0);
    while now < 59_000 {
        let (moment, action) = next(&mut m);
        now = moment.since(START).as_millis() as u64;
        assert_eq!(action, Action::Dump, "at {now} ms");
        m.step(failed(), moment);
        dumps += 1;
    }
    assert!((10..40).contains(&dumps), "{dumps} dumps");
    assert_eq!(m.report(at(now)).detail, None);
    // A later dump works.
    m.step(closed(1, now), at(now));
    let (moment, action) = next(&mut m);
    assert_eq!(action, Action::Dump);
    let ms = moment.since(START).as_millis() as u64;
    assert_eq!(m.step(dumped(ms, &[]), at(ms + 1)), DRAINED);
}

#[test]
fn a_pod_untracked_from_the_beginning_is_never_dumped() {
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
    let mut m = Machine::new(subject(), until(Until::Zero), START, by(4000), START);
    m.step(Event::Untracked("a sandboxed runtime".into()), START);
    assert_eq!(
        next(&mut m),
        (at(4000), Action::Release(ReleaseReason::Deadline))
    );
}
