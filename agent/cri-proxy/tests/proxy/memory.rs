//! The memory of the real program.

use std::time::Duration;

use bytes::Bytes;
use ebb_core::{clock::BootTime, ids::PodUid};
use ebb_protocol::hold::HoldMessage;
use http::HeaderMap;
use http_body_util::BodyExt;

use super::support::*;

const STOP: &str = "/runtime.v1.RuntimeService/StopContainer";
const MIB: u64 = 1 << 20;

#[tokio::test]
async fn five_hundred_held_calls_need_less_than_thirty_mebibytes() {
    many_files();
    let program = ProxyProgram::start().await;
    let (_agent, mut requests) = agent(&program.at("agent.sock"));
    let (_runtime, mut seen) = Runtime::recording(&program.at("runtime.sock"));
    let client = program.client().await;
    let mut calls = Vec::new();
    let mut agents = Vec::new();
    for number in 0..500 {
        let body = grpc_frame(&k8s_cri::v1::StopContainerRequest {
            container_id: format!("{number:064}"),
            timeout: 600,
        });
        let client = client.clone();
        calls.push(tokio::spawn(async move {
            client.unary(STOP, &[("grpc-timeout", "720S")], body).await
        }));
        let mut hold = soon(requests.recv()).await.unwrap();
        let holding = HoldMessage::Holding {
            pod: PodUid::new("pod-1"),
            deadline: BootTime::now() + Duration::from_secs(500),
            reserve_ms: 5_000,
            extended: false,
            names: None,
        };
        hold.send(&holding).await;
        agents.push(hold);
    }
    // Other calls are still served.
    let version = "/runtime.v1.RuntimeService/Version";
    soon(client.unary(version, &[], frame(b""))).await;
    assert_eq!(soon(seen.recv()).await.unwrap().uri.path(), version);
    // Anonymous memory is the same in any build. A debug build's text is several times as large, so the total counts
    // only in a release build.
    let own = program.memory("RssAnon");
    let whole = program.memory("VmRSS");
    eprintln!(
        "500 held calls: {} KiB, of which anonymous: {} KiB",
        whole >> 10,
        own >> 10
    );
    assert!(own < 20 * MIB, "{} KiB", own >> 10);
    if !cfg!(debug_assertions) {
        assert!(whole < 30 * MIB, "{} KiB", whole >> 10);
    }

    for agent in &mut agents {
        agent.send(&RELEASE).await;
    }
    for call in calls {
        assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    }
}

#[tokio::test]
async fn large_replies_are_forwarded_without_being_buffered() {
    let program = ProxyProgram::start().await;
    let _runtime = Runtime::start(&program.at("runtime.sock"), async |_| {
        ok(frame(&vec![7; 80 << 20]))
    });
    let client = program.client().await;
    let before = program.memory("VmRSS");
    let call = || {
        let body = whole(frame(b""), HeaderMap::new());
        client.send(request(
            "/runtime.v1.RuntimeService/ListContainers",
            &[],
            body,
        ))
    };
    // One reply that the client reads …
    let reply = RecordedCall::reply(soon(call()).await.unwrap()).await;
    assert_eq!(reply.body.len(), (80 << 20) + 5);
    drop(reply);
    // … and four that it does not read yet: the proxy may buffer one window for each.
    let mut unread = Vec::new();
    for _ in 0..4 {
        unread.push(soon(call()).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let grown = program.memory("VmHWM").saturating_sub(before);
    eprintln!("80 MiB replies: {} KiB more", grown >> 10);
    assert!(grown < 80 * MIB, "{} KiB", grown >> 10);
    for reply in unread {
        let body: Bytes = reply.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body.len(), (80 << 20) + 5);
    }
}
