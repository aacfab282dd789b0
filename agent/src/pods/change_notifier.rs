//! Notifications that the pods of the node have changed, from the API server's watch and from the runtime's events.
//! They do not name the change: each leads to a new list of pods.

use std::{
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};
use tracing::debug;

use super::{
    cri::{Cri, CriError},
    store::Pods,
};

/// How long to gather notifications before one list: the start of a pod sends several events.
const GATHER: Duration = Duration::from_millis(250);

/// The pause after a list that no caller waits for. All notifications during it lead to one list: on a busy node
/// several arrive per second.
const REST: Duration = Duration::from_secs(1);

/// How often to list the pods while a source sends notifications, because one may be lost.
const WITH_SOURCE: Duration = if cfg!(test) {
    Duration::from_secs(2)
} else {
    Duration::from_secs(600)
};

/// How often to list the pods without a source: there is neither an API server nor a runtime with events.
const WITHOUT_SOURCE: Duration = if cfg!(test) {
    Duration::from_millis(300)
} else {
    Duration::from_secs(30)
};

/// The backoff between attempts to subscribe to the runtime's events.
const BACK_OFF: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30);

/// Collects notifications from all sources.
#[derive(Debug, Default)]
pub struct ChangeNotifier {
    notified: Notify,
    sources: AtomicUsize,
    /// How many of the sources are the runtime.
    runtimes: AtomicUsize,
}

/// What sends notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeSource {
    /// The API server: a pod was added, deleted or got another status.
    Api,
    /// The runtime: a sandbox or container was created, started or removed.
    Runtime,
}

/// A source that notifies of every change. Dropping this removes the source.
#[derive(Debug)]
pub struct SourceGuard(Arc<ChangeNotifier>, ChangeSource);

impl ChangeNotifier {
    /// Requests a new list, because the pods may have changed.
    pub fn notify(&self) {
        self.notified.notify_one();
    }

    /// Like [`ChangeNotifier::notify`], for a pod whose status changed. Ignored if the runtime is a source, because
    /// it sends its own events.
    pub fn notify_status(&self) {
        if self.runtimes.load(Ordering::Relaxed) == 0 {
            self.notify();
        }
    }

