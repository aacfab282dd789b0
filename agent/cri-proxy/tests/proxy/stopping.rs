//! How a stopping proxy looks to its clients.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use h2::Reason;
use http::{HeaderMap, Request};
use tokio::{net::UnixStream, sync::Semaphore};
use tokio_util::task::AbortOnDropHandle;

use super::support::*;

const PULL: &str = "/runtime.v1.ImageService/PullImage";

/// A runtime that answers each call for one permit of the second semaphore; the first counts the calls.
fn waiting(proxy: &TestProxy) -> (Runtime, Arc<Semaphore>, Arc<Semaphore>) {
    let (called, may) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let runtime = Runtime::start(&proxy.runtime(), {
        let (called, may) = (called.clone(), may.clone());
        move |_| {
            let (called, may) = (called.clone(), may.clone());
            async move {
                called.add_permits(1);
                may.acquire().await.unwrap().forget();
                ok(frame(&[]))
            }
        }
    });
    (runtime, called, may)
}

#[tokio::test]
async fn a_stopping_proxy_goes_on_serving_until_an_image_is_pulled() {
    let mut proxy = TestProxy::start().await;
    let (_runtime, called, may) = waiting(&proxy);
    let client = proxy.raw().await;
    // The kubelet gives this call no deadline.
    let pull = tokio::spawn(async move { client.unary(PULL, &[], frame(b"image")).await });
    soon(called.acquire()).await.unwrap().forget();
    proxy.shutdown.cancel();
    // Longer than a proxy without unanswered calls takes to end.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(!pull.is_finished() && !proxy.serving.is_finished());
    may.add_permits(1);
    assert_eq!(soon(pull).await.unwrap().trailers, Some(trailers("0")));
    soon(&mut proxy.serving).await.unwrap();
}

#[tokio::test]
async fn a_stopping_proxy_sends_goaway_without_an_error_and_lets_open_calls_end() {
    let mut proxy = TestProxy::start().await;
    let (_runtime, called, may) = waiting(&proxy);
    let stream = UnixStream::connect(proxy.socket()).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::post("http://localhost/future/Slow")
        .body(())
        .unwrap();
    let (reply, mut body) = sender.send_request(request, false).unwrap();
    body.send_data(frame(b""), true).unwrap();
    soon(called.acquire()).await.unwrap().forget();

    let stopped = Instant::now();
    proxy.shutdown.cancel();
    let error = soon(async {
        loop {
            match sender.clone().ready().await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => break error,
            }
        }
    })
    .await;
    assert!(error.is_go_away() && error.is_remote(), "{error:?}");
    assert_eq!(error.reason(), Some(Reason::NO_ERROR));
    assert!(stopped.elapsed() < Duration::from_secs(1));
    may.add_permits(1);
    let mut body = soon(reply).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), frame(b""));
    assert_eq!(soon(body.trailers()).await.unwrap(), Some(trailers("0")));
    drop(body);
    drop(sender);
    soon(&mut proxy.serving).await.unwrap();
    soon(connection).await.unwrap().unwrap();
}

#[tokio::test]
async fn more_clients_than_the_soft_limit_of_files_are_served() {
    let program = ProxyProgram::start_after("ulimit -S -n 20").await;
    let (_runtime, _seen) = Runtime::recording(&program.at("runtime.sock"));
    let mut clients = Vec::new();
    for _ in 0..40 {
        let client = program.client().await;
        soon(client.unary("/future/Call", &[], frame(b""))).await;
        clients.push(client);
    }
}

#[tokio::test]
async fn a_proxy_out_of_files_logs_it_once_and_serves_new_clients_when_some_are_free() {
    let program = ProxyProgram::start_after("ulimit -n 16").await;
    let (_runtime, _seen) = Runtime::recording(&program.at("runtime.sock"));
    let mut idle = Vec::new();
    for _ in 0..20 {
        idle.push(program.client().await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let warnings = |log: String| log.matches("can't accept a connection").count();
    assert_eq!(warnings(program.log()), 1, "{}", program.log());
    drop(idle);
    let client = program.client().await;
    let body = whole(frame(b""), HeaderMap::new());
    let reply = soon(client.send(request("/future/Call", &[], body))).await;
    assert_eq!(reply.unwrap().status(), 200);
    assert_eq!(warnings(program.log()), 1, "{}", program.log());
}
