//! Calls that the proxy forwards without reading them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use http_body_util::BodyExt;
use k8s_cri::v1::{GetEventsRequest, VersionRequest};
use tonic::Code;

use super::support::*;

const VERSION: &str = "/runtime.v1.RuntimeService/Version";

#[tokio::test]
async fn metadata_trailers_and_details_are_forwarded_untouched() {
    let proxy = TestProxy::start().await;
    let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let mut reply_headers = HeaderMap::new();
    for (name, value) in [
        ("content-type", "application/grpc+proto"),
        ("x-initial", "1"),
        ("x-initial", "2"),
    ] {
        reply_headers.append(name, HeaderValue::from_static(value));
    }
    let mut reply_trailers = trailers("9");
    reply_trailers.insert("grpc-message", HeaderValue::from_static("50%25 done"));
    // More than hyper's own limit of 16 KiB for all headers together.
    let details = HeaderValue::try_from("QUFB".repeat(10_000)).unwrap();
    reply_trailers.insert("grpc-status-details-bin", details);
    let (headers, last) = (reply_headers.clone(), reply_trailers.clone());
    let _runtime = Runtime::start(&proxy.runtime(), move |request| {
        let (sender, headers, last) = (sender.clone(), headers.clone(), last.clone());
        async move {
            sender.send(RecordedCall::request(request).await).unwrap();
            // From a channel, so that hyper does not know the length and adds no header about it.
            let (body, reply_body) = channel();
            body.send(Ok(Frame::data(frame(b"reply")))).unwrap();
            body.send(Ok(Frame::trailers(last))).unwrap();
            let mut reply = grpc_reply(reply_body);
            *reply.headers_mut() = headers;
            reply
        }
    });

    let metadata = [
        ("user-agent", "grpc-go/1.75.0"),
        ("grpc-timeout", "119999873u"),
        (
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
        ("baggage", "a=1,b=2"),
        ("x-many", "1"),
        ("x-many", "2"),
        ("x-some-bin", "AAEC"),
    ];
    let (body, request_body) = channel();
    body.send(Ok(Frame::data(frame(b"request")))).unwrap();
    drop(body);
    let sent = request(VERSION, &metadata, request_body);
    let (uri, headers) = (sent.uri().clone(), sent.headers().clone());
    let reply = RecordedCall::reply(proxy.raw().await.send(sent).await.unwrap()).await;

    let seen = seen.recv().await.unwrap();
    assert_eq!(seen.uri, uri);
    assert_eq!(seen.headers, headers);
    assert_eq!(seen.body, frame(b"request"));
    assert_eq!(reply.headers, reply_headers);
    assert_eq!(reply.body, frame(b"reply"));
    assert_eq!(reply.trailers, Some(reply_trailers));
}

#[tokio::test]
async fn a_cri_client_gets_its_answer() {
    let proxy = TestProxy::start().await;
    let (_runtime, _seen) = Runtime::recording(&proxy.runtime());
    let reply = proxy
        .cri()
        .await
        .version(VersionRequest::default())
        .await
        .unwrap();
    assert_eq!(reply.into_inner().runtime_name, "stand-in");
}

#[tokio::test]
async fn events_are_forwarded_one_by_one_as_they_happen() {
    let proxy = TestProxy::start().await;
    let (sender, body) = channel();
    let body = std::sync::Mutex::new(Some(body));
    let _runtime = Runtime::start(&proxy.runtime(), move |_| {
        let body = body.lock().unwrap().take().unwrap();
        async { grpc_reply(body) }
    });
    let event = |id: String| {
        Ok(Frame::data(grpc_frame(
            &k8s_cri::v1::ContainerEventResponse {
                container_id: id,
                ..Default::default()
            },
        )))
    };
    sender.send(event("0".into())).unwrap();
    let mut events = soon(proxy.cri().await.get_container_events(GetEventsRequest {}))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        soon(events.message()).await.unwrap().unwrap().container_id,
        "0"
    );
    for n in 1..100 {
        sender.send(event(n.to_string())).unwrap();
        assert_eq!(
            soon(events.message()).await.unwrap().unwrap().container_id,
            n.to_string()
        );
    }
    sender.send(Ok(Frame::trailers(trailers("0")))).unwrap();
    assert!(soon(events.message()).await.unwrap().is_none());
}

#[tokio::test]
async fn an_unknown_method_gets_the_runtimes_own_answer() {
    let proxy = TestProxy::start().await;
    let (_runtime, mut seen) = Runtime::recording(&proxy.runtime());
    let reply = proxy
        .raw()
        .await
        .unary("/runtime.v7.Future/Method", &[], frame(b"?"))
        .await;
    assert_eq!(reply.headers["grpc-status"], "12");
    assert_eq!(reply.headers["grpc-message"], "unknown method");
    assert!(reply.body.is_empty() && reply.trailers.is_none());
    assert_eq!(
        seen.recv().await.unwrap().uri.path(),
        "/runtime.v7.Future/Method"
    );
}

