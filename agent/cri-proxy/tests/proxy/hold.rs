//! Stop calls: the hold request, the hold, and the forwarded call.

use std::time::{Duration, Instant};

use bytes::Bytes;
use ebb_core::{
    clock::BootTime,
    ids::{ContainerId, PodUid, SandboxId},
};
use ebb_cri_proxy::ProxyOptions;
use ebb_protocol::hold::{BypassReason, BypassReport, HeldCall, HeldNames, HoldMessage};
use http::HeaderMap;
use k8s_cri::v1::{StopContainerRequest, StopPodSandboxRequest};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use super::support::*;

pub(crate) const STOP: &str = "/runtime.v1.RuntimeService/StopContainer";
pub(crate) const STOP_SANDBOX: &str = "/runtime.v1.RuntimeService/StopPodSandbox";
pub(crate) const VERSION: &str = "/runtime.v1.RuntimeService/Version";

/// A proxy with a runtime and an agent.
pub(crate) struct ProxySetup {
    pub(crate) proxy: TestProxy,
    pub(crate) client: RawClient,
    pub(crate) seen: mpsc::UnboundedReceiver<RecordedCall>,
    pub(crate) requests: mpsc::UnboundedReceiver<HoldConnection>,
    pub(crate) reports: mpsc::UnboundedReceiver<BypassReport>,
    pub(crate) agent: Option<AbortOnDropHandle<()>>,
    _runtime: Runtime,
}

impl ProxySetup {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With other options of the proxy.
    pub(crate) async fn start_with(change: impl FnOnce(&mut ProxyOptions)) -> Self {
        let proxy = TestProxy::start_with(change).await;
        let (agent, requests, reports) = agent_with_reports(&proxy.agent());
        let (runtime, seen) = Runtime::recording(&proxy.runtime());
        let client = proxy.raw().await;
        Self {
            proxy,
            client,
            seen,
            requests,
            reports,
            agent: Some(agent),
            _runtime: runtime,
        }
    }

    /// Starts a call.
    pub(crate) fn call(
        &self,
        path: &'static str,
        rpc_timeout: Option<&'static str>,
        body: Bytes,
    ) -> JoinHandle<RecordedCall> {
        let client = self.client.clone();
        tokio::spawn(async move {
            let headers: Vec<_> = rpc_timeout
                .map(|p| ("grpc-timeout", p))
                .into_iter()
                .collect();
            client.unary(path, &headers, body).await
        })
    }

    pub(crate) fn stop(&self, timeout: i64) -> JoinHandle<RecordedCall> {
        self.call(STOP, None, stop(timeout))
    }

    pub(crate) async fn next_hold(&mut self) -> HoldConnection {
        soon(self.requests.recv()).await.unwrap()
    }

    /// The next call that reaches the runtime.
    pub(crate) async fn forwarded(&mut self) -> RecordedCall {
        soon(self.seen.recv()).await.unwrap()
    }

    pub(crate) async fn forwarded_timeout(&mut self) -> i64 {
        self.forwarded()
            .await
            .decode::<StopContainerRequest>()
            .timeout
    }
}

pub(crate) fn stop(timeout: i64) -> Bytes {
    grpc_frame(&StopContainerRequest {
        container_id: "c1".into(),
        timeout,
    })
}

/// A hold message with a deadline `deadline_ms` from now.
pub(crate) fn holding(deadline_ms: u64, reserve_ms: u64) -> HoldMessage {
    HoldMessage::Holding {
        pod: PodUid::new("pod-1"),
        deadline: BootTime::now() + Duration::from_millis(deadline_ms),
        reserve_ms,
        extended: false,
        names: Some(HeldNames {
            namespace: "shop".into(),
            pod: "web-1".into(),
            container: Some("app".into()),
        }),
    }
}

pub(crate) fn assert_about(elapsed: Duration, millis: u64) {
    let expected = Duration::from_millis(millis);
    assert!(
        elapsed >= expected && elapsed < expected + Duration::from_millis(900),
        "{elapsed:?}, not {expected:?}"
    );
}

