//! Drains as OpenTelemetry spans, sent by OTLP over gRPC. Off unless an endpoint is set.
//!
//! Each drain becomes one span when it has ended, with its phases as events. If the kubelet traces its calls
//! (`KubeletTracing`), the span belongs to the trace of its StopContainer. The library keeps up to 2048 spans while the
//! collector is away, and drops further ones.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use ebb_core::drain_report::{Phase, Report};
use opentelemetry::{
    Context, KeyValue,
    propagation::TextMapPropagator,
    trace::{Event, Span as _, SpanBuilder, SpanKind, Status, TracerProvider as _},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};

/// Makes a span of each drain.
#[derive(Clone)]
pub(crate) struct DrainTracer {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl DrainTracer {
    /// Sends spans of `node` to the collector at `endpoint`, such as `http://127.0.0.1:4317`. Connects when there is
    /// something to send. Call it in the async runtime.
    pub(crate) fn new(endpoint: &str, node: Option<&str>) -> Result<Self, ExporterBuildError> {
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .build()?;
        let node = node.map(|node| KeyValue::new("k8s.node.name", node.to_owned()));
        let resource = Resource::builder()
            .with_service_name("ebb")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attributes(node);
        let provider = SdkTracerProvider::builder()
            .with_resource(resource.build())
            .with_batch_exporter(exporter)
            .build();
        let tracer = provider.tracer("ebb");
        Ok(Self { provider, tracer })
    }

    /// Makes a span of a drain that has ended.
    pub(crate) fn drain_ended(&self, report: &Report) {
        let Some((builder, end)) = span(report) else {
            return;
        };
        let parent = parent(report.traceparent.as_deref());
        let mut span = builder.start_with_context(&self.tracer, &parent);
        span.set_status(status(report));
        span.end_with_timestamp(end);
    }

    /// Sends what is left, for `limit` at most.
    pub(crate) async fn flush(self, limit: Duration) {
        // It blocks its thread.
        let stopped =
            tokio::task::spawn_blocking(move || self.provider.shutdown_with_timeout(limit));
        if let Ok(Err(error)) = stopped.await {
            tracing::debug!(%error, "some traces were not sent before the stop");
        }
    }
}

/// The context of a `traceparent`. Without a valid one, the span begins a trace of its own.
fn parent(traceparent: Option<&str>) -> Context {
    let header = traceparent.map(|value| ("traceparent".to_owned(), value.to_owned()));
    let headers: HashMap<_, _> = header.into_iter().collect();
    TraceContextPropagator::new().extract_with_context(&Context::new(), &headers)
}

/// The span of a drain that has ended, and its end. `None` if its start is no time, which an agent never writes.
fn span(report: &Report) -> Option<(SpanBuilder, SystemTime)> {
    let start = humantime::parse_rfc3339(&report.started_at).ok()?;
    let at = |ms: u64| start + Duration::from_millis(ms);
    let mut attributes = vec![
        KeyValue::new("k8s.namespace.name", report.pod.namespace.clone()),
        KeyValue::new("k8s.pod.name", report.pod.name.clone()),
        KeyValue::new("k8s.pod.uid", report.pod.uid.as_str().to_owned()),
        KeyValue::new("ebb.until", report.until.name()),
        KeyValue::new("ebb.observed", report.observed),
        KeyValue::new("ebb.deadline_ms", number(report.deadline_ms)),
    ];
    if let Some(reason) = report.reason {
        attributes.push(KeyValue::new("ebb.reason", reason.name()));
    }
    let counts = [
        ("ebb.arrived", report.arrived),
        ("ebb.ended", report.ended),
        ("ebb.cut", report.cut_total),
    ];
    let known = counts.into_iter().filter_map(|(name, n)| Some((name, n?)));
    attributes.extend(known.map(|(name, n)| KeyValue::new(name, i64::from(n))));
    let builder = SpanBuilder::from_name("drain")
        .with_kind(SpanKind::Internal)
        .with_start_time(start)
        .with_attributes(attributes)
        .with_events(phases(report, at));
    Some((builder, at(report.held_ms)))
}

/// An event for the beginning of each phase, with the flows that held then.
fn phases(report: &Report, at: impl Fn(u64) -> SystemTime) -> Vec<Event> {
    let mut last = None;
    let mut events: Vec<_> = report
        .changes
        .iter()
        .filter(|change| last.replace(change.phase) != Some(change.phase))
        .map(|change| {
            let flows = [
                KeyValue::new("ebb.live", i64::from(change.flows.live())),
                KeyValue::new("ebb.idle", i64::from(change.flows.idle)),
            ];
            event(change.phase, at(change.at_ms), flows.into())
        })
        .collect();
    if last != Some(Phase::Released) {
        events.push(event(Phase::Released, at(report.held_ms), vec![]));
    }
    events
}

fn event(phase: Phase, at: SystemTime, attributes: Vec<KeyValue>) -> Event {
    Event::new(phase.name(), at, attributes, 0)
}

/// An error if the drain cut connections.
fn status(report: &Report) -> Status {
    match report.cut_total {
        None => Status::Unset,
        Some(0) => Status::Ok,
        Some(n) => Status::error(format!("{n} connections cut")),
    }
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use ebb_core::drain_report::{ReleaseReason, testing::report};
    use opentelemetry::trace::TraceContextExt as _;

    use super::*;

    #[test]
    fn a_drain_belongs_to_the_trace_of_the_kubelets_call() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let context = parent(Some(&format!("00-{trace}-b7ad6b7169203331-01")));
        let span = context.span().span_context().clone();
        assert!(span.is_valid() && span.is_remote());
        assert_eq!(span.trace_id().to_string(), trace);
        for invalid in [None, Some("nonsense"), Some("")] {
            assert!(!parent(invalid).span().span_context().is_valid());
        }
    }

    #[test]
    fn the_span_lasts_as_long_as_the_drain_and_has_each_phase_once() {
        let mut r = report(Some(ReleaseReason::Deadline));
        r.cut_total = Some(2);
        let (builder, end) = span(&r).unwrap();
        let start = builder.start_time.unwrap();
        assert_eq!(start, humantime::parse_rfc3339(&r.started_at).unwrap());
        assert_eq!(
            end.duration_since(start).unwrap(),
            Duration::from_millis(r.held_ms)
        );
        let events = builder.events.unwrap();
        let names: Vec<_> = events.iter().map(|e| e.name.as_ref()).collect();
        assert_eq!(names.last(), Some(&Phase::Released.name()));
        assert!(names.windows(2).all(|two| two[0] != two[1]), "{names:?}");
        assert_eq!(status(&r), Status::error("2 connections cut"));
        r.cut_total = Some(0);
        assert_eq!(status(&r), Status::Ok);
        r.started_at = "yesterday".into();
        assert!(span(&r).is_none());
    }
}
