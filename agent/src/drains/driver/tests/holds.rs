//! Holds, and failures of the parts that the driver uses.

use super::*;

#[tokio::test]
async fn the_drain_continues_after_a_hold_was_dropped() {
    let harness = harness(vec![sample(1)]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    harness
        .until_view(|v| v.active.iter().any(|r| r.holds == 1))
        .await;
    drop(hold);
    harness
        .until_view(|v| v.active.iter().any(|r| r.holds == 0))
        .await;
    harness.close_all();
    harness.event(closes(1)).await;
    let view = harness.until_view(|v| v.finished.len() == 1).await;
    assert_eq!(view.finished[0].reason, Some(ReleaseReason::Drained));
}

#[tokio::test]
async fn a_caller_that_goes_before_it_has_its_hold_is_not_counted() {
    let harness = harness(vec![sample(1)]);
    let _hold = harness.drains.hold(order(pod("a"), policy())).await;
    {
        let gone = harness.drains.hold(order(pod("a"), policy()));
        let mut gone = std::pin::pin!(gone);
        // Requested, answered, and never received.
        let pending = std::future::poll_fn(|cx| Poll::Ready(gone.as_mut().poll(cx).is_pending()));
        assert!(pending.await);
        harness
            .until_view(|v| v.active.iter().any(|r| r.holds == 2))
            .await;
    }
    harness
        .until_view(|v| v.active.iter().any(|r| r.holds == 1))
        .await;
}

#[tokio::test]
async fn manual_release_answers_whether_there_was_a_drain() {
    let harness = harness(vec![sample(1)]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    assert!(harness.drains.release(&PodUid::new("b")).await.is_none());
    assert!(harness.drains.release(&PodUid::new("a")).await.is_some());
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Manual));
    assert!(harness.drains.release(&PodUid::new("a")).await.is_none());
}

#[tokio::test]
async fn shutdown_releases_current_and_later_holds() {
    let harness = harness(vec![sample(1)]);
    let hold = harness.drains.hold(stop("a")).await;
    harness
        .until_view(|v| v.active.iter().any(|r| r.flows_now.is_some()))
        .await;
    harness.drains.shutdown();
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Shutdown));
    assert_eq!(report.cut_total, Some(0), "the next agent holds the stop");
    let later = harness.drains.hold(order(pod("b"), policy())).await;
    assert!(hold.was_taken() && !later.was_taken() && harness.drains.is_stopping());
    assert_eq!(released(&later).await.reason, Some(ReleaseReason::Shutdown));
    assert!(harness.drains.release(&PodUid::new("b")).await.is_none());
}

#[test]
fn the_end_of_the_drivers_runtime_releases_its_holds() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
    };
    let drivers = runtime();
    let (harness, hold) = drivers.block_on(async {
        let harness = harness(vec![sample(1)]);
        let hold = harness.drains.hold(order(pod("a"), policy())).await;
        (harness, hold)
    });
    drop(drivers);
    let report = runtime().block_on(async { released(&hold).await });
    assert_eq!(report.reason, Some(ReleaseReason::Shutdown));
    assert_eq!(report.pod, pod("a").name);
    drop(harness);
}

#[tokio::test]
async fn an_untracked_pod_is_held_for_the_settle_time() {
    let harness = harness(vec![]);
    let scope = Scope::Untracked("a sandboxed runtime".into());
    let hold = harness
        .drains
        .hold(order(pod_in("a", scope), policy()))
        .await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Untracked));
    assert_eq!(report.detail.as_deref(), Some("a sandboxed runtime"));
    assert!(report.held_ms >= 160, "{report:?}");
    assert_eq!(harness.kernel.script().asked, Vec::<&str>::new());
}

