//! Telling the world about pods. The one place where something becomes a log line, an Event and a metric, so that
//! they can't disagree.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{events::Events, metrics::Metrics, news::News};
use crate::drain::{driver::DrainNotice, report::Report};

/// Who tells.
#[derive(Clone)]
pub struct Teller {
    metrics: Arc<Metrics>,
    events: Events,
}

impl Teller {
    /// One that counts in `metrics` and writes `events`.
    pub const fn new(metrics: Arc<Metrics>, events: Events) -> Self {
        Self { metrics, events }
    }

    /// Tells of drains until there are none left to tell of. `over` is called with each that is.
    pub async fn follow(
        self,
        mut notices: mpsc::UnboundedReceiver<DrainNotice>,
        over: impl Fn(&Report) + Send,
    ) {
        while let Some(notice) = notices.recv().await {
            match notice {
                DrainNotice::Began(report) => {
                    self.metrics.drain_began();
                    News::began(&report).into_iter().for_each(|n| self.tell(n));
                }
                DrainNotice::Blocked(report) => self.tell(News::blocked(&report)),
                DrainNotice::Finished(report) => {
                    self.metrics.drain_ended(&report);
                    self.tell(News::finished(&report));
                    over(&report);
                }
            }
        }
    }

    /// Waits until the Events told so far are written or dropped, for `limit` at most.
    pub async fn written(&self, limit: Duration) {
        if !self.events.written(limit).await {
            tracing::debug!("some Events were not written before the stop");
        }
    }

    /// Tells one thing of a pod.
    pub fn tell(&self, news: News) {
        let (pod, what, note) = (&news.pod, news.what.name(), &news.note);
        if news.warning {
            tracing::warn!(%pod, "{what}: {note}");
        } else {
            tracing::info!(%pod, "{what}: {note}");
        }
        self.events.send(news);
    }
}
