//! Signals and requests to the application.

use super::*;

/// Reports each notification as sent.
#[derive(Default)]
struct FakeNotifier(Mutex<Vec<Notification>>);

impl FakeNotifier {
    fn told(&self) -> Vec<Notification> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Notifier for FakeNotifier {
    fn notify(&self, _: Arc<Pod>, notification: Notification) -> NotificationFuture {
        let outcome = match &notification {
            Notification::Signal(..) => NotificationOutcome::Signaled(vec![SignalReport {
                container: "app".into(),
                signal: StopSignal::Quit,
                pid: Some(7),
                outcome: SignalOutcome::Sent,
                detail: None,
            }]),
            Notification::Request(_) => NotificationOutcome::Requested(Ok(204)),
        };
        self.0
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push(notification);
        Box::pin(std::future::ready(outcome))
    }
}

/// A driver that sends notifications, and those that it has sent.
fn with_notifier(samples: Vec<Sample>, journal: Option<Journal>) -> (Harness, Arc<FakeNotifier>) {
    let kernel = Arc::new(FakeKernel(Mutex::new(Script {
        samples,
        ..Script::default()
    })));
    let notifier = Arc::new(FakeNotifier::default());
    let (events_in, events) = mpsc::channel(64);
    let (notices_in, notices) = mpsc::unbounded_channel();
    let drains = Drains::spawn_with(
        kernel.clone(),
        events,
        journal,
        notices_in,
        Some(notifier.clone()),
    );
    let harness = Harness {
        kernel,
        events: Some(events_in),
        notices,
        drains,
    };
    (harness, notifier)
}

fn with_signal_and_request(order: HoldOrder) -> HoldOrder {
    let policy = Policy {
        stop_signals: "SIGQUIT".parse().expect("a signal"),
        on_drain: Some("GET :8080/drain".parse().expect("a request")),
        ..order.policy
    };
    HoldOrder { policy, ..order }
}

/// Waits until the application of the one drain under way has got its signal.
async fn signaled(harness: &Harness) {
    let view = harness.until_view(|view| {
        let notified = view.active.first().map(|r| &r.notified);
        notified.is_some_and(|n| n.signals.as_ref().is_some_and(|s| !s.is_empty()))
    });
    view.await;
}

#[tokio::test]
async fn an_application_is_notified_once_although_its_stop_is_repeated() {
    let dir = tempfile::tempdir().expect("a directory");
    let journal = || Some(Journal::open(dir.path()).expect("a journal"));
    let (harness, notifier) = with_notifier(vec![sample(1)], journal());
    let first = harness
        .drains
        .hold(with_signal_and_request(stop("a")))
        .await;
    signaled(&harness).await;
    let second = harness
        .drains
        .hold(with_signal_and_request(stop("a")))
        .await;
    drop(first);
    let third = harness
        .drains
        .hold(with_signal_and_request(stop("a")))
        .await;
    drop(second);
    tokio::time::sleep(2 * QUIET).await;
    let told = notifier.told();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(matches!(told[0], Notification::Request(_)), "{told:?}");
    assert!(matches!(told[1], Notification::Signal(..)), "{told:?}");

    // The next agent continues the drain, and knows which notifications were sent.
    let entry = dir.path().join("a.json");
    let written = async {
        while !std::fs::read_to_string(&entry).is_ok_and(|text| text.contains("SIGQUIT")) {
            tokio::time::sleep(QUIET).await;
        }
    };
    timeout(Duration::from_secs(5), written)
        .await
        .expect("it is in the journal");
    harness.drains.shutdown();
    released(&third).await;
    let (harness, notifier) = with_notifier(vec![], journal());
    let again = harness
        .drains
        .hold(with_signal_and_request(stop("a")))
        .await;
    let report = released(&again).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert_eq!(
        report.notified.phrases(),
        ["GET :8080/drain answered 204", "SIGQUIT to app (process 7)"]
    );
    assert!(notifier.told().is_empty(), "{:?}", notifier.told());
}

#[tokio::test]
async fn an_application_is_notified_only_if_its_pod_is_known_to_end_and_is_held() {
    // A wait, which may be for the restart of a container.
    let (harness, notifier) = with_notifier(vec![sample(1)], None);
    let wait = with_signal_and_request(order(pod("a"), policy()));
    let _wait = harness.drains.hold(wait).await;
    harness
        .until_view(|view| view.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    tokio::time::sleep(2 * QUIET).await;
    assert!(notifier.told().is_empty(), "{:?}", notifier.told());
    // The API server reports the deletion.
    let deleted = deletion(BootTime::now(), Duration::from_secs(60));
    harness.drains.deletion(&PodUid::new("a"), deleted);
    signaled(&harness).await;
    assert_eq!(notifier.told().len(), 2);

    // The only hold was given up before settle was over.
    let (harness, notifier) = with_notifier(vec![sample(1)], None);
    let mut short = with_signal_and_request(stop("b"));
    short.policy.on_drain = None;
    drop(harness.drains.hold(short.clone()).await);
    harness
        .until_view(|view| view.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    tokio::time::sleep(2 * QUIET).await;
    assert!(notifier.told().is_empty(), "{:?}", notifier.told());
    // It is repeated.
    let _again = harness.drains.hold(short).await;
    signaled(&harness).await;
}

#[tokio::test]
async fn a_pod_without_the_annotations_is_not_notified() {
    let (harness, notifier) = with_notifier(vec![], None);
    let hold = harness.drains.hold(stop("a")).await;
    let report = released(&hold).await;
    assert!(report.notified.is_nothing(), "{report:?}");
    assert!(notifier.told().is_empty());
}

#[tokio::test]
async fn a_notification_that_fails_is_reported_and_ends_no_hold() {
    // This driver has no way to reach applications.
    let harness = harness(vec![]);
    let hold = harness
        .drains
        .hold(with_signal_and_request(stop("a")))
        .await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    let phrases = report.notified.phrases();
    assert_eq!(phrases.len(), 2, "{phrases:?}");
    assert!(
        phrases[0].starts_with("GET :8080/drain failed: this agent"),
        "{phrases:?}"
    );
    assert!(
        phrases[1].starts_with("SIGQUIT to app not sent: this agent"),
        "{phrases:?}"
    );
}
