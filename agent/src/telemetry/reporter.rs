//! The one place that writes a log line, an Event, a metric and a span for each report, so that they cannot disagree.

use std::{sync::Arc, time::Duration};

use ebb_core::drain_report::DrainNotice;
use tokio::sync::mpsc;

use super::{
    events::EventWriter,
    metrics::Metrics,
    pod_event::{self, PodEvent},
    traces::DrainTracer,
};

/// Reports what happens to pods.
#[derive(Clone)]
pub(crate) struct Reporter {
    metrics: Arc<Metrics>,
    events: EventWriter,
    traces: Option<DrainTracer>,
}

impl Reporter {
    /// Counts in `metrics`, writes to `events`, and sends spans of drains to `traces`.
    pub(crate) const fn new(
        metrics: Arc<Metrics>,
        events: EventWriter,
        traces: Option<DrainTracer>,
    ) -> Self {
        Self {
            metrics,
            events,
            traces,
        }
    }

    /// Reports drains until the driver ends.
    pub(crate) async fn follow(self, mut notices: mpsc::UnboundedReceiver<DrainNotice>) {
        while let Some(notice) = notices.recv().await {
            match notice {
                DrainNotice::Began(report) => {
                    self.metrics.drain_began();
                    PodEvent::began(&report)
                        .into_iter()
                        .for_each(|n| self.report(n));
                }
                // No Event: each one is a write to the API server.
                DrainNotice::Settled(report) => {
                    tracing::info!(pod = %report.pod, "Settled: {}", pod_event::settled(&report));
                }
                DrainNotice::Blocked(report) => self.report(PodEvent::blocked(&report)),
                DrainNotice::Warned(pod, why) => self.report(PodEvent::policy(&pod, &why)),
                DrainNotice::Finished(report) => {
                    if report.observed {
                        self.metrics.drain_observed(&report);
                        let warnings = report.warnings.iter();
                        warnings.for_each(|w| self.report(PodEvent::policy(&report.pod, w)));
                    } else {
                        self.metrics.drain_ended(&report);
                    }
                    if let Some(traces) = &self.traces {
                        traces.drain_ended(&report);
                    }
                    self.report(PodEvent::finished(&report));
                }
            }
        }
    }

    /// Waits until the Events and spans reported so far are sent or dropped, for `limit` at most.
    pub(crate) async fn flush(&self, limit: Duration) {
        let traces = async {
            if let Some(traces) = &self.traces {
                traces.clone().flush(limit).await;
            }
        };
        tokio::join!(self.flush_events(limit), traces);
    }

    async fn flush_events(&self, limit: Duration) {
        if !self.events.flush(limit).await {
            tracing::debug!("some Events were not written before the stop");
        }
    }

    /// Writes the log line and the Event.
    pub(crate) fn report(&self, event: PodEvent) {
        let (pod, what, note) = (&event.pod, event.reason.name(), &event.note);
        if event.warning {
            tracing::warn!(%pod, "{what}: {note}");
        } else {
            tracing::info!(%pod, "{what}: {note}");
        }
        self.events.send(event);
    }
}
