//! Word that the pods of the node have changed, from whoever hears of it first: the API server's watch and
//! the runtime's own events. What has changed, a look tells.

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
    service::Pods,
};

/// A pod's start makes a handful of events: they are waited for, and cost one look.
const GATHER: Duration = Duration::from_millis(250);

/// How long to let the runtime rest after a look that nobody waits for. What is told meanwhile costs one look
/// in all: on a node where pods come and go all the time there is word several times a second.
const REST: Duration = Duration::from_secs(1);

/// How often to look where there is somebody who tells: a word may be lost.
const TOLD: Duration = if cfg!(test) {
    Duration::from_secs(2)
} else {
    Duration::from_secs(600)
};

/// How often to look where nobody tells: neither an API server nor a runtime with events.
const UNTOLD: Duration = if cfg!(test) {
    Duration::from_millis(300)
} else {
    Duration::from_secs(30)
};

/// How long to wait before asking a runtime for its events again.
const BACK_OFF: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30);

/// Word that the pods have changed.
#[derive(Debug, Default)]
pub struct Changes {
    told: Notify,
    sources: AtomicUsize,
    /// Those of them that are the runtime itself.
    runtimes: AtomicUsize,
}

/// Who tells of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Teller {
    /// The API server: which pods the node is to have, and that something about their status is new.
    Api,
    /// The runtime: what it does.
    Runtime,
}

/// Somebody who tells of every change, as long as this lives.
#[derive(Debug)]
pub struct Source(Arc<Changes>, Teller);

impl Changes {
    /// The pods may have changed.
    pub fn tell(&self) {
        self.told.notify_one();
    }

    /// Something about a pod's status is new, so the runtime may have done something. It says so itself, if it
    /// tells.
    pub fn hint(&self) {
        if self.runtimes.load(Ordering::Relaxed) == 0 {
            self.tell();
        }
    }

    /// From now on there is somebody who tells of every change. What happened before is looked up.
    pub fn source(self: &Arc<Self>, teller: Teller) -> Source {
        self.of(teller).for_each(|n| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        self.tell();
        Source(Arc::clone(self), teller)
    }

    fn of(&self, teller: Teller) -> impl Iterator<Item = &AtomicUsize> {
        let runtime = (teller == Teller::Runtime).then_some(&self.runtimes);
        [&self.sources].into_iter().chain(runtime)
    }

    fn has_source(&self) -> bool {
        self.sources.load(Ordering::Relaxed) > 0
    }

    /// Waits until there is reason to look.
    pub(super) async fn heard(&self) {
        let unasked = if self.has_source() { TOLD } else { UNTOLD };
        tokio::select! {
            () = self.told.notified() => sleep(GATHER).await,
            () = sleep(unasked) => {}
        }
    }

    /// Looks whenever there is reason to, for ever: soon after the first word, and then with a rest in between.
    async fn each<F: Future<Output = ()>>(&self, look: impl Fn() -> F) {
        loop {
            self.heard().await;
            look().await;
            sleep(REST).await;
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.0.of(self.1).for_each(|n| {
            n.fetch_sub(1, Ordering::Relaxed);
        });
        // What it does not tell any more is looked up, and from then on there may be nobody who tells.
        self.0.tell();
    }
}

/// Has the pods looked at whenever there is changes, for ever.
pub async fn follow(pods: &Pods, changes: &Changes) {
    let look = || async {
        if let Err(e) = pods.refresh().await {
            debug!(error = %e.0, "cannot look at the pods that have changed");
        }
    };
    changes.each(look).await;
}

/// Tells of the runtime's events for as long as it has any: it may be restarted.
pub async fn of_runtime(cri: Cri, changes: Arc<Changes>) {
    let mut pause = *BACK_OFF.start();
    loop {
        match cri.events().await {
            Ok(mut events) => {
                let _source = changes.source(Teller::Runtime);
                while let Ok(Some(())) = events.message().await {
                    changes.tell();
                    pause = *BACK_OFF.start();
                }
            }
            Err(CriError::Failed { status, .. }) if status.code() == tonic::Code::Unimplemented => {
                debug!("the runtime has no events");
                return;
            }
            Err(e) => debug!(error = %e, "cannot listen to the runtime's events"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(*BACK_OFF.end());
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    /// When looks were made, in milliseconds from the start, within `lasts`.
    async fn looks(changes: &Changes, lasts: Duration) -> Vec<u128> {
        let start = tokio::time::Instant::now();
        let made = std::sync::Mutex::default();
        let look = || async {
            let made: &mut Vec<_> = &mut made.lock().unwrap();
            made.push(start.elapsed().as_millis());
        };
        let _ = timeout(lasts, changes.each(look)).await;
        made.into_inner().unwrap()
    }

    #[tokio::test]
    async fn a_node_that_churns_has_a_look_soon_and_then_one_a_rest() {
        let changes = Arc::new(Changes::default());
        let _source = changes.source(Teller::Runtime);
        let churning = async {
            let start = tokio::time::Instant::now();
            while start.elapsed() < 2 * REST {
                changes.tell();
                sleep(Duration::from_millis(10)).await;
            }
            start.elapsed().as_millis()
        };
        let (made, told_last) = tokio::join!(looks(&changes, 5 * REST), churning);
        assert!(made.len() >= 2, "{made:?}");
        assert!(made.windows(2).all(|w| w[1] - w[0] >= 1000), "{made:?}");
        // What was told last is looked at too.
        assert!(
            made.last().is_some_and(|last| *last + 20 > told_last),
            "{made:?}"
        );
    }

    #[tokio::test]
    async fn a_word_that_was_lost_is_made_good_after_a_while() {
        let changes = Arc::new(Changes::default());
        let _source = changes.source(Teller::Api);
        let made = looks(&changes, 3 * TOLD).await;
        // The source's own, and then unasked ones.
        assert!((2..=3).contains(&made.len()), "{made:?}");
    }

    #[tokio::test]
    async fn a_status_counts_only_where_the_runtime_does_not_tell() {
        let changes = Arc::new(Changes::default());
        let _api = changes.source(Teller::Api);
        let runtime = changes.source(Teller::Runtime);
        let told = async || timeout(TOLD / 2, changes.heard()).await.is_ok();
        assert!(told().await, "there are sources");
        changes.hint();
        assert!(!told().await, "the runtime would have told");
        drop(runtime);
        assert!(told().await, "it does not tell any more");
        changes.hint();
        assert!(told().await, "nobody else tells of it");
    }

    #[tokio::test]
    async fn many_words_at_once_are_one_reason_to_look() {
        let changes = Arc::new(Changes::default());
        let _source = changes.source(Teller::Api);
        for _ in 0..5 {
            changes.tell();
        }
        changes.heard().await;
        let again = timeout(3 * UNTOLD, changes.heard()).await;
        assert!(again.is_err(), "somebody tells, and nothing was told");
        changes.tell();
        changes.heard().await;
    }

    #[tokio::test]
    async fn where_nobody_tells_there_is_a_look_now_and_then() {
        let changes = Arc::new(Changes::default());
        timeout(10 * UNTOLD, changes.heard()).await.expect("a look");
        drop(changes.source(Teller::Api));
        changes.heard().await;
        timeout(10 * UNTOLD, changes.heard()).await.expect("a look");
    }
}
