//! Writes Kubernetes Events on pods.
//!
//! An Event that can't be written soon is dropped and counted, because nothing may wait for it. To spare the API server,
//! an event that is the same as a few minutes ago raises the count of the existing Event ([`Recorders`]), and the node
//! and each of its pods have a budget ([`Budgets`]).

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ebb_core::{
    format::{one_line, shortened},
    ids::PodUid,
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

use super::{metrics::Metrics, pod_event::PodEvent};

/// The name under which ebb reports.
const CONTROLLER: &str = "ebb.dev/agent";

/// How many Events may wait for a slow API server.
const QUEUE: usize = 256;

/// For how long equal pod events are one Event (`CACHE_TTL` in kube-rs, and client-go's `finishTime`).
const SAME_FOR: Duration = Duration::from_secs(6 * 60);

/// How long one Event may take.
const WRITE_WITHIN: Duration = Duration::from_secs(5);

/// The longest note that the API takes (`NoteLengthLimit`, pkg/apis/core/validation/events.go).
const LONGEST_NOTE: usize = 1024;

/// Why an Event was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropReason {
    /// Too many waited for the API server.
    Queue,
    /// The pod or the node had written too many already.
    Budget,
    /// The API server refused it, or did not answer in time.
    Failed,
}

impl DropReason {
    /// All reasons.
    pub(crate) const ALL: [Self; 3] = [Self::Queue, Self::Budget, Self::Failed];

    /// The value of the metric's label.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Budget => "budget",
            Self::Failed => "failed",
        }
    }
}

/// Sends pod events to a task that writes them to the API server.
#[derive(Clone)]
pub struct EventWriter(Option<(mpsc::Sender<WriterMessage>, Arc<Metrics>)>);

enum WriterMessage {
    Write(Box<PodEvent>),
    /// Answered when all events sent before it are written or dropped.
    Flush(oneshot::Sender<()>),
}

impl EventWriter {
    /// For an agent without an API server: drops all Events.
    pub(crate) const fn off() -> Self {
        Self(None)
    }

    /// Writes Events in the name of the agent on `node`. The task ends when the last clone is dropped.
    /// `metrics` counts the Events that are dropped.
    pub fn start(client: Client, node: &str, metrics: Arc<Metrics>) -> Self {
        let (sender, messages) = mpsc::channel(QUEUE);
        let recorders = Recorders {
            client,
            reporter: Reporter {
                controller: CONTROLLER.into(),
                instance: Some(node.to_owned()),
            },
            recent: HashMap::new(),
        };
        tokio::spawn(write(recorders, messages, Arc::clone(&metrics)));
        Self(Some((sender, metrics)))
    }

    /// Queues an event, or drops it if the queue is full.
    pub fn send(&self, event: PodEvent) {
        if let Some((queue, metrics)) = &self.0
            && queue
                .try_send(WriterMessage::Write(Box::new(event)))
                .is_err()
        {
            metrics.event_dropped(DropReason::Queue);
            tracing::debug!("dropped an Event: {QUEUE} wait for the API server already");
        }
    }

    /// Waits until the task that writes has ended, which happens only if it has panicked. Without an API server, for ever.
    pub(crate) fn ended(&self) -> impl Future<Output = ()> + use<> {
        let queue = self.0.as_ref().map(|(queue, _)| queue.clone());
        async move {
            match queue {
                Some(queue) => queue.closed().await,
                None => std::future::pending().await,
            }
        }
    }

    /// Waits until the events sent so far are written or dropped, for `limit` at most. Returns whether they are.
    pub(crate) async fn flush(&self, limit: Duration) -> bool {
        let Some((queue, _)) = &self.0 else {
            return true;
        };
        let flushed = async {
            let (sender, done) = oneshot::channel();
            queue.send(WriterMessage::Flush(sender)).await.is_ok() && done.await.is_ok()
        };
        timeout(limit, flushed).await.unwrap_or(false)
    }
}

/// A recorder for each distinct pod event. One recorder of kube-rs takes all Events with one reason on one pod for the
/// same, even if their notes differ: a second bad annotation would only raise the count of the first.
struct Recorders {
    client: Client,
    reporter: Reporter,
    /// Each recorder, and when it was last used. [`Budgets`] bounds their number.
    recent: HashMap<PodEvent, (Recorder, Instant)>,
}

