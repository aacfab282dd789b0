//! A runtime that stops, restarts, or reads slowly.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::{server::conn::http2 as server, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_cri::v1::StopContainerRequest;
use tokio::net::UnixListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{hold::*, support::*};

#[tokio::test]
async fn after_goaway_open_streams_end_normally_and_the_next_call_has_a_new_connection() {
    let proxy = TestProxy::start().await;
    let listener = UnixListener::bind(proxy.runtime()).unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let leave = CancellationToken::new();
    let (sender, body) = channel();
    let body = Arc::new(std::sync::Mutex::new(Some(body)));
    let _server = AbortOnDropHandle::new(tokio::spawn({
        let (connections, leave) = (connections.clone(), leave.clone());
        async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let first = connections.fetch_add(1, Ordering::SeqCst) == 0;
                let (body, leave) = (body.clone(), leave.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request: http::Request<_>| {
                        let _: &hyper::body::Incoming = request.body();
                        let reply = match request.uri().path() {
                            "/future/Stream" => {
                                grpc_reply(body.lock().unwrap().take().expect("one stream"))
                            }
                            _ => ok(frame(b"")),
                        };
                        async move { Ok::<_, Infallible>(reply) }
                    });
                    let connection = server::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service);
                    let mut connection = std::pin::pin!(connection);
                    tokio::select! {
                        _ = connection.as_mut() => return,
                        () = leave.cancelled(), if first => connection.as_mut().graceful_shutdown(),
                    }
                    let _ = connection.await;
                });
            }
        }
    }));
    let client = proxy.raw().await;
    let whole_body = whole(frame(b""), HeaderMap::new());
    let mut stream = soon(client.send(request("/future/Stream", &[], whole_body)))
        .await
        .unwrap()
        .into_body();
    leave.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..3 {
        let reply = soon(client.unary(VERSION, &[], frame(b""))).await;
        assert_eq!(reply.trailers, Some(trailers("0")));
    }
    assert_eq!(connections.load(Ordering::SeqCst), 2);
    // The stream that was open before goes on until it ends.
    sender.send(Ok(Frame::data(frame(b"late")))).unwrap();
    let data = soon(stream.frame()).await.unwrap().unwrap();
    assert_eq!(data.into_data().unwrap(), frame(b"late"));
    sender.send(Ok(Frame::trailers(trailers("0")))).unwrap();
    let end = soon(stream.frame()).await.unwrap().unwrap();
    assert_eq!(end.into_trailers().unwrap(), trailers("0"));
}

#[tokio::test]
async fn a_call_that_is_held_while_the_runtime_restarts_goes_to_the_new_one() {
    let proxy = TestProxy::start().await;
    let (_agent, mut requests) = agent(&proxy.agent());
    let (old, mut of_old) = Runtime::recording(&proxy.runtime());
    let client = proxy.raw().await;
    soon(client.unary(VERSION, &[], frame(b""))).await;
    soon(of_old.recv()).await.unwrap();
    let call = tokio::spawn(async move { client.unary(STOP, &[], stop(30)).await });
    let mut holds = soon(requests.recv()).await.unwrap();
    holds.send(&holding(20_000, 5_000)).await;
    drop(old);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(
        !call.is_finished(),
        "the end of the runtime must not end a hold"
    );
    let (_new, mut of_new) = Runtime::recording(&proxy.runtime());
    holds.send(&RELEASE).await;
    let forwarded = soon(of_new.recv()).await.unwrap();
    assert_eq!(forwarded.decode::<StopContainerRequest>().timeout, 29);
    assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    assert!(of_old.try_recv().is_err());
}

#[tokio::test]
async fn a_request_that_the_runtime_does_not_read_stalls_its_sender_only() {
    const CHUNK: usize = 64 << 10;
    let program = ProxyProgram::start().await;
    let _runtime = Runtime::start(&program.at("runtime.sock"), async |request| {
        if request.uri().path() == VERSION {
            return ok(frame(b""));
        }
        let _unread = request;
        std::future::pending().await
    });
    let client = program.client().await;
    soon(client.unary(VERSION, &[], frame(b""))).await;
    let sent = Arc::new(AtomicUsize::new(0));
    let endless = futures_util::stream::poll_fn({
        let sent = sent.clone();
        move |_| {
            sent.fetch_add(CHUNK, Ordering::SeqCst);
            let chunk = Bytes::from(vec![0; CHUNK]);
            Poll::Ready(Some(Ok::<_, BoxError>(Frame::data(chunk))))
        }
    });
    let body = BodyExt::boxed(StreamBody::new(endless));
    let _call = AbortOnDropHandle::new(tokio::spawn({
        let client = client.clone();
        async move { client.send(request("/future/Upload", &[], body)).await }
    }));
    let stalled = soon(async {
        loop {
            let before = sent.load(Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(500)).await;
            if before > 0 && sent.load(Ordering::SeqCst) == before {
                break before;
            }
        }
    });
    let stalled = stalled.await;
    // Two windows, and the data between them.
    assert!(stalled < 24 << 20, "{stalled} bytes were taken");
    let peak = program.memory("VmHWM:");
    assert!(peak < 48 << 20, "{peak} bytes");
    soon(client.unary(VERSION, &[], frame(b""))).await;
}
