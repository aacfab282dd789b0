//! Audits of pods whose drains are over: one after the other, when no drain needs the kernel more urgently.
//!
//! Nobody waits for them, so they may be left out: an emptied node ends a hundred drains at once.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use crate::{
    drain::{driver::DrainHandle, report::Report},
    ids::PodName,
    kernel::Tracker,
    lock::lock,
    pods::{Scope, service::Pods},
    report::metrics::Metrics,
};

/// How many may wait. The oldest goes first: its pod's namespace is the likeliest to be gone.
const QUEUE: usize = 64;

/// How long an audit waits for the drains to be over. A pod that has been drained is gone soon.
const PATIENCE: Duration = Duration::from_secs(5);

/// A pod to be audited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToAudit {
    pub(crate) pod: PodName,
    pub(crate) scope: Scope,
}

/// What became of an audit that was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was made.
    Done,
    /// Too many waited.
    LeftOut,
    /// The pod's namespace was gone, or the kernel did not answer.
    Failed,
}

impl Outcome {
    pub(crate) const ALL: [Self; 3] = [Self::Done, Self::LeftOut, Self::Failed];

    /// The name, as in metrics.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::LeftOut => "left-out",
            Self::Failed => "failed",
        }
    }
}

/// The audits to come.
#[derive(Debug, Default)]
pub(crate) struct Audits {
    waiting: Mutex<VecDeque<(ToAudit, Instant)>>,
    more: Notify,
    metrics: Arc<Metrics>,
}

impl Audits {
    /// None yet. What becomes of them is counted in `metrics`.
    pub(crate) fn counted_in(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            ..Self::default()
        }
    }

    /// Wants one, unless the same one is wanted already.
    pub(crate) fn want(&self, drained: ToAudit) {
        let mut waiting = lock(&self.waiting);
        if waiting.iter().any(|(other, _)| *other == drained) {
            return;
        }
        if waiting.len() >= QUEUE
            && let Some((left_out, _)) = waiting.pop_front()
        {
            tracing::debug!(pod = %left_out.pod, "no audit after its drain: too many wait");
            self.metrics.audited(Outcome::LeftOut);
        }
        waiting.push_back((drained, Instant::now()));
        self.more.notify_one();
    }

    /// Makes them, for ever: each when `at_rest` comes to its end, or has taken too long.
    pub(crate) async fn make<R, A>(&self, at_rest: impl Fn() -> R, audit: impl Fn(ToAudit) -> A)
    where
        R: Future<Output = ()>,
        A: Future<Output = Outcome>,
    {
        loop {
            let next = lock(&self.waiting).pop_front();
            let Some((drained, since)) = next else {
                self.more.notified().await;
                continue;
            };
            let _ = timeout_at(since + PATIENCE, at_rest()).await;
            let outcome = audit(drained).await;
            self.metrics.audited(outcome);
        }
    }
}

/// Has the counters of a pod audited when its drain is over.
pub(crate) fn after(audits: Arc<Audits>, pods: &Pods) -> impl Fn(&Report) + Send + use<> {
    let latest = pods.subscribe();
    move |report| {
        let pod = latest.borrow().by_uid(&report.pod.uid).cloned();
        let Some(pod) = pod.filter(|pod| !matches!(pod.scope, Scope::Untracked(_))) else {
            return;
        };
        audits.want(ToAudit {
            pod: pod.name.clone(),
            scope: pod.scope.clone(),
        });
    }
}

/// Makes these audits while no drain is under way.
pub(crate) async fn make(audits: Arc<Audits>, tracker: Tracker, drains: DrainHandle) {
    let at_rest = || async {
        let mut view = drains.view();
        let _ = view.wait_for(|view| view.active.is_empty()).await;
    };
    let audit = |drained: ToAudit| {
        let tracker = tracker.clone();
        async move {
            // It is ending: its namespace may be gone by now, with all its flows.
            match tracker.audit(Some(&drained.scope)).await {
                Ok(found) if found.unseen == 0 => Outcome::Done,
                Ok(_) => Outcome::Failed,
                Err(e) => {
                    tracing::debug!(pod = %drained.pod, "no audit after its drain: {e}");
                    Outcome::Failed
                }
            }
        }
    };
    audits.make(at_rest, audit).await;
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::timeout;

    use super::*;
    use crate::ids::{NetnsInode, PodUid};

    fn drained(n: usize) -> ToAudit {
        ToAudit {
            pod: PodName {
                uid: PodUid::new(format!("u{n}")),
                namespace: "shop".into(),
                name: format!("web-{n}"),
            },
            scope: Scope::Netns {
                inode: NetnsInode(u32::try_from(n).unwrap()),
                pid: 1,
            },
        }
    }

    /// Whose audits are made within `limit`.
    async fn made<R: Future<Output = ()>>(
        audits: &Audits,
        at_rest: impl Fn() -> R,
        limit: Duration,
    ) -> Vec<ToAudit> {
        let made = Mutex::new(Vec::new());
        let audit = |drained| {
            made.lock().unwrap().push(drained);
            std::future::ready(Outcome::Done)
        };
        let _ = timeout(limit, audits.make(at_rest, audit)).await;
        made.into_inner().unwrap()
    }

    #[tokio::test]
    async fn of_too_many_the_newest_are_made_in_their_order_each_once() {
        let audits = Audits::default();
        for n in 0..110 {
            audits.want(drained(n));
            audits.want(drained(n));
        }
        let made = made(&audits, || async {}, Duration::from_millis(200)).await;
        let newest: Vec<_> = (110 - QUEUE..110).map(drained).collect();
        assert_eq!(made, newest);
    }

    #[tokio::test]
    async fn one_waits_for_the_drains_but_not_for_ever() {
        let audits = Audits::default();
        audits.want(drained(1));
        let soon = made(&audits, pending, PATIENCE / 10).await;
        assert!(soon.is_empty(), "{soon:?}");
        audits.want(drained(2));
        let late = made(&audits, pending, PATIENCE * 2).await;
        assert_eq!(late, [drained(2)]);
    }

    #[tokio::test]
    async fn one_that_comes_later_is_made_too() {
        let audits = Audits::default();
        let later = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            audits.want(drained(1));
        };
        let (made, ()) = tokio::join!(made(&audits, || async {}, Duration::from_secs(1)), later);
        assert_eq!(made, [drained(1)]);
    }
}
