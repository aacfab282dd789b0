//! Deadlines and the report.

use super::*;

#[test]
fn a_dump_shortly_before_the_deadline_shows_what_is_cut() {
    let mut m = in_drain(until(Until::Zero), &[]);
    let mut now = at(3000);
    let (early, late) = ([flow(1, Active)], [flow(1, Awaiting), flow(2, Active)]);
    while now < at(59_800) {
        m.step(
            Event::Dumped(Snapshot {
                taken_at: now,
                flows: early.to_vec(),
                listens: None,
            }),
            now,
        );
        (now, _) = next(&mut m);
    }
    assert_eq!(now, at(59_800));
    m.step(dumped(59_800, &late), at(59_801));
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
fn the_deadline_does_not_wait_for_a_late_dump() {
    let mut m = in_drain(until(Until::Zero), &[]);
    assert_eq!(
        m.step(dumped(3000, &[]), at(60_000)),
        Some(Action::Release(ReleaseReason::Deadline))
    );
}

#[test]
fn a_joining_hold_may_move_the_deadline_earlier_and_never_later() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(Event::Limit(by(90_000)), at(1));
    assert_eq!(m.deadline(), by(60_000));
    m.step(Event::Limit(by(2000)), at(2));
    assert_eq!(m.deadline(), by(2000));
    assert_eq!(
        m.step(Event::Limit(by(5)), at(10)),
        Some(Action::Release(ReleaseReason::Deadline))
    );
}

#[test]
fn a_resumed_drain_keeps_its_start_and_settles_again() {
    let mut m = Machine::new(subject(), until(Until::Zero), START, by(60_000), at(14_000));
    assert_eq!(m.step(Event::Tick, at(14_000)), DUMP);
    assert_eq!(
        m.next_wake(),
        Some(at(15_000)),
        "settle_max counts from the first beginning"
    );
    assert_eq!(m.report(at(14_000)).held_ms, 14_000);
}

#[test]
fn manual_and_shutdown_release_in_any_phase() {
    // After a shutdown the next agent continues the drain.
    for (reason, cut) in [(ReleaseReason::Manual, 1), (ReleaseReason::Shutdown, 0)] {
        let event = Event::Release(reason);
        let mut m = machine(until(Until::Zero));
        assert_eq!(m.step(event.clone(), at(1)), Some(Action::Release(reason)));
        let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
        assert_eq!(m.step(event, at(3001)), Some(Action::Release(reason)));
        assert_eq!(m.report(at(3001)).cut_total.unwrap(), cut);
    }
}

#[test]
fn the_report_has_the_phases_and_what_held_in_each() {
    let flows = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
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
