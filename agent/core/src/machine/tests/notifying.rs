//! Signals and requests to the application.

use super::*;
use crate::notification::{Notification, NotificationOutcome, Notified, RequestReport};

fn with_signal_and_request(until: Until) -> Policy {
    Policy {
        until,
        stop_signals: "SIGQUIT".parse().unwrap(),
        ..Policy::default()
    }
}

fn is_signal(action: &Action) -> bool {
    matches!(action, Action::Notify(Notification::Signal(..)))
}

/// Steps until the machine sends a notification, and answers its dumps with these flows.
fn until_notified(m: &mut Machine, flows: &[Flow]) -> (u64, Notification) {
    for _ in 0..100 {
        let (now, action) = next(m);
        let ms = now.since(START).as_millis() as u64;
        match action {
            Action::Dump => drop(m.step(dumped(ms, flows), now)),
            Action::Notify(notification) => return (ms, notification),
            other => panic!("{other:?}"),
        }
    }
    panic!("the application is not told: {m:?}");
}

#[test]
fn the_stop_signal_is_sent_once_after_settle_and_the_drain_continues() {
    let flows = [flow(1, Active)];
    let mut m = machine(with_signal_and_request(Until::Zero));
    m.step(Event::Stopping(true), START);
    assert_eq!(m.step(dumped(0, &flows), at(1)), None);
    let (ms, notification) = until_notified(&mut m, &flows);
    assert_eq!(m.report(at(ms)).phase, Phase::Drain);
    assert!(matches!(notification, Notification::Signal(..)));
    let sent = NotificationOutcome::Signaled(vec![]);
    m.step(Event::Notified(sent), at(ms + 5));
    m.step(dumped(ms + 6, &flows), at(ms + 6));
    // Neither a repeated hold nor the passing of time sends it again.
    for event in [Event::Stopping(false), Event::Stopping(true), Event::Tick] {
        let action = m.step(event, at(ms + 7));
        assert!(action.as_ref().is_none_or(|a| !is_signal(a)), "{action:?}");
    }
    let closed = m.step(closed(1, ms + 8), at(ms + 8));
    let mut due = closed.map(|action| (at(ms + 8), action));
    for _ in 0..10 {
        let (now, action) = due.take().unwrap_or_else(|| next(&mut m));
        let ms = now.since(START).as_millis() as u64;
        let answer = match action {
            Action::Dump => dumped(ms, &[]),
            Action::LookUp(_) => found(ms, &[]),
            Action::Release(reason) => return assert_eq!(reason, ReleaseReason::Drained),
            other => panic!("{other:?}"),
        };
        due = m.step(answer, now).map(|action| (now, action));
    }
    panic!("not released: {m:?}");
}

#[test]
fn nothing_is_sent_unless_the_pod_is_known_to_end() {
    let mut m = in_drain(with_signal_and_request(Until::Zero), &[flow(1, Active)]);
    m.step(dumped(3000, &[flow(1, Active)]), at(3001));
    let action = m.step(Event::Tick, at(8100));
    assert_eq!(action, DUMP, "a dump to see what is open, and no signal");
    // The stop comes late: the signal is sent at once.
    let action = m.step(Event::Stopping(true), at(8200)).unwrap();
    assert!(is_signal(&action), "{action:?}");
}

#[test]
fn a_drain_is_not_released_as_drained_during_a_notification() {
    let mut m = machine(with_signal_and_request(Until::Zero));
    m.step(Event::Stopping(true), START);
    m.step(dumped(0, &[]), at(1));
    let (ms, _) = until_notified(&mut m, &[]);
    // No dump until then, and the deadline still counts.
    assert_eq!(m.next_wake(), Some(at(60_000)));
    assert_eq!(m.step(Event::Tick, at(ms + 100)), None);
    m.step(
        Event::Notified(NotificationOutcome::Signaled(vec![])),
        at(ms + 200),
    );
    let mut now = ms + 200;
    for _ in 0..10 {
        now += 1;
        if m.step(dumped(now, &[]), at(now)) == DRAINED {
            return;
        }
        m.step(Event::Tick, at(now));
    }
    panic!("not released: {m:?}");
}

#[test]
fn the_deadline_does_not_wait_for_a_notification() {
    let mut m = machine(with_signal_and_request(Until::Zero));
    m.step(Event::Stopping(true), START);
    m.step(dumped(0, &[]), at(1));
    until_notified(&mut m, &[]);
    assert_eq!(
        m.step(Event::Tick, at(60_000)),
        Some(Action::Release(ReleaseReason::Deadline))
    );
}

#[test]
fn the_request_is_made_at_the_start_or_after_settle_and_before_the_signal() {
    for (text, is_settled) in [("GET :80/x", false), ("after-settle GET :80/x", true)] {
        let mut m = machine(Policy {
            on_drain: Some(text.parse().unwrap()),
            ..with_signal_and_request(Until::Zero)
        });
        let first = m.step(Event::Stopping(true), START);
        let ms = match first {
            Some(Action::Notify(Notification::Request(_))) => 0,
            Some(Action::Dump) => {
                m.step(dumped(0, &[]), at(1));
                until_notified(&mut m, &[]).0
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(m.report(at(ms)).phase == Phase::Drain, is_settled);
        let unanswered = m.report(at(ms)).notified.request.unwrap();
        assert_eq!(unanswered.to_string(), "GET :80/x sent");
        m.step(
            Event::Notified(NotificationOutcome::Requested(Ok(204))),
            at(ms + 1),
        );
        let answered = m.report(at(ms + 1)).notified.request.unwrap();
        assert_eq!(answered.status, Some(204));
        if !is_settled {
            let (_, notification) = until_notified(&mut m, &[]);
            assert!(matches!(notification, Notification::Signal(..)));
        }
        assert!(m.report(at(9000)).notified.signals.is_some());
    }
}

#[test]
fn what_an_earlier_drain_of_the_same_end_has_sent_is_not_sent_again() {
    let mut m = machine(Policy {
        on_drain: Some("GET :80/x".parse().unwrap()),
        ..with_signal_and_request(Until::Zero)
    });
    let sent = Notified {
        signals: Some(vec![]),
        request: Some(RequestReport {
            request: "GET :80/x".into(),
            status: Some(200),
            error: None,
        }),
    };
    m.set_notified(sent.clone());
    assert_eq!(m.step(Event::Stopping(true), START), DUMP);
    m.step(dumped(0, &[]), at(1));
    let (now, action) = next(&mut m);
    assert_eq!(action, Action::Dump);
    let ms = now.since(START).as_millis() as u64;
    assert_eq!(m.step(dumped(ms, &[]), now), DRAINED);
    assert_eq!(m.report(now).notified, sent);
}