impl Recorders {
    fn of(&mut self, event: &PodEvent, now: Instant) -> &Recorder {
        self.recent
            .retain(|_, (_, used)| now.saturating_duration_since(*used) < SAME_FOR);
        let new = || Recorder::new(self.client.clone(), self.reporter.clone());
        let (recorder, used) = self
            .recent
            .entry(event.clone())
            .or_insert_with(|| (new(), now));
        *used = now;
        recorder
    }
}

async fn write(
    mut recorders: Recorders,
    mut messages: mpsc::Receiver<WriterMessage>,
    metrics: Arc<Metrics>,
) {
    let mut budgets = Budgets::full(Instant::now());
    let mut failing = false;
    while let Some(message) = messages.recv().await {
        let event = match message {
            WriterMessage::Write(event) => event,
            WriterMessage::Flush(sender) => {
                let _ = sender.send(());
                continue;
            }
        };
        let now = Instant::now();
        if !budgets.take(&event.pod.uid, now) {
            metrics.event_dropped(DropReason::Budget);
            tracing::debug!(pod = %event.pod, "dropped an Event: this pod or node has written too many");
            continue;
        }
        let written = timeout(
            WRITE_WITHIN,
            recorders
                .of(&event, now)
                .publish(&to_event(&event), &object(&event)),
        )
        .await;
        let is_refused = matches!(written, Ok(Err(kube::Error::Api(_))));
        let failed = match written {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(one_line(&e)),
            Err(_) => Some(format!("no answer within {WRITE_WITHIN:?}")),
        };
        if failed.is_some() {
            metrics.event_dropped(DropReason::Failed);
        }
        match failed {
            // Logged once per outage: the log has the reports themselves.
            // The watch on pods warns when the API server is away.
            Some(why) if !failing && !is_refused => {
                tracing::info!("no Events are written while the API server does not answer: {why}");
                failing = true;
            }
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

fn to_event(event: &PodEvent) -> Event {
    Event {
        type_: if event.warning {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: event.reason.name().into(),
        note: Some(shortened(event.note.clone(), LONGEST_NOTE)),
        action: event.reason.action().into(),
        secondary: None,
    }
}

fn object(event: &PodEvent) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(event.pod.namespace.clone()),
        name: Some(event.pod.name.clone()),
        uid: Some(event.pod.uid.to_string()),
        ..ObjectReference::default()
    }
}

/// A token bucket: `most` Events at once, then one per `refill`.
#[derive(Clone, Copy, Debug)]
struct Budget {
    most: u32,
    refill: Duration,
    left: u32,
    /// When a token was last added.
    filled: Instant,
}

impl Budget {
    /// Enough for a rollout, then one per two seconds.
    const fn of_node(now: Instant) -> Self {
        Self::full(100, Duration::from_secs(2), now)
    }

    /// More than one termination needs, then one per minute.
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

    /// Takes a token, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let any = self.left > 0;
        self.left -= u32::from(any);
        any
    }
}

/// The node's budget, and a smaller one for each pod, so that a pod that restarts all the time does not use up the
/// node's.
#[derive(Debug)]
struct Budgets {
    node: Budget,
    /// The budgets that are not full. The node's budget bounds their number.
    pods: HashMap<PodUid, Budget>,
}

impl Budgets {
    fn full(now: Instant) -> Self {
        Self {
            node: Budget::of_node(now),
            pods: HashMap::new(),
        }
    }

    /// Takes a token of this pod and of the node, if both have one.
    fn take(&mut self, pod: &PodUid, now: Instant) -> bool {
        self.pods.retain(|_, budget| {
            budget.fill(now);
            budget.left < budget.most
        });
        let budget = self.pods.get(pod).copied();
        let mut budget = budget.unwrap_or_else(|| Budget::of_pod(now));
        let any = budget.take(now) && self.node.take(now);
        if any {
            self.pods.insert(pod.clone(), budget);
        }
        any
    }
}

#[cfg(test)]
mod tests;
