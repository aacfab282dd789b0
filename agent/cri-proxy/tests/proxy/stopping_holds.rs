//! A stopping proxy: the calls that it holds, and those that the runtime has not answered.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::mpsc;

use super::{hold::*, support::*};

#[tokio::test]
async fn a_stopping_proxy_forwards_held_calls_and_ends_within_a_second() {
    let mut node = ProxySetup::start().await;
    let held = node.stop(30);
    let mut agent = node.next_hold().await;
    agent.send(&holding(20_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;

    let started = Instant::now();
    node.proxy.shutdown.cancel();
    assert_eq!(node.forwarded_timeout().await, 30);
    assert_eq!(soon(held).await.unwrap().trailers, Some(trailers("0")));
    soon(&mut node.proxy.serving).await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "idle connections close at once"
    );
    assert!(!node.proxy.socket().exists());
}

#[tokio::test]
async fn a_stopping_proxy_does_not_wait_for_endless_streams() {
    let mut proxy = TestProxy::start().await;
    let (dropped, mut cancelled) = DropNotifier::new();
    let dropped = std::sync::Mutex::new(Some(dropped));
    let _runtime = Runtime::start(&proxy.runtime(), move |_| {
        let dropped = dropped.lock().unwrap().take();
        async move {
            let _dropped = dropped;
            std::future::pending().await
        }
    });
    let client = proxy.raw().await;
    let call = tokio::spawn(async move {
        client
            .send(request(
                "/future/Endless",
                &[],
                whole(Bytes::new(), HeaderMap::new()),
            ))
            .await
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let started = Instant::now();
    proxy.shutdown.cancel();
    soon(&mut proxy.serving).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
    soon(cancelled.recv()).await;
    assert!(soon(call).await.unwrap().is_err());
}

/// A runtime that answers StopContainer when the test allows it, and other calls at once.
fn slow_to_stop(proxy: &TestProxy) -> (Runtime, mpsc::UnboundedReceiver<()>, mpsc::Sender<()>) {
    let (called, calls) = mpsc::unbounded_channel();
    let (stopped, wait) = mpsc::channel::<()>(1);
    let wait = std::sync::Arc::new(tokio::sync::Mutex::new(wait));
    let runtime = Runtime::start(&proxy.runtime(), move |request| {
        let (called, wait) = (called.clone(), wait.clone());
        async move {
            if request.uri().path() == STOP {
                let _ = called.send(());
                wait.lock().await.recv().await;
            }
            ok(frame(&[]))
        }
    });
    (runtime, calls, stopped)
}

#[tokio::test]
async fn a_stopping_proxy_goes_on_serving_until_a_forwarded_stop_is_answered() {
    let mut proxy = TestProxy::start().await;
    let (_runtime, mut calls, stopped) = slow_to_stop(&proxy);
    let client = proxy.raw().await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.unary(STOP, &[], stop(30)).await }
    });
    soon(calls.recv()).await.unwrap();
    proxy.shutdown.cancel();
    // Much longer than a proxy without unanswered calls takes to end.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(!call.is_finished() && !proxy.serving.is_finished());
    // Meanwhile it serves old and new clients, and holds no call.
    let (_agent, mut requests) = agent(&proxy.agent());
    soon(client.unary(VERSION, &[("grpc-timeout", "5S")], frame(b""))).await;
    let other = proxy.raw().await;
    soon(other.unary(VERSION, &[("grpc-timeout", "5S")], frame(b""))).await;
    let second = tokio::spawn(async move { other.unary(STOP, &[], stop(30)).await });
    soon(calls.recv()).await;
    assert!(
        requests.try_recv().is_err(),
        "a stopping proxy holds no call"
    );

    stopped.send(()).await.unwrap();
    assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    assert!(
        !proxy.serving.is_finished(),
        "the second stop is not answered yet"
    );
    stopped.send(()).await.unwrap();
    assert_eq!(soon(second).await.unwrap().trailers, Some(trailers("0")));
    soon(&mut proxy.serving).await.unwrap();
}

#[tokio::test]
async fn a_stopping_proxy_waits_for_answers_no_longer_than_answer_within() {
    let mut proxy =
        TestProxy::start_with(|options| options.stop_within = Duration::from_millis(500)).await;
    let (_runtime, mut calls, _stopped) = slow_to_stop(&proxy);
    let client = proxy.raw().await;
    let body = whole(stop(30), HeaderMap::new());
    let call = tokio::spawn(async move { client.send(request(STOP, &[], body)).await });
    soon(calls.recv()).await.unwrap();
    proxy.shutdown.cancel();
    soon(&mut proxy.serving).await.unwrap();
    assert!(soon(call).await.unwrap().is_err());
}