#[tokio::test]
async fn panicking_and_failing_dumps_never_release_as_drained() {
    for script in [
        Script {
            panics: true,
            ..Script::default()
        },
        Script {
            fails: true,
            ..Script::default()
        },
    ] {
        let harness = harness_with(FakeKernel(Mutex::new(script)), None);
        let hold = harness.drains.hold(order(pod("a"), policy())).await;
        let report = released(&hold).await;
        assert_eq!(report.reason, Some(ReleaseReason::Untracked));
        assert!(report.detail.is_some());
    }
}

#[tokio::test]
async fn a_dump_that_hangs_does_not_delay_the_deadline() {
    let harness = harness_with(
        FakeKernel(Mutex::new(Script {
            hangs: true,
            ..Script::default()
        })),
        None,
    );
    let grace = Some(Duration::from_millis(450));
    let hold = harness
        .drains
        .hold(HoldOrder {
            grace,
            ..order(pod("a"), policy())
        })
        .await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Deadline));
    assert_eq!(harness.asked("dump"), 1, "one at a time");
}

#[tokio::test]
async fn without_events_drains_are_untracked() {
    let mut harness = harness(vec![]);
    let before = harness.drains.hold(order(pod("a"), policy())).await;
    harness.events = None;
    assert_eq!(
        released(&before).await.reason,
        Some(ReleaseReason::Untracked)
    );
    let after = harness.drains.hold(order(pod("b"), policy())).await;
    assert_eq!(
        released(&after).await.reason,
        Some(ReleaseReason::Untracked)
    );
}

#[tokio::test]
async fn without_events_flows_that_were_seen_hold_until_they_are_gone() {
    let mut harness = harness(vec![sample(1)]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    harness
        .until_view(|v| v.active.iter().any(|r| r.flows_now.is_some()))
        .await;
    harness.events = None;
    // Longer than an untracked pod is held.
    let early = timeout(8 * QUIET, hold.released()).await;
    assert!(early.is_err(), "{early:?}");
    harness.close_all();
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Drained));
}

#[tokio::test]
async fn a_driver_that_has_ended_or_gets_no_events_is_unhealthy() {
    let mut harness = harness(vec![]);
    assert_eq!(harness.drains.health(), Ok(()));
    harness.events = None;
    harness.until_view(|v| v.blind.is_some()).await;
    assert!(
        harness
            .drains
            .health()
            .unwrap_err()
            .contains("events have ended")
    );
    harness.drains.shutdown();
    timeout(Duration::from_secs(5), harness.drains.commands.closed())
        .await
        .expect("in time");
    assert!(
        harness
            .drains
            .health()
            .unwrap_err()
            .contains("the task that owns the drains has ended")
    );
}

#[tokio::test]
async fn finished_drains_are_kept_newest_first_and_bounded() {
    let harness = harness(vec![]);
    let policy = Policy {
        until: Until::Settled,
        quiet: Duration::ZERO,
        ..policy()
    };
    for n in 0..MAX_FINISHED + 3 {
        let hold = harness
            .drains
            .hold(order(pod(&format!("{n}")), policy.clone()))
            .await;
        released(&hold).await;
    }
    let view = harness.until_view(|v| v.active.is_empty()).await;
    assert_eq!(view.finished.len(), MAX_FINISHED);
    assert_eq!(
        view.finished[0].pod.uid,
        PodUid::new(format!("{}", MAX_FINISHED + 2))
    );
}

#[tokio::test]
async fn views_are_numbered_and_published_only_when_something_changes() {
    let harness = harness(vec![sample(1)]);
    let _hold = harness.drains.hold(order(pod("a"), policy())).await;
    let drain = harness
        .until_view(|v| v.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    tokio::time::sleep(VIEW_PACE * 2).await;
    let mut view = harness.drains.view();
    let calm = view.borrow_and_update().version;
    assert!(calm >= drain.version);
    tokio::time::sleep(VIEW_PACE * 2).await;
    assert_eq!(harness.drains.view().borrow().version, calm);
    harness.event(opens(9)).await;
    let next = harness
        .until_view(|v| v.active[0].arrived.unwrap() == 1)
        .await;
    assert_eq!(next.version, calm + 1);
}
