//! Closing idle flows.

use super::*;

fn closing() -> Policy {
    Policy {
        idle_flows: IdleFlows::Close,
        ..Policy::default()
    }
}

#[test]
fn no_idle_flow_is_closed_while_the_pod_may_live_on() {
    let idle = [flow(1, Idle)];
    let mut m = in_drain(closing(), &idle);
    assert_eq!(m.step(Event::MayLiveOn(true), at(3000)), None);
    assert_eq!(m.step(dumped(3000, &idle), at(3001)), None);
    assert_eq!(m.next_wake(), Some(at(8001)), "only the next resync");
    assert_eq!(m.step(Event::Tick, at(8001)), DUMP);
    assert_eq!(m.step(dumped(8001, &idle), at(8002)), None);
    // It is being deleted after all.
    let asked = m.step(Event::MayLiveOn(false), at(9000));
    assert_eq!(asked, DUMP);
    let close = Some(Action::CloseIdle(idle.to_vec()));
    assert_eq!(m.step(dumped(9000, &idle), at(9001)), close);
    assert_eq!(m.step(Event::MayLiveOn(false), at(9002)), None);
}

#[test]
fn idle_flows_are_closed_once_after_settle_and_the_drain_waits_for_their_end() {
    let (busy, idle) = (flow(1, Active), flow(2, Idle));
    let mut m = in_drain(closing(), &[busy.clone(), idle.clone()]);
    let close = Some(Action::CloseIdle(vec![idle.clone()]));
    assert_eq!(
        m.step(dumped(3000, &[busy.clone(), idle.clone()]), at(3001)),
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
    assert_eq!(m.step(Event::Tick, at(8000)), DUMP);
    let both = [flow(1, Idle), idle];
    let close = Some(Action::CloseIdle(vec![flow(1, Idle)]));
    assert_eq!(
        m.step(dumped(8000, &both), at(8001)),
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
fn idle_flows_are_kept_unless_the_policy_says_close() {
    let mut m = in_drain(until(Until::Zero), &[flow(1, Idle)]);
    assert_eq!(m.step(dumped(3000, &[flow(1, Idle)]), at(3001)), None);
}

#[test]
fn an_idle_flow_that_became_active_is_closed_when_it_is_idle_again() {
    let mut m = in_drain(closing(), &[flow(1, Idle)]);
    let close = Some(Action::CloseIdle(vec![flow(1, Idle)]));
    assert_eq!(m.step(dumped(3000, &[flow(1, Idle)]), at(3001)), close);
    assert_eq!(m.step(Event::IdleClosed(vec![]), at(3002)), None);
    let (when, action) = next(&mut m);
    assert_eq!(action, Action::Dump);
    let again = Event::Dumped(Snapshot {
        taken_at: when,
        flows: vec![flow(1, Idle)],
        listens: None,
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
    let mut left: Vec<_> = (0..3 * MAX_PER_ROUND as u64 - 10)
        .map(|n| flow(n, Idle))
        .collect();
    let mut m = in_drain(closing(), &left);
    let mut now = at(3000);
    let mut rounds = vec![];
    while !left.is_empty() {
        let snapshot = Event::Dumped(Snapshot {
            taken_at: now,
            flows: left.clone(),
            listens: None,
        });
        let round = closing_these(m.step(snapshot, now));
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
        // A snapshot that comes early, for another reason, is no reason for another round.
        let early = Event::Dumped(Snapshot {
            taken_at: now + ROUND_INTERVAL / 2,
            flows: left.clone(),
            listens: None,
        });
        if !left.is_empty() {
            assert_eq!(m.step(early, now + ROUND_INTERVAL / 2), None);
            let (when, action) = next(&mut m);
            assert_eq!(action, Action::Dump);
            assert!(when <= now + 2 * ROUND_INTERVAL, "{when:?} after {now:?}");
            now = when;
        }
    }
    let sizes: Vec<_> = rounds.iter().map(|(n, _)| *n).collect();
    assert_eq!(sizes, [MAX_PER_ROUND, MAX_PER_ROUND, MAX_PER_ROUND - 10]);
    for pair in rounds.windows(2) {
        assert!(pair[1].1.since(pair[0].1) >= ROUND_INTERVAL, "{rounds:?}");
    }
}

#[test]
fn idle_flows_that_cannot_be_closed_do_not_delay_the_others() {
    let all: Vec<_> = (0..2 * MAX_PER_ROUND as u64)
        .map(|n| flow(n, Idle))
        .collect();
    let mut m = in_drain(closing(), &all);
    let first = closing_these(m.step(dumped(3000, &all), at(3000)));
    m.step(Event::IdleClosed(vec![]), at(3001));
    assert_eq!(next(&mut m), (at(3000) + ROUND_INTERVAL, Action::Dump));
    let second = closing_these(m.step(dumped(3500, &all), at(3500)));
    assert!(second.iter().all(|c| !first.contains(c)), "{second:?}");
    assert_eq!(second.len(), MAX_PER_ROUND);
    m.step(Event::IdleClosed(second.clone()), at(3501));
    // Then those of the first round once more, but not at that pace.
    let (when, _) = next(&mut m);
    assert!(when > at(3500) + 2 * ROUND_INTERVAL, "{when:?}");
    let again = Event::Dumped(Snapshot {
        taken_at: when,
        flows: all,
        listens: None,
    });
    let third = closing_these(m.step(again, when));
    assert!(third.iter().all(|c| first.contains(c)), "{third:?}");
}

#[test]
fn idle_flows_that_the_pod_dialled_are_not_closed() {
    let policy = Policy {
        outbound: crate::policy::Outbound::Hold,
        idle_flows: crate::policy::IdleFlows::Close,
        ..until(Until::Zero)
    };
    let dialled = Flow {
        direction: Direction::Outbound,
        ..flow(7, Idle)
    };
    let flows = [flow(1, Idle), dialled];
    let mut m = in_drain(policy, &flows);
    let close = Some(Action::CloseIdle(vec![flows[0].clone()]));
    assert_eq!(m.step(dumped(3000, &flows), at(3001)), close);
}