    /// Adds a source that notifies of every change from now on. Notifies once, because earlier changes were not seen.
    pub fn add_source(self: &Arc<Self>, kind: ChangeSource) -> SourceGuard {
        self.counters(kind).for_each(|n| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        self.notify();
        SourceGuard(Arc::clone(self), kind)
    }

    fn counters(&self, kind: ChangeSource) -> impl Iterator<Item = &AtomicUsize> {
        let runtime = (kind == ChangeSource::Runtime).then_some(&self.runtimes);
        [&self.sources].into_iter().chain(runtime)
    }

    fn has_source(&self) -> bool {
        self.sources.load(Ordering::Relaxed) > 0
    }

    /// Waits until the pods have to be listed again.
    pub(super) async fn changed(&self) {
        let at_the_latest = if self.has_source() {
            WITH_SOURCE
        } else {
            WITHOUT_SOURCE
        };
        tokio::select! {
            () = self.notified.notified() => sleep(GATHER).await,
            () = sleep(at_the_latest) => {}
        }
    }

    /// Calls `list` soon after a notification, then pauses for [`REST`], for ever.
    async fn list_on_change<F: Future<Output = ()>>(&self, list: impl Fn() -> F) {
        loop {
            self.changed().await;
            list().await;
            sleep(REST).await;
        }
    }
}

impl Drop for SourceGuard {
    fn drop(&mut self) {
        self.0.counters(self.1).for_each(|n| {
            n.fetch_sub(1, Ordering::Relaxed);
        });
        // Changes since its last event may be unseen, and it may have been the last source.
        self.0.notify();
    }
}

/// Refreshes the pods after each change, for ever.
pub async fn follow(pods: &Pods, changes: &ChangeNotifier) {
    let list = || async {
        if let Err(e) = pods.refresh().await {
            debug!(error = %e.0, "cannot list the pods after a change");
        }
    };
    changes.list_on_change(list).await;
}

/// Notifies of each event of the runtime. Subscribes again when the stream ends, because the runtime may restart;
/// returns if the runtime has no events.
pub async fn follow_runtime(cri: Cri, changes: Arc<ChangeNotifier>) {
    let mut pause = *BACK_OFF.start();
    loop {
        match cri.events().await {
            Ok(mut events) => {
                let _source = changes.add_source(ChangeSource::Runtime);
                while let Ok(Some(())) = events.message().await {
                    changes.notify();
                    pause = *BACK_OFF.start();
                }
            }
            Err(CriError::Failed { status, .. }) if status.code() == tonic::Code::Unimplemented => {
                debug!("the runtime has no events");
                return;
            }
            Err(e) => debug!(error = %e, "cannot subscribe to the runtime's events"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(*BACK_OFF.end());
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    /// When `changes` led to a list, in milliseconds from the start, within `lasts`.
    async fn lists(changes: &ChangeNotifier, lasts: Duration) -> Vec<u128> {
        let start = tokio::time::Instant::now();
        let times = std::sync::Mutex::default();
        let list = || async {
            let times: &mut Vec<_> = &mut times.lock().unwrap();
            times.push(start.elapsed().as_millis());
        };
        let _ = timeout(lasts, changes.list_on_change(list)).await;
        times.into_inner().unwrap()
    }

    #[tokio::test]
    async fn the_pods_of_a_busy_node_are_listed_soon_and_then_once_per_rest() {
        let changes = Arc::new(ChangeNotifier::default());
        let _source = changes.add_source(ChangeSource::Runtime);
        let notifying = async {
            let start = tokio::time::Instant::now();
            while start.elapsed() < 2 * REST {
                changes.notify();
                sleep(Duration::from_millis(10)).await;
            }
            start.elapsed().as_millis()
        };
        let (times, last_notified) = tokio::join!(lists(&changes, 5 * REST), notifying);
        assert!(times.len() >= 2, "{times:?}");
        assert!(times.windows(2).all(|w| w[1] - w[0] >= 1000), "{times:?}");
        // The last notification led to a list, too.
        assert!(
            times.last().is_some_and(|last| *last + 20 > last_notified),
            "{times:?}"
        );
    }

    #[tokio::test]
    async fn a_timer_makes_up_for_a_lost_notification() {
        let changes = Arc::new(ChangeNotifier::default());
        let _source = changes.add_source(ChangeSource::Api);
        let times = lists(&changes, 3 * WITH_SOURCE).await;
        // One because a source was added, then the timer's.
        assert!((2..=3).contains(&times.len()), "{times:?}");
    }

    #[tokio::test]
    async fn a_status_change_notifies_only_if_the_runtime_is_no_source() {
        let changes = Arc::new(ChangeNotifier::default());
        let _api = changes.add_source(ChangeSource::Api);
        let runtime = changes.add_source(ChangeSource::Runtime);
        let notified = async || timeout(WITH_SOURCE / 2, changes.changed()).await.is_ok();
        assert!(notified().await, "there are sources");
        changes.notify_status();
        assert!(!notified().await, "the runtime would have notified");
        drop(runtime);
        assert!(notified().await, "it is no source any more");
        changes.notify_status();
        assert!(notified().await, "there is no other source");
    }

    #[tokio::test]
    async fn many_notifications_at_once_cost_one_list() {
        let changes = Arc::new(ChangeNotifier::default());
        let _source = changes.add_source(ChangeSource::Api);
        for _ in 0..5 {
            changes.notify();
        }
        changes.changed().await;
        let again = timeout(3 * WITHOUT_SOURCE, changes.changed()).await;
        assert!(again.is_err(), "there is a source, and it did not notify");
        changes.notify();
        changes.changed().await;
    }

    #[tokio::test]
    async fn without_a_source_a_timer_lists_the_pods() {
        let changes = Arc::new(ChangeNotifier::default());
        timeout(10 * WITHOUT_SOURCE, changes.changed())
            .await
            .expect("a list");
        drop(changes.add_source(ChangeSource::Api));
        changes.changed().await;
        timeout(10 * WITHOUT_SOURCE, changes.changed())
            .await
            .expect("a list");
    }
}
