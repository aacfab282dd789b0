//! The proxy's own metrics.

use std::time::Duration;

use ebb_protocol::proxy_metrics::{HistogramView, PROXY_METRICS_PATH, ProxyMetrics};
use http::{HeaderMap, Method, Request};
use http_body_util::BodyExt as _;

use super::{hold::*, support::*};

async fn metrics(client: &RawClient) -> ProxyMetrics {
    let url = format!("http://localhost{PROXY_METRICS_PATH}");
    let body = whole(bytes::Bytes::new(), HeaderMap::new());
    let request = Request::get(url).body(body).unwrap();
    let reply = soon(client.send(request)).await.unwrap();
    assert_eq!(reply.headers()["content-type"], "application/json");
    let body = soon(reply.into_body().collect()).await.unwrap();
    serde_json::from_slice(&body.to_bytes()).unwrap()
}

/// Waits for metrics that fit: a call is counted when the proxy has dropped its reply, a moment after the caller has it.
async fn until(client: &RawClient, fits: impl Fn(&ProxyMetrics) -> bool) -> ProxyMetrics {
    soon(async {
        loop {
            let metrics = metrics(client).await;
            if fits(&metrics) {
                return metrics;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

fn count(metrics: &ProxyMetrics, method: &str, outcome: &str) -> u64 {
    let mut calls = metrics.calls.iter();
    let found = calls.find(|c| c.method == method && c.outcome == outcome);
    found.map_or(0, |c| c.count)
}

fn total(histogram: &HistogramView) -> u64 {
    assert_eq!(histogram.counts.len(), histogram.bounds.len() + 1);
    histogram.counts.iter().sum()
}

#[tokio::test]
async fn calls_are_counted_by_method_and_outcome_and_only_a_get_is_answered_by_the_proxy() {
    let mut node = ProxySetup::start().await;
    for _ in 0..3 {
        soon(node.client.unary(VERSION, &[], frame(b""))).await;
        assert_eq!(node.forwarded().await.uri.path(), VERSION);
    }
    // The runtime does not implement these.
    for path in [PROXY_METRICS_PATH, "/runtime.v9.Future/Call"] {
        soon(node.client.unary(path, &[], frame(b""))).await;
        assert_eq!(
            node.forwarded().await.uri.path(),
            path,
            "a POST is forwarded"
        );
    }
    let seen = until(&node.client, |m| count(m, "other", "error") == 2).await;
    assert_eq!(count(&seen, "Version", "ok"), 3);
    assert_eq!(seen.calls.len(), 2, "{seen:?}");
    assert_eq!(total(&seen.added_latency_seconds), 5);
    assert!(seen.added_latency_seconds.sum < 1.0, "{seen:?}");
    assert_eq!((seen.held, seen.holds.len(), seen.clients), (0, 0, 0));
    assert!(node.seen.try_recv().is_err(), "no GET reaches the runtime");
    let _other = node.proxy.raw().await;
    until(&node.client, |m| m.clients == 1).await;
    // Any other GET is the runtime's.
    let body = whole(bytes::Bytes::new(), HeaderMap::new());
    let get = Request::builder().method(Method::GET);
    let get = get.uri("http://localhost/metrics").body(body).unwrap();
    soon(node.client.send(get)).await.unwrap();
    assert_eq!(node.forwarded().await.uri.path(), "/metrics");
}

#[tokio::test]
async fn a_call_that_its_caller_cancels_and_one_without_a_runtime_are_told_apart() {
    let proxy = TestProxy::start().await;
    let client = proxy.raw().await;
    soon(client.unary(VERSION, &[], frame(b""))).await;
    until(&client, |m| count(m, "Version", "unavailable") == 1).await;
    let _runtime = Runtime::start(&proxy.runtime(), |_| std::future::pending());
    // After a failed connect, calls fail at once for 20 ms.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move {
            client
                .unary("/runtime.v1.RuntimeService/Status", &[], frame(b""))
                .await
        }
    });
    until(&client, |m| total(&m.added_latency_seconds) == 2).await;
    call.abort();
    until(&client, |m| count(m, "Status", "cancelled") == 1).await;
}

#[tokio::test]
async fn a_hold_counts_while_it_lasts_and_its_time_is_not_latency() {
    let mut node = ProxySetup::start().await;
    let call = node.stop(30);
    let mut agent = node.next_hold().await;
    agent.send(&holding(20_000, 5_000)).await;
    until(&node.client, |m| m.held == 1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    agent.send(&RELEASE).await;
    soon(call).await.unwrap();
    let seen = until(&node.client, |m| count(m, "StopContainer", "ok") == 1).await;
    assert_eq!((seen.held, seen.holds.len()), (0, 1));
    assert_eq!(
        (seen.holds[0].reason.as_str(), seen.holds[0].count),
        ("drained", 1)
    );
    assert_eq!(total(&seen.hold_seconds), 1);
    assert!(seen.hold_seconds.sum >= 0.2, "{seen:?}");
    assert_eq!(total(&seen.added_latency_seconds), 0);
}