#[tokio::test]
async fn a_held_call_is_forwarded_on_release_with_reduced_timeouts() {
    let mut node = ProxySetup::start().await;
    // With fields that this version of the CRI does not have.
    let message = [
        0x0a, 2, b'c', b'1', 0x5a, 3, 1, 2, 3, 0x10, 30, 0xf8, 0x07, 1,
    ];
    let started = Instant::now();
    let call = node.call(STOP, Some("150S"), frame(&message));
    let mut agent = node.next_hold().await;
    assert_eq!(
        agent.request.call,
        HeldCall::StopContainer {
            container: ContainerId::new("c1"),
            timeout_ms: 30_000
        }
    );
    assert_eq!(agent.request.rpc_timeout_ms, Some(150_000));
    agent.send(&holding(20_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(node.seen.try_recv().is_err() && !call.is_finished());
    agent.send(&RELEASE).await;

    let forwarded = node.forwarded().await;
    let elapsed = started.elapsed();
    // The new timeout comes last, where it counts.
    let expected = [&message[..], &[0x10, 29]].concat();
    assert_eq!(forwarded.body, frame(&expected));
    let rpc_timeout = forwarded.headers["grpc-timeout"].to_str().unwrap();
    let micros: u64 = rpc_timeout
        .strip_suffix('m')
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1000;
    let left = Duration::from_micros(micros) + elapsed;
    assert!(
        left > Duration::from_secs(150) - Duration::from_millis(10),
        "{rpc_timeout} after {elapsed:?}"
    );
    assert!(
        left < Duration::from_secs(151),
        "{rpc_timeout} after {elapsed:?}"
    );
    assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    soon(agent.closed()).await;
}

#[tokio::test]
async fn the_agent_gets_the_trace_of_the_call_and_the_runtime_too() {
    let mut node = ProxySetup::start().await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let too_long = "0".repeat(129);
    for (sent, received) in [(trace, Some(trace.to_owned())), (&too_long, None)] {
        let headers = [("traceparent", sent)];
        let call = node.client.unary(STOP, &headers, stop(30));
        let answer = async {
            let mut agent = node.requests.recv().await.unwrap();
            assert_eq!(agent.request.traceparent, received);
            let why = "not-terminating".into();
            agent.send(&HoldMessage::Forward { why }).await;
        };
        soon(async { tokio::join!(call, answer) }).await;
        assert_eq!(node.forwarded().await.headers["traceparent"], sent);
    }
}

#[tokio::test]
async fn the_content_length_matches_a_changed_message() {
    let mut node = ProxySetup::start().await;
    // This client sends a content-length.
    let call = node.stop(128);
    let mut agent = node.next_hold().await;
    agent.send(&holding(20_000, 5_000)).await;
    agent.send(&RELEASE).await;
    let forwarded = node.forwarded().await;
    assert_eq!(
        forwarded.headers["content-length"],
        forwarded.body.len().to_string()
    );
    assert_eq!(forwarded.decode::<StopContainerRequest>().timeout, 128);
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_stop_is_held_and_its_message_unchanged() {
    let mut node = ProxySetup::start().await;
    let body = grpc_frame(&StopPodSandboxRequest {
        pod_sandbox_id: "s1".into(),
    });
    let call = node.call(STOP_SANDBOX, Some("120S"), body.clone());
    let mut agent = node.next_hold().await;
    assert_eq!(
        agent.request.call,
        HeldCall::StopPodSandbox {
            sandbox: SandboxId::new("s1")
        }
    );
    agent.send(&holding(20_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(node.seen.try_recv().is_err());
    agent.send(&RELEASE).await;
    assert_eq!(node.forwarded().await.body, body);
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_stop_is_forwarded_before_its_rpc_deadline() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let body = grpc_frame(&StopPodSandboxRequest {
        pod_sandbox_id: "s1".into(),
    });
    let _call = node.call(STOP_SANDBOX, Some("2500m"), body);
    let mut agent = node.next_hold().await;
    agent.send(&holding(60_000, 5_000)).await;
    let forwarded = node.forwarded().await;
    assert_about(started.elapsed(), 500);
    assert!(forwarded.headers["grpc-timeout"].to_str().unwrap() <= "2000000u");
}

#[tokio::test]
async fn a_call_that_the_agent_does_not_hold_is_forwarded_untouched() {
    for answer in [
        HoldMessage::Forward {
            why: "not-terminating".into(),
        },
        RELEASE,
    ] {
        let mut node = ProxySetup::start().await;
        let _call = node.call(STOP, Some("99999999u"), stop(30));
        node.next_hold().await.send(&answer).await;
        let forwarded = node.forwarded().await;
        assert_eq!(forwarded.body, stop(30));
        assert_eq!(forwarded.headers["grpc-timeout"], "99999999u");
    }
}

#[tokio::test]
async fn a_forced_kill_is_forwarded_without_a_hold_request() {
    let mut node = ProxySetup::start().await;
    for timeout in [0, 1, 2, -5] {
        soon(node.stop(timeout)).await.unwrap();
        assert_eq!(node.forwarded_timeout().await, timeout);
    }
    // A call whose RPC deadline is near, too.
    soon(node.call(STOP, Some("2S"), stop(30))).await.unwrap();
    assert_eq!(node.forwarded_timeout().await, 30);
    assert!(node.requests.try_recv().is_err());
    // The proxy reports each of them to the agent, for `ebb explain`, in any order.
    let mut reported = Vec::new();
    for _ in 0..5 {
        let report = soon(node.reports.recv()).await.unwrap();
        let HeldCall::StopContainer { timeout_ms, .. } = report.call else {
            panic!("{report:?}");
        };
        assert_eq!(report.why, BypassReason::NoTime);
        reported.push(timeout_ms);
    }
    reported.sort_unstable();
    assert_eq!(reported, [0, 0, 1_000, 2_000, 30_000]);
}

#[tokio::test]
async fn the_reserve_is_kept_whatever_deadline_the_agent_names() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let _call = node.stop(3);
    let mut agent = node.next_hold().await;
    agent.send(&holding(u64::MAX, 2_000)).await;
    assert_eq!(node.forwarded_timeout().await, 2);
    assert_about(started.elapsed(), 1000);
    soon(agent.closed()).await;
}

#[tokio::test]
async fn the_agents_deadline_ends_a_hold_without_a_release_message() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let _call = node.stop(30);
    let mut agent = node.next_hold().await;
    agent.send(&holding(400, 5_000)).await;
    assert_eq!(node.forwarded_timeout().await, 30);
    assert_about(started.elapsed(), 400);
}

#[tokio::test]
async fn a_hold_ends_before_a_short_rpc_deadline() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let _call = node.call(STOP, Some("3500m"), stop(30));
    let mut agent = node.next_hold().await;
    agent.send(&holding(60_000, 1_000)).await;
    // The forwarded timeout ends before the RPC deadline, too, but is not less than the reserve.
    assert_eq!(node.forwarded_timeout().await, 1);
    assert_about(started.elapsed(), 500);
}

#[tokio::test]
async fn an_extended_hold_exceeds_its_timeout_but_not_its_rpc_deadline() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let _call = node.call(STOP, Some("7500m"), stop(3));
    let mut agent = node.next_hold().await;
    agent
        .send(&HoldMessage::Holding {
            pod: PodUid::new("pod-1"),
            deadline: BootTime::now() + Duration::from_secs(60),
            reserve_ms: 1_000,
            extended: true,
            names: None,
        })
        .await;
    assert_eq!(node.forwarded_timeout().await, 1);
    // 7.5 s less a margin of 2 s and a reserve of 1 s.
    assert_about(started.elapsed(), 4_500);
}

#[tokio::test]
async fn extreme_reserves_and_timeouts_are_handled() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let _call = node.stop(30);
    let mut agent = node.next_hold().await;
    agent.send(&holding(u64::MAX, u64::MAX)).await;
    assert_eq!(node.forwarded_timeout().await, 30);
    assert!(started.elapsed() < Duration::from_millis(500));

    let call = node.stop(i64::MAX);
    let mut agent = node.next_hold().await;
    agent.send(&holding(u64::MAX, 0)).await;
    agent.send(&RELEASE).await;
    assert_eq!(node.forwarded_timeout().await, i64::MAX);
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_caller_that_cancels_or_disconnects_ends_its_hold() {
    let mut node = ProxySetup::start().await;
    // The caller cancels a held call,
    let call = node.stop(30);
    let mut agent = node.next_hold().await;
    agent.send(&holding(20_000, 5_000)).await;
    call.abort();
    soon(agent.closed()).await;
    // or a call before the agent's answer,
    let call = node.stop(30);
    let mut agent = node.next_hold().await;
    call.abort();
    soon(agent.closed()).await;
    // or closes its connection.
    let other = node.proxy.raw().await;
    let call = tokio::spawn({
        let other = other.clone();
        async move {
            other
                .send(request(STOP, &[], whole(stop(30), HeaderMap::new())))
                .await
        }
    });
    let mut agent = node.next_hold().await;
    agent.send(&holding(20_000, 5_000)).await;
    drop(other.connection);
    drop(other.sender);
    call.abort();
    soon(agent.closed()).await;
    assert!(node.seen.try_recv().is_err(), "nothing was forwarded");
}

#[tokio::test]
async fn three_hundred_concurrent_holds_delay_no_other_call() {
    let mut node = ProxySetup::start().await;
    let calls: Vec<_> = (0..300).map(|_| node.stop(30)).collect();
    let mut agents = Vec::new();
    for _ in 0..300 {
        let mut agent = node.next_hold().await;
        agent.send(&holding(20_000, 5_000)).await;
        agents.push(agent);
    }
    for _ in 0..20 {
        let started = Instant::now();
        soon(node.client.unary(VERSION, &[], frame(b""))).await;
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{:?}",
            started.elapsed()
        );
        assert_eq!(node.forwarded().await.uri.path(), VERSION);
    }
    assert!(calls.iter().all(|call| !call.is_finished()));
    for agent in &mut agents {
        agent.send(&RELEASE).await;
    }
    for call in calls {
        assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    }
}

