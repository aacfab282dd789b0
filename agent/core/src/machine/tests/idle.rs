//! Drains until idle, and the lookups of a few flows.

use super::*;

#[test]
fn until_idle_releases_with_idle_flows_and_reports_them_as_cut() {
    let mut m = in_drain(until(Until::Idle), &[]);
    assert_eq!(m.step(dumped(3000, &[flow(1, Idle)]), at(3001)), DRAINED);
    let report = m.report(at(3001));
    assert_eq!((report.cut_total.unwrap(), report.cut[0].state), (1, Idle));
    assert_eq!(report.cut[0].age_ms, Some(600_001));
}

#[test]
fn until_idle_looks_flows_up_when_the_last_one_may_have_become_idle() {
    let quiet_for = |ms| Flow {
        quiet_for: Duration::from_millis(ms),
        ..flow(ms, Active)
    };
    let flows = [quiet_for(4500), quiet_for(2000)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(dumped(3000, &flows), at(3001));
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
fn until_idle_never_looks_flows_up_more_often_than_the_floor() {
    let almost = [Flow {
        quiet_for: Duration::from_millis(4999),
        ..flow(1, Active)
    }];
    let mut m = in_drain(until(Until::Idle), &almost);
    m.step(dumped(3000, &almost), at(3001));
    assert_eq!(m.next_wake(), Some(at(3101)));
}

#[test]
fn an_unanswered_request_becomes_idle_only_idle_after_its_answer() {
    let policy = Policy {
        idle_after: Duration::from_secs(2),
        ..until(Until::Idle)
    };
    let waiting = [Flow {
        quiet_for: Duration::from_secs(500),
        ..flow(1, Awaiting)
    }];
    let mut m = in_drain(policy, &waiting);
    m.step(dumped(3000, &waiting), at(3001));
    assert_eq!(m.next_wake(), Some(at(5000)));
}

#[test]
fn until_idle_looks_flows_up_at_once_when_the_last_live_one_closes() {
    let flows = [flow(1, Idle), flow(2, Active)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(m.step(closed(2, 3300), at(3300)), look_up(&[1, 2]));
    assert_eq!(m.step(found(3300, &flows[..1]), at(3301)), DRAINED);
    assert_eq!(m.report(at(3301)).release_lag_us, Some(1000));
}

#[test]
fn until_idle_lookups_find_a_flow_that_is_active_again() {
    let flows = [flow(1, Idle), flow(2, Active)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(m.step(closed(2, 3300), at(3300)), look_up(&[1, 2]));
    assert_eq!(m.step(found(3300, &[flow(1, Awaiting)]), at(3301)), None);
    assert_eq!(m.report(at(3301)).flows_now.unwrap().awaiting, 1);
}

#[test]
fn lookups_that_miss_an_open_flow_cause_a_dump() {
    let flows = [flow(1, Idle), flow(2, Active)];
    let mut m = in_drain(until(Until::Idle), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(m.step(closed(2, 3300), at(3300)), look_up(&[1, 2]));
    assert_eq!(m.step(found(3300, &[]), at(3301)), DUMP);
}

#[test]
fn lookups_that_show_a_flow_long_after_its_close_cause_a_dump() {
    let flows = [flow(1, Active), flow(2, Active)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    m.step(closed(1, 3100), at(3100));
    assert_eq!(m.step(closed(2, 4200), at(4200)), look_up(&[1, 2]));
    assert_eq!(m.step(found(4200, &flows), at(4201)), DUMP);
    assert_eq!(m.step(dumped(4201, &flows[..1]), at(4202)), None);
    assert_eq!(m.next_wake(), Some(at(9202)), "it holds again");
}

#[test]
fn lookups_that_began_before_a_new_flow_release_nothing() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(dumped(3000, &[flow(1, Active)]), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), look_up(&[1]));
    m.step(opened(2, 4000), at(4001));
    assert_eq!(m.step(found(4000, &[]), at(4001)), None);
}

#[test]
fn outdated_lookups_are_repeated_at_once_a_few_times() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Active)]);
    m.step(dumped(3000, &[flow(1, Active)]), at(3001));
    assert_eq!(m.step(closed(1, 4000), at(4000)), look_up(&[1]));
    for _ in 0..3 {
        assert_eq!(m.step(Event::Outdated, at(4000)), look_up(&[1]));
    }
    assert_eq!(m.step(Event::Outdated, at(4000)), DUMP);
}

#[test]
fn after_lost_events_or_a_failed_dump_a_dump_comes_before_lookups() {
    let one = [flow(1, Active)];
    let mut m = in_drain(until(Until::Zero), &one);
    // The dump that is under way was begun before.
    m.step(Event::Lost, at(3001));
    m.step(dumped(3000, &one), at(3002));
    assert_eq!(next(&mut m).1, Action::Dump);
    m.step(failed(), at(3010));
    m.step(closed(1, 3020), at(3020));
    assert_eq!(next(&mut m).1, Action::Dump);
}

#[test]
fn more_than_a_few_flows_are_not_looked_up_one_by_one() {
    let flows: Vec<_> = (1..=MAX_LOOKUPS as u64 + 1)
        .map(|n| flow(n, Active))
        .collect();
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    let mut last = None;
    for n in 1..=flows.len() as u64 {
        last = m.step(closed(n, 4000), at(4000));
    }
    assert_eq!(last, DUMP);
}

#[test]
fn until_zero_waits_for_idle_flows() {
    let flows = [flow(1, Idle)];
    let mut m = in_drain(until(Until::Zero), &flows);
    assert_eq!(m.step(dumped(3000, &flows), at(3001)), None);
}
