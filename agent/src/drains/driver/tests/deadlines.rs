//! Which deadline a hold has.

use super::*;

#[tokio::test]
async fn holds_of_one_pod_join_one_drain_and_a_late_one_gets_the_same_report() {
    let harness = harness(vec![sample(1)]);
    let one = harness.drains.hold(order(pod("a"), policy())).await;
    let two = harness.drains.hold(order(pod("a"), policy())).await;
    harness
        .until_view(|v| v.active.len() == 1 && v.active[0].holds == 2)
        .await;
    harness.close_all();
    harness.event(closes(1)).await;
    let report = released(&one).await;
    assert!(Arc::ptr_eq(&report, &released(&two).await));
    let late = harness.drains.hold(order(pod("a"), policy())).await;
    assert!(Arc::ptr_eq(&report, &released(&late).await));
    assert_eq!(harness.asked("watch"), 1);
    assert_eq!(harness.drains.view().borrow().finished.len(), 1);
}

#[tokio::test]
async fn a_hold_long_after_a_drain_starts_a_new_drain() {
    let harness = harness(vec![]);
    let first = harness.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(released(&first).await.reason, Some(ReleaseReason::Drained));
    tokio::time::sleep(SAME_ANSWER + QUIET).await;

    let again = harness.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(again.deadline(), first.deadline(), "the same termination");
    assert_eq!(released(&again).await.reason, Some(ReleaseReason::Drained));
    tokio::time::sleep(SAME_ANSWER + QUIET).await;

    harness.kernel.script().samples = vec![sample(1)];
    let held = harness.drains.hold(order(pod("a"), policy())).await;
    let early = timeout(5 * QUIET, held.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn repeated_holds_do_not_keep_the_first_deadline_for_ever() {
    let harness = harness(vec![]);
    let first = harness.drains.hold(order(pod("a"), policy())).await;
    released(&first).await;
    let begun = BootTime::now();
    // More often than the history drops it.
    let fresh = loop {
        tokio::time::sleep(SAME_ANSWER + QUIET).await;
        let again = harness.drains.hold(order(pod("a"), policy())).await;
        released(&again).await;
        if again.deadline() != first.deadline() {
            break again.deadline();
        }
        let asked_for = BootTime::now().since(begun);
        assert!(asked_for < 3 * journal::KEEP, "never a new one");
    };
    assert!(BootTime::now().since(begun) > journal::KEEP);
    assert!(fresh > first.deadline());
}

#[tokio::test]
async fn a_deletion_after_the_drain_of_a_restart_has_a_deadline_of_its_own() {
    let harness = harness(vec![]);
    let restart = HoldOrder {
        is_not_deleted: true,
        ..order(pod("a"), policy())
    };
    let restart = harness.drains.hold(restart).await;
    released(&restart).await;
    harness.kernel.script().samples = vec![sample(1)];
    let now = BootTime::now();
    let deleted = |seen| HoldOrder {
        deletion: Some(deletion(seen, Duration::from_secs(60))),
        ..order(pod("a"), policy())
    };
    // It was reported somewhat late: the first hold was for this deletion.
    let same = harness
        .drains
        .hold(deleted(now + Duration::from_millis(500)))
        .await;
    assert_eq!(same.deadline(), restart.deadline());
    let later = harness
        .drains
        .hold(deleted(now + Duration::from_secs(2)))
        .await;
    assert!(later.deadline() > restart.deadline());
    let early = timeout(5 * QUIET, later.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn a_deletion_during_the_drain_of_a_restart_ends_it_and_has_a_deadline_of_its_own() {
    let harness = harness(vec![sample(1)]);
    let restart = HoldOrder {
        grace: Some(Duration::from_secs(6)),
        is_not_deleted: true,
        ..order(pod("a"), policy())
    };
    let restart = harness.drains.hold(restart).await;
    let seen = BootTime::now() + Duration::from_secs(2);
    let deleted = HoldOrder {
        deletion: Some(deletion(seen, Duration::from_secs(60))),
        ..order(pod("a"), policy())
    };
    let later = harness.drains.hold(deleted).await;
    let report = released(&restart).await;
    assert_eq!(report.reason, Some(ReleaseReason::NotTerminating));
    assert_eq!(report.cut_total, Some(0), "the pod lives on: {report:?}");
    assert!(later.deadline() > restart.deadline() + Duration::from_secs(30));
    let early = timeout(5 * QUIET, later.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn a_wait_without_an_answer_of_the_api_server_belongs_to_the_deletion_that_is_reported_later()
{
    let harness = harness(vec![sample(1)]);
    let first = harness.drains.hold(order(pod("a"), policy())).await;
    let deadline = first.deadline();
    let reported = deletion(
        BootTime::now() + Duration::from_secs(2),
        Duration::from_secs(12),
    );
    harness.drains.deletion(&PodUid::new("a"), reported);
    // The hook of another container, and then the stop.
    for is_stop in [false, true] {
        let later = HoldOrder {
            deletion: Some(reported),
            is_stop,
            ..order(pod("a"), policy())
        };
        let later = harness.drains.hold(later).await;
        assert_eq!(later.deadline(), first.deadline());
    }
    assert!(first.deadline() + Duration::from_secs(30) < deadline);
    let view = harness.until_view(|v| v.active[0].holds == 1).await;
    assert_eq!(view.active[0].deadline_cause, DeadlineCause::ShorterGrace);
    assert!(view.finished.is_empty(), "{view:?}");
}

#[tokio::test]
async fn idle_flows_are_not_closed_before_the_api_server_has_answered_that_the_pod_ends() {
    let idle = Sample {
        since_sent: Duration::from_secs(60),
        since_received: Duration::from_secs(61),
        since_ack: Duration::from_secs(60),
        ..sample(1)
    };
    for (is_unanswered, is_not_deleted) in [(false, false), (true, false), (false, true)] {
        let harness = harness(vec![idle.clone()]);
        let closing = Policy {
            idle_flows: IdleFlows::Close,
            ..policy()
        };
        let wait = HoldOrder {
            is_unanswered,
            is_not_deleted,
            ..order(pod("a"), closing)
        };
        let _hold = harness.drains.hold(wait).await;
        let closes = async |within| {
            let asked = async {
                while harness.asked("close") == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(within, asked).await.is_ok()
        };
        let may_live_on = is_unanswered || is_not_deleted;
        let within = if may_live_on {
            20 * QUIET
        } else {
            Duration::from_secs(5)
        };
        assert_eq!(closes(within).await, !may_live_on);
        if is_unanswered {
            let reported = deletion(BootTime::now(), Duration::from_secs(60));
            harness.drains.deletion(&PodUid::new("a"), reported);
            assert!(closes(Duration::from_secs(5)).await);
        }
    }
}

#[tokio::test]
async fn once_the_api_server_has_denied_a_deletion_a_later_one_has_a_deadline_of_its_own() {
    let harness = harness(vec![sample(1)]);
    let wait = harness.drains.hold(order(pod("a"), policy())).await;
    harness.drains.not_terminating(&PodUid::new("a"));
    released(&wait).await;
    let deleted = HoldOrder {
        deletion: Some(deletion(
            BootTime::now() + Duration::from_secs(2),
            Duration::from_secs(60),
        )),
        ..order(pod("a"), policy())
    };
    let later = harness.drains.hold(deleted).await;
    assert!(later.deadline() > wait.deadline());
}

#[tokio::test]
async fn a_stop_that_is_repeated_much_later_has_its_first_deadline() {
    let harness = harness(vec![]);
    let first = harness.drains.hold(stop("a")).await;
    released(&first).await;
    tokio::time::sleep(journal::KEEP + SAME_ANSWER).await;
    harness.kernel.script().samples = vec![sample(1)];
    let again = harness.drains.hold(stop("a")).await;
    assert_eq!(again.deadline(), first.deadline());
    // Until the runtime lists the pod no more.
    harness
        .drains
        .pods_listed([PodUid::new("a")].into(), PeerNames::new());
    let again = harness.drains.hold(stop("a")).await;
    assert_eq!(again.deadline(), first.deadline());
    assert!(harness.drains.release(&PodUid::new("a")).await.is_some());
    harness.drains.pods_listed([].into(), PeerNames::new());
    tokio::time::sleep(SAME_ANSWER).await;
    let another = harness.drains.hold(stop("a")).await;
    assert!(another.deadline() > first.deadline());
}

#[tokio::test]
async fn a_second_delete_with_a_shorter_grace_moves_the_deadline_once() {
    let harness = harness(vec![sample(1)]);
    let began = BootTime::now();
    let first = deletion(began, Duration::from_secs(60));
    let hold = HoldOrder {
        deletion: Some(first),
        ..stop("a")
    };
    let hold = harness.drains.hold(hold).await;
    let deadline = hold.deadline();
    let uid = PodUid::new("a");
    harness.drains.deletion(&uid, first);
    let second = deletion(BootTime::now(), Duration::from_secs(3));
    harness.drains.deletion(&uid, second);
    // The same report, later: nothing moves.
    tokio::time::sleep(QUIET).await;
    harness.drains.deletion(&uid, second);
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Deadline));
    assert_eq!(report.deadline_cause, DeadlineCause::ShorterGrace);
    // A third of three seconds is the reserve.
    let moved = second.seen + Duration::from_secs(2);
    assert!(hold.deadline() < deadline);
    let error = hold
        .deadline()
        .since(moved)
        .max(moved.since(hold.deadline()));
    assert!(
        error < QUIET,
        "{error:?} from two seconds after the second delete"
    );
}

#[tokio::test]
async fn waits_for_a_pod_that_is_not_deleted_end_and_cut_nothing() {
    let harness = harness(vec![sample(1)]);
    let wait = || HoldOrder {
        is_not_deleted: true,
        ..order(pod("a"), policy())
    };
    let hold = harness.drains.hold(wait()).await;
    drop(hold);
    let view = harness.until_view(|v| v.finished.len() == 1).await;
    let report = &view.finished[0];
    assert_eq!(report.reason, Some(ReleaseReason::NotTerminating));
    assert_eq!(report.cut_total, Some(0));
    // While one waits, the agent has the deadline.
    let hold = harness.drains.hold(wait()).await;
    harness.drains.not_terminating(&PodUid::new("a"));
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::NotTerminating));
    // But not once the pod is being stopped.
    let hold = harness.drains.hold(stop("b")).await;
    harness.drains.not_terminating(&PodUid::new("b"));
    assert!(timeout(5 * QUIET, hold.released()).await.is_err());
}

#[tokio::test]
async fn after_the_restart_of_a_container_a_stop_has_a_deadline_of_its_own() {
    let harness = harness(vec![]);
    let with = |ids: &[(&str, bool)]| {
        let containers = ids.iter().map(|(id, running)| Container {
            id: ContainerId::new(*id),
            name: "app".into(),
            running: *running,
            grace: None,
            wait_port: Ok(None),
            pre_stop_sleep: Duration::ZERO,
        });
        let pod = Pod {
            containers: containers.collect(),
            ..(*pod("a")).clone()
        };
        order(Arc::new(pod), policy())
    };
    let restart = harness.drains.hold(with(&[("c1", true)])).await;
    released(&restart).await;
    let same = harness.drains.hold(with(&[("c1", false)])).await;
    assert_eq!(same.deadline(), restart.deadline());
    harness.kernel.script().samples = vec![sample(1)];
    let later = harness
        .drains
        .hold(with(&[("c1", false), ("c2", true)]))
        .await;
    assert!(later.deadline() > restart.deadline());
    let early = timeout(5 * QUIET, later.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn in_a_new_sandbox_a_pod_has_a_deadline_of_its_own_also_before_its_containers_run() {
    let harness = harness(vec![]);
    let before = harness.drains.hold(order(pod("a"), policy())).await;
    released(&before).await;
    harness.kernel.script().samples = vec![sample(1)];
    let again = Pod {
        sandbox: SandboxId::new("another"),
        ..(*pod("a")).clone()
    };
    let later = harness.drains.hold(order(Arc::new(again), policy())).await;
    assert!(later.deadline() > before.deadline());
    let early = timeout(5 * QUIET, later.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn a_shorter_grace_moves_the_deadline_earlier_and_a_longer_one_does_not_move_it() {
    let harness = harness(vec![sample(1)]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    let (a, deadline) = (PodUid::new("a"), hold.deadline());
    harness.drains.limit(&a, by(deadline + QUIET));
    harness.drains.limit(&PodUid::new("b"), by(BootTime::now()));
    harness.drains.limit(&a, by(BootTime::now() + 4 * QUIET));
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Deadline));
    assert!(hold.deadline() < deadline);
}

#[tokio::test]
async fn a_second_hold_shortens_the_deadline_for_all_unless_its_grace_is_unknown() {
    let harness = harness(vec![sample(1)]);
    let first = harness.drains.hold(order(pod("a"), policy())).await;
    let deadline = first.deadline();
    let unknown = HoldOrder {
        grace: None,
        ..order(pod("a"), policy())
    };
    assert_eq!(harness.drains.hold(unknown).await.deadline(), deadline);
    let shorter = HoldOrder {
        grace: Some(Duration::from_millis(300)),
        ..order(pod("a"), policy())
    };
    let second = harness.drains.hold(shorter).await;
    assert!(second.deadline() < deadline);
    assert_eq!(second.deadline(), first.deadline());
    assert_eq!(second.reserve(), Duration::from_millis(100));
    let report = released(&first).await;
    assert_eq!(
        (report.reason, report.cut_total.unwrap()),
        (Some(ReleaseReason::Deadline), 1)
    );
}

#[tokio::test]
async fn a_limit_moves_the_deadline_of_its_own_pod_earlier_and_never_later() {
    let harness = harness(vec![sample(1)]);
    let first = harness.drains.hold(order(pod("a"), policy())).await;
    let other = harness.drains.hold(order(pod("b"), policy())).await;
    let (deadline, others) = (first.deadline(), other.deadline());
    let uid = PodUid::new("a");
    harness
        .drains
        .limit(&uid, by(deadline + Duration::from_secs(60)));
    harness.drains.limit(&PodUid::new("c"), by(BootTime::now()));
    harness
        .drains
        .limit(&uid, by(BootTime::now() + Duration::from_millis(300)));
    let report = released(&first).await;
    assert_eq!(
        (report.reason, report.cut_total),
        (Some(ReleaseReason::Deadline), Some(1))
    );
    assert!(first.deadline() < deadline);
    assert_eq!(other.deadline(), others);
}

#[tokio::test]
async fn a_stop_that_is_repeated_after_its_deadline_gets_the_same_report() {
    let harness = harness(vec![sample(1)]);
    let short = || HoldOrder {
        grace: Some(Duration::from_millis(450)),
        ..stop("a")
    };
    let first = harness.drains.hold(short()).await;
    let report = released(&first).await;
    assert_eq!(report.reason, Some(ReleaseReason::Deadline));
    tokio::time::sleep(SAME_ANSWER * 2).await;
    let again = harness.drains.hold(short()).await;
    assert!(Arc::ptr_eq(&released(&again).await, &report));
    let view = harness.until_view(|v| v.active.is_empty()).await;
    assert_eq!(view.finished.len(), 1, "no drain began: {view:?}");
}

#[tokio::test]
async fn a_release_by_hand_is_for_all_repetitions_of_the_stop() {
    let harness = harness(vec![sample(1)]);
    let first = harness.drains.hold(stop("a")).await;
    harness.drains.release(&PodUid::new("a")).await;
    assert_eq!(released(&first).await.reason, Some(ReleaseReason::Manual));
    tokio::time::sleep(journal::KEEP + SAME_ANSWER).await;
    let again = harness.drains.hold(stop("a")).await;
    assert_eq!(released(&again).await.reason, Some(ReleaseReason::Manual));
}

#[tokio::test]
async fn a_deletion_that_is_reported_late_is_not_a_shorter_one() {
    let harness = harness(vec![sample(1)]);
    let uid = PodUid::new("a");
    let hold = harness.drains.hold(stop("a")).await;
    let deadline = hold.deadline();
    // As an agent learns it that has just started, by a clock that is ten seconds ahead.
    let ago = BootTime::now().before(Duration::from_secs(10));
    harness
        .drains
        .deletion(&uid, deletion(ago, Duration::from_secs(60)));
    harness.drains.release(&PodUid::new("b")).await;
    assert_eq!(hold.deadline(), deadline);
    harness
        .drains
        .deletion(&uid, deletion(BootTime::now(), Duration::from_secs(3)));
    let report = released(&hold).await;
    assert_eq!(report.deadline_cause, DeadlineCause::ShorterGrace);
}

#[tokio::test]
async fn a_second_delete_that_a_list_shows_after_a_resumed_stop_counts_from_then() {
    // In a list, it counts from the first delete, and would be over.
    let ago = BootTime::now().before(Duration::from_secs(30));
    let second = deletion(ago, Duration::from_secs(12));
    // The list comes after the stop, before it, or with another stop.
    for (first, other) in [(None, None), (Some(second), None), (None, Some(second))] {
        let harness = harness(vec![sample(1)]);
        let resumed = |deletion| HoldOrder {
            deletion,
            ..stop("a")
        };
        let hold = harness.drains.hold(resumed(first)).await;
        let _other = match (first, other) {
            (None, None) => {
                harness.drains.deletion(&PodUid::new("a"), second);
                None
            }
            (_, None) => None,
            (_, Some(_)) => Some(harness.drains.hold(resumed(other)).await),
        };
        let view = harness
            .until_view(|v| {
                let mut active = v.active.iter();
                active.any(|r| r.deadline_cause == DeadlineCause::ShorterGrace)
            })
            .await;
        assert!(view.finished.is_empty(), "{view:?}");
        let left = hold.deadline().since(BootTime::now());
        // 12 s less the reserve of 3 s.
        assert!((7..=9).contains(&left.as_secs()), "{left:?}");
    }
}

#[tokio::test]
async fn a_drain_whose_waits_have_left_cuts_nothing_at_its_deadline() {
    let harness = harness(vec![sample(1)]);
    let wait = HoldOrder {
        grace: Some(Duration::from_millis(450)),
        ..order(pod("a"), policy())
    };
    drop(harness.drains.hold(wait).await);
    let view = harness.until_view(|v| v.finished.len() == 1).await;
    let report = &view.finished[0];
    assert_eq!(report.reason, Some(ReleaseReason::NotTerminating));
    assert_eq!(report.cut_total, Some(0), "no stop follows: {report:?}");
}
