//! Many calls at once.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use ebb_core::{clock::BootTime, ids::PodUid};
use ebb_protocol::hold::HoldMessage;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt;
use k8s_cri::v1::{
    ContainerEventResponse, StatusResponse, StopContainerRequest, StopContainerResponse,
};
use tokio::sync::{Semaphore, mpsc};

use super::support::*;

const STOP: &str = "/runtime.v1.RuntimeService/StopContainer";
const STATUS: &str = "/runtime.v1.RuntimeService/Status";
const EVENTS: &str = "/runtime.v1.RuntimeService/GetContainerEvents";
const SLOW: &str = "/runtime.v1.RuntimeService/ExecSync";

const IN_FLIGHT: usize = 2000;
const HELD: usize = 500;

/// Generous: a call that another call blocks would wait until the end of the test.
const AT_ONCE: Duration = Duration::from_secs(2);

type EventSender = mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>;

/// A runtime that answers Status and StopContainer at once and other calls when the test allows it, and streams
/// events.
struct BusyRuntime {
    _server: Runtime,
    begun: Arc<Semaphore>,
    answers: Arc<Semaphore>,
    events: Arc<Mutex<Vec<EventSender>>>,
}

impl BusyRuntime {
    fn start(path: &std::path::Path) -> Self {
        let begun = Arc::new(Semaphore::new(0));
        let answers = Arc::new(Semaphore::new(0));
        let events = Arc::new(Mutex::new(Vec::new()));
        let shared = (begun.clone(), answers.clone(), events.clone());
        let server = Runtime::start(path, move |request| {
            let (begun, answers, events) = shared.clone();
            async move {
                match request.uri().path() {
                    STATUS => ok(grpc_frame(&StatusResponse::default())),
                    STOP => ok(grpc_frame(&StopContainerResponse {})),
                    EVENTS => {
                        let (sender, body) = channel();
                        events.lock().unwrap().push(sender);
                        grpc_reply(body)
                    }
                    _ => {
                        begun.add_permits(1);
                        answers.acquire().await.unwrap().forget();
                        ok(frame(&[]))
                    }
                }
            }
        });
        Self {
            _server: server,
            begun,
            answers,
            events,
        }
    }

    /// Sends an event to all event streams.
    fn send_event(&self, container: &str) {
        let event = grpc_frame(&ContainerEventResponse {
            container_id: container.into(),
            ..Default::default()
        });
        for listener in self.events.lock().unwrap().iter() {
            listener.send(Ok(Frame::data(event.clone()))).unwrap();
        }
    }
}

#[tokio::test]
async fn two_thousand_calls_with_five_hundred_of_them_held_delay_neither_a_status_nor_an_event() {
    many_files();
    let program = ProxyProgram::start().await;
    let (_agent, mut requests) = agent(&program.at("agent.sock"));
    let runtime = BusyRuntime::start(&program.at("runtime.sock"));
    // All calls on one connection, like a kubelet's.
    let client = program.client().await;
    let call = |path: &'static str, body: Bytes| {
        let client = client.clone();
        tokio::spawn(async move { client.unary(path, &[("grpc-timeout", "720S")], body).await })
    };
    let listening = whole(frame(b""), HeaderMap::new());
    let listening = soon(client.send(request(EVENTS, &[], listening))).await;
    let mut events = listening.unwrap().into_body();

    let mut calls = Vec::new();
    for number in 0..IN_FLIGHT - HELD {
        calls.push(call(SLOW, frame(format!("{number}").as_bytes())));
    }
    let mut agents = Vec::new();
    for number in 0..HELD {
        let body = grpc_frame(&StopContainerRequest {
            container_id: format!("{number:064}"),
            timeout: 600,
        });
        calls.push(call(STOP, body));
    }
    for number in 0..HELD {
        let mut hold = soon(requests.recv()).await.unwrap();
        let holding = HoldMessage::Holding {
            pod: PodUid::new(format!("pod-{number}")),
            deadline: BootTime::now() + Duration::from_secs(500),
            reserve_ms: 5_000,
            extended: false,
            names: None,
        };
        hold.send(&holding).await;
        agents.push(hold);
    }
    let rest = u32::try_from(IN_FLIGHT - HELD).unwrap();
    soon(runtime.begun.acquire_many(rest))
        .await
        .unwrap()
        .forget();

    // Also for a new client.
    let other = program.client().await;
    for (round, client) in [&client, &other, &client, &other].into_iter().enumerate() {
        let started = Instant::now();
        let status = soon(client.unary(STATUS, &[], frame(b""))).await;
        assert_eq!(status.trailers, Some(trailers("0")));
        assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
        let started = Instant::now();
        runtime.send_event(&format!("{round}"));
        let event = soon(events.frame()).await.unwrap().unwrap();
        let event = event.into_data().unwrap();
        let expected = grpc_frame(&ContainerEventResponse {
            container_id: format!("{round}"),
            ..Default::default()
        });
        assert_eq!(event, expected);
        assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    }
    let unfinished = calls.iter().filter(|c| !c.is_finished()).count();
    assert_eq!(unfinished, IN_FLIGHT);

    runtime.answers.add_permits(IN_FLIGHT - HELD);
    for agent in &mut agents {
        agent.send(&RELEASE).await;
    }
    for call in calls {
        assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    }
}

#[tokio::test]
async fn a_log_without_a_reader_blocks_no_call() {
    // A pipe with a 64 KiB buffer and no reader.
    let pipe = "p=$(mktemp -u); mkfifo $p; exec 2<>$p; rm $p";
    let program = ProxyProgram::start_after(pipe).await;
    let (_runtime, _seen) = Runtime::recording(&program.at("runtime.sock"));
    let client = program.client().await;
    // Without an agent, each call logs a line.
    let body = grpc_frame(&StopContainerRequest {
        container_id: "c".repeat(64),
        timeout: 30,
    });
    for _ in 0..1500 {
        let reply = soon(client.unary(STOP, &[], body.clone())).await;
        assert_eq!(reply.trailers, Some(trailers("0")));
    }
}
