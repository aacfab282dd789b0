//! What the journal and the history of an earlier agent change.

use super::*;

#[tokio::test]
async fn a_hold_repeated_after_a_restart_keeps_its_first_deadline() {
    let dir = tempfile::tempdir().expect("a directory");
    let open = || Some(Journal::open(dir.path()).expect("a journal"));
    let before = harness_with(
        FakeKernel(Mutex::new(Script {
            samples: vec![sample(1)],
            ..Script::default()
        })),
        open(),
    );
    let first = before.drains.hold(order(pod("a"), policy())).await;
    let deadline = first.deadline();
    let written = dir.path().join("a.json");
    timeout(Duration::from_secs(5), async {
        while !written.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("journalled in time");
    before.drains.shutdown();
    released(&first).await;

    let harness = harness_with(FakeKernel::default(), open());
    let again = harness.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(again.deadline(), deadline);
    assert_eq!(released(&again).await.reason, Some(ReleaseReason::Drained));
}

#[tokio::test]
async fn a_journal_that_fails_ends_no_hold() {
    let dir = tempfile::tempdir().expect("a directory");
    let journal = Journal::open(dir.path()).expect("a journal");
    dir.close().expect("removed");
    let harness = harness_with(FakeKernel::default(), Some(journal));
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Drained));
}

#[tokio::test]
async fn reports_of_an_earlier_agent_are_listed_until_their_drain_is_resumed() {
    use ebb_core::drain_report::testing::report;
    let harness = harness(vec![sample(1)]);
    let earlier = |uid: &str, reason| {
        let mut r = report(Some(reason));
        r.pod.uid = PodUid::new(uid);
        Arc::new(r)
    };
    harness.drains.restore(vec![
        earlier("a", ReleaseReason::Shutdown),
        earlier("b", ReleaseReason::Deadline),
    ]);
    let listed = |view: &DrainsView| {
        let finished = view.finished.iter();
        finished.map(|r| r.pod.uid.to_string()).collect::<Vec<_>>()
    };
    let both = harness.until_view(|v| v.finished.len() == 2).await;
    assert_eq!(listed(&both), ["a", "b"]);
    // They answer no hold: the reports of this agent do.
    let hold = harness.drains.hold(stop("b")).await;
    let released = timeout(Duration::from_millis(50), hold.released()).await;
    assert!(released.is_err(), "{released:?}");
    // The drain of "a" goes on, so its first part is no report of its own.
    let _hold = harness.drains.hold(stop("a")).await;
    let one = harness.until_view(|v| v.finished.len() == 1).await;
    assert_eq!(listed(&one), ["b"]);
}
