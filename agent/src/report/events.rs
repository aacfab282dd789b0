//! Kubernetes Events on the pods that they are about.
//!
//! Events are a courtesy: one that can't be written soon is dropped and counted, and nothing waits for it. The
//! cluster is spared: what is the same as a few minutes ago raises the count of the Event that is there
//! ([`Recorders`]), and a node and each of its pods write no more than their [`Budgets`].

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{metrics::Metrics, news::News, text::shortened};
use crate::ids::PodUid;

/// The name under which ebb reports.
const CONTROLLER: &str = "ebb.dev/agent";

/// What may wait for an API server that is slow.
const QUEUE: usize = 256;

/// For how long the same news are one Event (`CACHE_TTL` in kube-rs, and client-go's `finishTime`).
const SAME_FOR: Duration = Duration::from_secs(6 * 60);

/// How long one Event may take.
const WRITE_WITHIN: Duration = Duration::from_secs(5);

/// The longest note that the API takes (`NoteLengthLimit`, pkg/apis/core/validation/events.go).
const LONGEST_NOTE: usize = 1024;

/// Why an Event was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Too many waited for the API server.
    Queue,
    /// The pod or the node had written too many already.
    Budget,
    /// The API server did not take it, or not in time.
    Failed,
}

impl Dropped {
    /// Its name among the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Budget => "budget",
            Self::Failed => "failed",
        }
    }
}

/// Where news go to become Events.
#[derive(Clone)]
pub struct Events(Option<(mpsc::Sender<Order>, Arc<Metrics>)>);

enum Order {
    Write(Box<News>),
    /// To be answered when all that was ordered before is written or dropped.
    Tell(oneshot::Sender<()>),
}

impl Events {
    /// There is no API server: nobody is told.
    pub const fn off() -> Self {
        Self(None)
    }

    /// Writes Events in the name of the agent on `node`. The task ends when the last [`Events`] is dropped.
    /// What is dropped is counted in `metrics`.
    pub fn start(client: Client, node: &str, metrics: Arc<Metrics>) -> Self {
        let (sender, orders) = mpsc::channel(QUEUE);
        let recorders = Recorders {
            client,
            reporter: Reporter {
                controller: CONTROLLER.into(),
                instance: Some(node.to_owned()),
            },
            recent: HashMap::new(),
        };
        tokio::spawn(write(recorders, orders, Arc::clone(&metrics)));
        Self(Some((sender, metrics)))
    }

    /// Hands one on, or drops it if too many wait.
    pub fn send(&self, news: News) {
        if let Some((queue, metrics)) = &self.0
            && queue.try_send(Order::Write(Box::new(news))).is_err()
        {
            metrics.event_dropped(Dropped::Queue);
            tracing::debug!("an Event was dropped: too many wait for the API server");
        }
    }

    /// Waits until those handed on so far are written or dropped, for `limit` at most. Says whether they are.
    pub async fn written(&self, limit: Duration) -> bool {
        let Some((queue, _)) = &self.0 else {
            return true;
        };
        let written = async {
            let (sender, told) = oneshot::channel();
            queue.send(Order::Tell(sender)).await.is_ok() && told.await.is_ok()
        };
        timeout(limit, written).await.unwrap_or(false)
    }
}

/// A recorder for each piece of news. To kube-rs all Events of one reason on one pod are the same, whatever their
/// notes say: of two bad annotations the second would be a count of the first.
struct Recorders {
    client: Client,
    reporter: Reporter,
    /// By what was told, and when it last was. No more than the [`Budgets`] let through.
    recent: HashMap<News, (Recorder, Instant)>,
}

impl Recorders {
    fn of(&mut self, news: &News, now: Instant) -> &Recorder {
        self.recent
            .retain(|_, (_, told)| now.saturating_duration_since(*told) < SAME_FOR);
        let new = || Recorder::new(self.client.clone(), self.reporter.clone());
        let (recorder, told) = self
            .recent
            .entry(news.clone())
            .or_insert_with(|| (new(), now));
        *told = now;
        recorder
    }
}