#[tokio::test]
async fn an_unknown_method_may_stream_both_ways() {
    let proxy = TestProxy::start().await;
    let _runtime = Runtime::start(&proxy.runtime(), async |request| {
        grpc_reply(request.into_body().map_err(Into::into).boxed())
    });
    let (sender, body) = channel();
    let client = proxy.raw().await;
    let mut reply = soon(client.send(request("/future/Echo", &[], body)))
        .await
        .unwrap()
        .into_body();
    for n in 0..20_u8 {
        sender.send(Ok(Frame::data(frame(&[n])))).unwrap();
        assert_eq!(
            soon(reply.frame())
                .await
                .unwrap()
                .unwrap()
                .into_data()
                .unwrap(),
            frame(&[n])
        );
    }
    sender.send(Ok(Frame::trailers(trailers("0")))).unwrap();
    assert_eq!(
        soon(reply.frame())
            .await
            .unwrap()
            .unwrap()
            .into_trailers()
            .unwrap(),
        trailers("0")
    );
}

#[tokio::test]
async fn large_messages_are_forwarded_both_ways() {
    let proxy = TestProxy::start().await;
    let _runtime = Runtime::start(&proxy.runtime(), async |request| {
        ok(RecordedCall::request(request).await.body)
    });
    let client = proxy.raw().await;
    for mebibytes in [16, 80] {
        let message: Vec<u8> = (0..mebibytes << 18).flat_map(u32::to_le_bytes).collect();
        let body = frame(&message);
        let reply = soon(client.unary(
            "/runtime.v1.RuntimeService/ListContainers",
            &[],
            body.clone(),
        ))
        .await;
        assert!(reply.body == body, "{mebibytes} MiB");
    }
}

#[tokio::test]
async fn a_stream_without_a_reader_delays_no_other_call() {
    let proxy = TestProxy::start().await;
    let _runtime = Runtime::start(&proxy.runtime(), async |request| {
        if request.uri().path() == VERSION {
            return ok(frame(b"1"));
        }
        let data = Bytes::from(vec![0; 32 << 20]);
        ok(data)
    });
    let client = proxy.raw().await;
    let mut unread = Vec::new();
    for _ in 0..4 {
        let body = whole(Bytes::new(), HeaderMap::new());
        unread.push(
            client
                .send(request(
                    "/runtime.v1.RuntimeService/ListEverything",
                    &[],
                    body,
                ))
                .await
                .unwrap(),
        );
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    for _ in 0..20 {
        let started = Instant::now();
        soon(client.unary(VERSION, &[], frame(b""))).await;
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{:?}",
            started.elapsed()
        );
    }
    for reply in unread {
        assert_eq!(soon(RecordedCall::reply(reply)).await.body.len(), 32 << 20);
    }
}

/// A runtime that never answers, or never ends its answer, and reports calls and their cancellation.
fn endless(
    proxy: &TestProxy,
    answers: bool,
) -> (Runtime, tokio::sync::mpsc::UnboundedReceiver<&'static str>) {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let runtime = Runtime::start(&proxy.runtime(), move |_| {
        let sender = sender.clone();
        async move {
            sender.send("called").unwrap();
            let (dropped, mut cancelled) = DropNotifier::new();
            tokio::spawn(async move {
                cancelled.recv().await;
                sender.send("cancelled").unwrap();
            });
            if !answers {
                std::future::pending::<()>().await;
            }
            let (never, body) = channel();
            never.send(Ok(Frame::data(frame(b"first")))).unwrap();
            grpc_reply(
                body.map_frame(move |frame| {
                    let _ = (&never, &dropped);
                    frame
                })
                .boxed(),
            )
        }
    });
    (runtime, receiver)
}

#[tokio::test]
async fn a_call_cancelled_before_its_answer_is_cancelled_at_the_runtime() {
    let proxy = TestProxy::start().await;
    let (_runtime, mut events) = endless(&proxy, false);
    let client = proxy.raw().await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.unary(VERSION, &[], frame(b"")).await }
    });
    assert_eq!(soon(events.recv()).await, Some("called"));
    call.abort();
    assert_eq!(soon(events.recv()).await, Some("cancelled"));
}

#[tokio::test]
async fn a_stream_dropped_by_the_caller_is_cancelled_at_the_runtime() {
    let proxy = TestProxy::start().await;
    let (_runtime, mut events) = endless(&proxy, true);
    let client = proxy.raw().await;
    let body = whole(frame(b""), HeaderMap::new());
    let mut reply = soon(client.send(request("/future/Stream", &[], body)))
        .await
        .unwrap()
        .into_body();
    assert_eq!(soon(events.recv()).await, Some("called"));
    soon(reply.frame()).await.unwrap().unwrap();
    drop(reply);
    assert_eq!(soon(events.recv()).await, Some("cancelled"));
}

#[tokio::test]
async fn calls_of_a_client_whose_connection_breaks_are_cancelled_at_the_runtime() {
    for answers in [false, true] {
        let proxy = TestProxy::start().await;
        let (_runtime, mut events) = endless(&proxy, answers);
        let client = proxy.raw().await;
        let call = tokio::spawn({
            let client = client.clone();
            async move {
                client
                    .send(request(VERSION, &[], whole(frame(b""), HeaderMap::new())))
                    .await
            }
        });
        assert_eq!(soon(events.recv()).await, Some("called"));
        // Drops only the connection, not the call.
        drop(client.connection);
        call.abort();
        assert_eq!(
            soon(events.recv()).await,
            Some("cancelled"),
            "answers: {answers}"
        );
    }
}