#[tokio::test]
async fn invalid_stop_requests_are_forwarded_unchanged() {
    let mut node = ProxySetup::start().await;
    let mut compressed = stop(30).to_vec();
    compressed[0] = 1;
    let mut cut = stop(30).to_vec();
    cut[4] += 1;
    let bodies = [
        Bytes::new(),
        Bytes::from_static(b"garbage"),
        Bytes::from_static(&[0, 255, 255, 255, 255, 1, 2, 3]),
        frame(b"\xff\xff\xff garbage"),
        frame(&[]),
        compressed.into(),
        cut.into(),
        [stop(30), stop(20)].concat().into(),
        // Larger than the proxy reads.
        frame(&vec![b'x'; 17 << 20]),
    ];
    for path in [STOP, STOP_SANDBOX] {
        for body in &bodies {
            soon(node.call(path, None, body.clone())).await.unwrap();
            assert!(
                node.forwarded().await.body == body,
                "{path} {:?}",
                &body[..body.len().min(20)]
            );
        }
    }
    assert!(node.requests.try_recv().is_err());
    // The agent counts each of them, in any order.
    let mut of_containers = 0;
    for _ in 0..2 * bodies.len() {
        let report = soon(node.reports.recv()).await.unwrap();
        assert_eq!(report.why, BypassReason::Unreadable);
        match report.call {
            HeldCall::StopContainer { container, .. } => {
                assert_eq!(container.as_str(), "");
                of_containers += 1;
            }
            HeldCall::StopPodSandbox { sandbox } => assert_eq!(sandbox.as_str(), ""),
        }
    }
    assert_eq!(of_containers, bodies.len());
}

#[tokio::test]
async fn a_stop_that_cannot_be_read_is_logged_with_the_reason() {
    let proxy = ProxyProgram::start().await;
    let (_runtime, _seen) = Runtime::recording(&proxy.at("runtime.sock"));
    let client = proxy.client().await;
    let mut compressed = stop(30).to_vec();
    compressed[0] = 1;
    for body in [Bytes::from(compressed), frame(&[])] {
        soon(client.unary(STOP, &[], body)).await;
    }
    let says = [
        "can't be read: it is compressed",
        "can't be read: its message has no id",
        "so_far=2",
    ];
    soon(async {
        while !says.iter().all(|part| proxy.log().contains(part)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_caller_gets_the_runtimes_error_about_a_stop_call() {
    let proxy = TestProxy::start().await;
    let _runtime = Runtime::start(&proxy.runtime(), async |_| {
        let mut reply = unimplemented();
        reply
            .headers_mut()
            .insert("grpc-status", http::HeaderValue::from_static("3"));
        reply
    });
    let reply = proxy
        .raw()
        .await
        .unary(STOP, &[], Bytes::from_static(b"garbage"))
        .await;
    assert_eq!(reply.headers["grpc-status"], "3");
}