async fn write(mut recorders: Recorders, mut orders: mpsc::Receiver<Order>, metrics: Arc<Metrics>) {
    let mut budgets = Budgets::full(Instant::now());
    let mut failing = false;
    while let Some(order) = orders.recv().await {
        let news = match order {
            Order::Write(news) => news,
            Order::Tell(sender) => {
                let _ = sender.send(());
                continue;
            }
        };
        let now = Instant::now();
        if !budgets.take(&news.pod.uid, now) {
            metrics.event_dropped(Dropped::Budget);
            tracing::debug!(pod = %news.pod, "an Event was dropped: too many of this pod or node already");
            continue;
        }
        let written = timeout(
            WRITE_WITHIN,
            recorders
                .of(&news, now)
                .publish(&event(&news), &object(&news)),
        )
        .await;
        let failed = match written {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(e.to_string()),
            Err(_) => Some(format!("no answer within {WRITE_WITHIN:?}")),
        };
        if failed.is_some() {
            metrics.event_dropped(Dropped::Failed);
        }
        match failed {
            // Once for each time that it begins: the log has the news themselves.
            Some(why) if !failing => {
                tracing::warn!(
                    "can't write Events: {why}; does the agent's role allow create and patch of events \
                     in events.k8s.io?"
                );
                failing = true;
            }
            Some(_) => {}
            None => failing = false,
        }
    }
}

fn event(news: &News) -> Event {
    Event {
        type_: if news.warning {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: news.what.name().into(),
        note: Some(shortened(news.note.clone(), LONGEST_NOTE)),
        action: news.what.action().into(),
        secondary: None,
    }
}

fn object(news: &News) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(news.pod.namespace.clone()),
        name: Some(news.pod.name.clone()),
        uid: Some(news.pod.uid.to_string()),
        ..ObjectReference::default()
    }
}

/// How many Events may be written: so many at once, and then one each time that a pause is over.
#[derive(Clone, Copy, Debug)]
struct Budget {
    most: u32,
    refill: Duration,
    left: u32,
    /// Up to when it has been filled.
    filled: Instant,
}

impl Budget {
    /// A node's: a rollout's worth, and then one every other second.
    const fn of_node(now: Instant) -> Self {
        Self::full(100, Duration::from_secs(2), now)
    }

    /// A pod's: more than a termination has, and then one a minute.
    const fn of_pod(now: Instant) -> Self {
        Self::full(10, Duration::from_secs(60), now)
    }

    const fn full(most: u32, refill: Duration, now: Instant) -> Self {
        Self {
            most,
            refill,
            left: most,
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        while self.left < self.most && now.saturating_duration_since(self.filled) >= self.refill {
            self.filled += self.refill;
            self.left += 1;
        }
        if self.left == self.most {
            self.filled = now;
        }
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let any = self.left > 0;
        self.left -= u32::from(any);
        any
    }
}

/// The node's budget, and a share of it for each pod, so that one that is restarted all the time does not use up what
/// the others need.
#[derive(Debug)]
struct Budgets {
    node: Budget,
    /// Of the pods that have taken something and not had it filled up since. The node's budget bounds their number.
    pods: HashMap<PodUid, Budget>,
}

impl Budgets {
    fn full(now: Instant) -> Self {
        Self {
            node: Budget::of_node(now),
            pods: HashMap::new(),
        }
    }

    /// Takes one for this pod, if both it and the node have one.
    fn take(&mut self, pod: &PodUid, now: Instant) -> bool {
        self.pods.retain(|_, share| {
            share.fill(now);
            share.left < share.most
        });
        let share = self.pods.get(pod).copied();
        let mut share = share.unwrap_or_else(|| Budget::of_pod(now));
        let any = share.take(now) && self.node.take(now);
        if any {
            self.pods.insert(pod.clone(), share);
        }
        any
    }
}

#[cfg(test)]
mod tests;