#[tokio::test]
async fn a_stream_that_the_runtime_resets_is_reset_with_the_same_code() {
    let proxy = TestProxy::start().await;
    let _runtime = Runtime::start(&proxy.runtime(), async |_| {
        let (sender, body) = channel();
        sender.send(Ok(Frame::data(frame(b"first")))).unwrap();
        sender
            .send(Err(h2::Error::from(h2::Reason::ENHANCE_YOUR_CALM).into()))
            .unwrap();
        grpc_reply(body)
    });
    let body = whole(frame(b""), HeaderMap::new());
    let client = proxy.raw().await;
    // The reset may arrive before the data that was sent earlier.
    let mut error = match client.send(request("/future/Stream", &[], body)).await {
        Ok(reply) => reply.into_body().collect().await.unwrap_err(),
        Err(error) => error,
    };
    let mut source: &(dyn std::error::Error + 'static) = &mut error;
    while source.downcast_ref::<h2::Error>().is_none() {
        source = source.source().expect("an HTTP/2 error");
    }
    let error = source.downcast_ref::<h2::Error>().unwrap();
    assert_eq!(error.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
}

#[tokio::test]
async fn a_runtime_that_is_away_is_unavailable_until_it_is_back() {
    let proxy = TestProxy::start().await;
    let mut cri = proxy.cri().await;
    for _ in 0..2 {
        for _ in 0..20 {
            let status = soon(cri.version(VersionRequest::default()))
                .await
                .unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            assert!(
                status.message().contains(proxy.runtime().to_str().unwrap()),
                "{status}"
            );
        }
        let (_runtime, _seen) = Runtime::recording(&proxy.runtime());
        let started = Instant::now();
        while let Err(status) = soon(cri.version(VersionRequest::default())).await {
            assert_eq!(status.code(), Code::Unavailable);
            assert!(
                started.elapsed() < Duration::from_secs(1),
                "the proxy did not reach the runtime that is back"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn the_answer_while_the_runtime_is_away_is_trailers_only() {
    let proxy = TestProxy::start().await;
    let reply = proxy.raw().await.unary(VERSION, &[], frame(b"")).await;
    assert_eq!(reply.headers["content-type"], "application/grpc");
    assert_eq!(reply.headers["grpc-status"], "14");
    assert!(reply.body.is_empty() && reply.trailers.is_none());
}

#[tokio::test]
async fn streams_end_unavailable_when_the_runtime_dies_and_the_next_call_works() {
    let proxy = TestProxy::start().await;
    let (runtime, mut events) = endless(&proxy, true);
    let mut cri = proxy.cri().await;
    let mut stream = soon(cri.get_container_events(GetEventsRequest {}))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(soon(events.recv()).await, Some("called"));
    drop(runtime);
    let status = loop {
        match soon(stream.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended without an error"),
            // The first message is not an event; only the end matters.
            Err(status) if status.code() == Code::Internal => {}
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");

    let (_runtime, _seen) = Runtime::recording(&proxy.runtime());
    soon(cri.version(VersionRequest::default())).await.unwrap();
}

#[tokio::test]
async fn calls_under_way_end_unavailable_when_the_runtime_dies() {
    let proxy = TestProxy::start().await;
    let (runtime, mut events) = endless(&proxy, false);
    let mut cri = proxy.cri().await;
    let call = tokio::spawn(async move { cri.version(VersionRequest::default()).await });
    assert_eq!(soon(events.recv()).await, Some("called"));
    drop(runtime);
    let status = soon(call).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(
        status.message().contains(proxy.runtime().to_str().unwrap()),
        "{status}"
    );
}

#[tokio::test]
async fn two_thousand_concurrent_calls_are_served() {
    let proxy = TestProxy::start().await;
    let (release, _) = tokio::sync::broadcast::channel::<()>(1);
    let waiting = release.clone();
    let _runtime = Runtime::start(&proxy.runtime(), move |request| {
        let mut released = waiting.subscribe();
        async move {
            if request.uri().path() != VERSION {
                let _ = released.recv().await;
            }
            ok(frame(b""))
        }
    });
    let client = proxy.raw().await;
    let calls: Vec<_> = (0..2000)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.unary("/future/Slow", &[], frame(b"")).await })
        })
        .collect();
    while release.receiver_count() < 2000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    soon(client.unary(VERSION, &[], frame(b""))).await;
    // Cancelling many at once must not end the connection.
    let (half, rest) = calls.split_at(1000);
    half.iter().for_each(tokio::task::JoinHandle::abort);
    while release.receiver_count() > 1000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    soon(client.unary(VERSION, &[], frame(b""))).await;
    release.send(()).unwrap();
    assert_eq!(rest.len(), 1000);
    for call in calls.into_iter().skip(1000) {
        assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    }
}
