//! Stop calls: asking the agent, holding, and what is forwarded.

use std::time::{Duration, Instant};

use bytes::Bytes;
use ebb::{
    hold::{
        cri_proxy::ProxyOptions,
        wire::{HeldCall, HoldMessage, PassedNotice},
    },
    ids::{ContainerId, PodUid, SandboxId},
};
use http::HeaderMap;
use k8s_cri::v1::{StopContainerRequest, StopPodSandboxRequest};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use super::support::*;

pub(crate) const STOP: &str = "/runtime.v1.RuntimeService/StopContainer";
pub(crate) const STOP_SANDBOX: &str = "/runtime.v1.RuntimeService/StopPodSandbox";
pub(crate) const VERSION: &str = "/runtime.v1.RuntimeService/Version";

/// A proxy with a runtime and an agent.
pub(crate) struct Node {
    pub(crate) proxy: Proxy,
    pub(crate) client: RawClient,
    pub(crate) seen: mpsc::UnboundedReceiver<Seen>,
    pub(crate) asked: mpsc::UnboundedReceiver<Conversation>,
    pub(crate) told: mpsc::UnboundedReceiver<PassedNotice>,
    pub(crate) agent: Option<AbortOnDropHandle<()>>,
    _runtime: Runtime,
}

impl Node {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With other options of the proxy.
    pub(crate) async fn start_with(change: impl FnOnce(&mut ProxyOptions)) -> Self {
        let proxy = Proxy::start_with(change).await;
        let (agent, asked, told) = agent_with_notices(&proxy.agent());
        let (runtime, seen) = Runtime::recording(&proxy.runtime());
        let client = proxy.raw().await;
        Self {
            proxy,
            client,
            seen,
            asked,
            told,
            agent: Some(agent),
            _runtime: runtime,
        }
    }

    /// Begins a call.
    pub(crate) fn call(
        &self,
        path: &'static str,
        patience: Option<&'static str>,
        body: Bytes,
    ) -> JoinHandle<Seen> {
        let client = self.client.clone();
        tokio::spawn(async move {
            let headers: Vec<_> = patience.map(|p| ("grpc-timeout", p)).into_iter().collect();
            client.unary(path, &headers, body).await
        })
    }

    pub(crate) fn stop(&self, timeout: i64) -> JoinHandle<Seen> {
        self.call(STOP, None, stop(timeout))
    }

    pub(crate) async fn conversation(&mut self) -> Conversation {
        soon(self.asked.recv()).await.unwrap()
    }

    /// The call that has reached the runtime by now.
    pub(crate) async fn forwarded(&mut self) -> Seen {
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

pub(crate) fn holding(deadline_ms: u64, reserve_ms: u64) -> HoldMessage {
    HoldMessage::Holding {
        pod: PodUid::new("pod-1"),
        deadline_ms,
        reserve_ms,
        extended: false,
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
async fn a_held_call_is_forwarded_on_release_with_the_time_taken_off() {
    let mut node = Node::start().await;
    // With fields that this version of the CRI does not have.
    let message = [
        0x0a, 2, b'c', b'1', 0x5a, 3, 1, 2, 3, 0x10, 30, 0xf8, 0x07, 1,
    ];
    let started = Instant::now();
    let call = node.call(STOP, Some("150S"), frame(&message));
    let mut agent = node.conversation().await;
    assert_eq!(
        agent.request.call,
        HeldCall::StopContainer {
            container: ContainerId::new("c1"),
            timeout_ms: 30_000
        }
    );
    assert_eq!(agent.request.caller_patience_ms, Some(150_000));
    agent.say(&holding(20_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(node.seen.try_recv().is_err() && !call.is_finished());
    agent.say(&RELEASE).await;

    let forwarded = node.forwarded().await;
    let elapsed = started.elapsed();
    let expected = [
        0x0a, 2, b'c', b'1', 0x5a, 3, 1, 2, 3, 0x10, 28, 0xf8, 0x07, 1,
    ];
    assert_eq!(forwarded.body, frame(&expected));
    let patience = forwarded.headers["grpc-timeout"].to_str().unwrap();
    let micros: u64 = patience.strip_suffix('m').unwrap().parse::<u64>().unwrap() * 1000;
    let left = Duration::from_micros(micros) + elapsed;
    assert!(
        left > Duration::from_secs(150) - Duration::from_millis(10),
        "{patience} after {elapsed:?}"
    );
    assert!(
        left < Duration::from_secs(151),
        "{patience} after {elapsed:?}"
    );
    assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    soon(agent.closed()).await;
}

#[tokio::test]
async fn a_shorter_message_has_its_length_right_where_that_is_said_elsewhere() {
    let mut node = Node::start().await;
    // 128 takes two bytes, 127 one; this client sends a content-length.
    let call = node.stop(128);
    let mut agent = node.conversation().await;
    agent.say(&holding(20_000, 5_000)).await;
    agent.say(&RELEASE).await;
    let forwarded = node.forwarded().await;
    assert_eq!(
        forwarded.headers["content-length"],
        forwarded.body.len().to_string()
    );
    assert_eq!(forwarded.body, stop(127));
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_is_held_too_and_its_message_stays() {
    let mut node = Node::start().await;
    let body = grpc_frame(&StopPodSandboxRequest {
        pod_sandbox_id: "s1".into(),
    });
    let call = node.call(STOP_SANDBOX, Some("120S"), body.clone());
    let mut agent = node.conversation().await;
    assert_eq!(
        agent.request.call,
        HeldCall::StopPodSandbox {
            sandbox: SandboxId::new("s1")
        }
    );
    agent.say(&holding(20_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(node.seen.try_recv().is_err());
    agent.say(&RELEASE).await;
    assert_eq!(node.forwarded().await.body, body);
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_is_forwarded_before_its_caller_gives_up() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let body = grpc_frame(&StopPodSandboxRequest {
        pod_sandbox_id: "s1".into(),
    });
    let _call = node.call(STOP_SANDBOX, Some("2500m"), body);
    let mut agent = node.conversation().await;
    agent.say(&holding(60_000, 5_000)).await;
    let forwarded = node.forwarded().await;
    assert_about(started.elapsed(), 500);
    assert!(forwarded.headers["grpc-timeout"].to_str().unwrap() <= "2000000u");
}

#[tokio::test]
async fn what_the_agent_lets_pass_is_forwarded_untouched() {
    for answer in [
        HoldMessage::Pass {
            why: "not-terminating".into(),
        },
        RELEASE,
    ] {
        let mut node = Node::start().await;
        let _call = node.call(STOP, Some("99999999u"), stop(30));
        node.conversation().await.say(&answer).await;
        let forwarded = node.forwarded().await;
        assert_eq!(forwarded.body, stop(30));
        assert_eq!(forwarded.headers["grpc-timeout"], "99999999u");
    }
}

#[tokio::test]
async fn a_forced_kill_is_never_asked_about() {
    let mut node = Node::start().await;
    for timeout in [0, 1, 2, -5] {
        soon(node.stop(timeout)).await.unwrap();
        assert_eq!(node.forwarded_timeout().await, timeout);
    }
    // Nor is a call whose caller is about to leave.
    soon(node.call(STOP, Some("2S"), stop(30))).await.unwrap();
    assert_eq!(node.forwarded_timeout().await, 30);
    assert!(node.asked.try_recv().is_err());
    // The agent is told of each of them, for `ebb explain`, in whichever order.
    let mut told = Vec::new();
    for _ in 0..5 {
        let notice = soon(node.told.recv()).await.unwrap();
        let HeldCall::StopContainer { timeout_ms, .. } = notice.call else {
            panic!("{notice:?}");
        };
        assert_eq!(notice.why, "no-time");
        told.push(timeout_ms);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 0, 1_000, 2_000, 30_000]);
}

#[tokio::test]
async fn an_agent_that_ends_without_an_answer_lets_the_call_pass_and_is_told_of_it_later() {
    let mut node = Node::start().await;
    let _call = node.stop(30);
    drop(node.conversation().await);
    assert_eq!(node.forwarded_timeout().await, 30);
    let notice = soon(node.told.recv()).await.unwrap();
    assert_eq!(notice.why, "agent-away");
}

#[tokio::test]
async fn without_an_agent_calls_pass_at_once() {
    let mut node = Node::start().await;
    // First with its socket left behind, then without.
    drop(node.agent.take());
    for _ in 0..2 {
        let started = Instant::now();
        soon(node.stop(30)).await.unwrap();
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{:?}",
            started.elapsed()
        );
        assert_eq!(node.forwarded_timeout().await, 30);
        let _ = std::fs::remove_file(node.proxy.agent());
    }
}

#[tokio::test]
async fn a_silent_agent_is_waited_for_no_longer_than_its_time() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let _call = node.stop(30);
    let mut agent = node.conversation().await;
    // The whole takes no longer than the timeout it was given.
    assert_eq!(node.forwarded_timeout().await, 27);
    assert_about(started.elapsed(), 2500);
    soon(agent.closed()).await;
}

#[tokio::test]
async fn what_is_not_held_after_a_second_of_asking_goes_on_with_what_is_left() {
    let mut node = Node::start().await;
    for (timeout, after, left) in [(30, 1200, 28), (3, 1800, 1), (30, 200, 30)] {
        let _call = node.call(STOP, Some("150S"), stop(timeout));
        let mut agent = node.conversation().await;
        tokio::time::sleep(Duration::from_millis(after)).await;
        let why = "not-terminating".into();
        agent.say(&HoldMessage::Pass { why }).await;
        let forwarded = node.forwarded().await;
        assert_eq!(forwarded.decode::<StopContainerRequest>().timeout, left);
        let is_whole = forwarded.headers["grpc-timeout"] == "150S";
        assert_eq!(is_whole, left == timeout, "after {after} ms");
    }
}

#[tokio::test]
async fn an_agent_that_makes_no_sense_is_ignored() {
    for nonsense in [
        "moo\n",
        "{\"type\":\"maybe\"}\n",
        "{}\n",
        "[]\n",
        "{\"type\":\"holding\",\"pod\":7}\n",
    ] {
        let mut node = Node::start().await;
        let started = Instant::now();
        let _call = node.stop(30);
        node.conversation().await.say_raw(nonsense).await;
        assert_eq!(node.forwarded_timeout().await, 30, "{nonsense}");
        assert!(started.elapsed() < Duration::from_millis(900), "{nonsense}");
    }
    let mut node = Node::start().await;
    let _call = node.stop(30);
    node.conversation()
        .await
        .say_raw(&"x".repeat(100_000))
        .await;
    assert_eq!(node.forwarded_timeout().await, 30);
}

#[tokio::test]
async fn an_agent_that_dies_or_goes_mad_during_a_hold_ends_it() {
    for madness in [None, Some("moo\n")] {
        let mut node = Node::start().await;
        let _call = node.stop(30);
        let mut agent = node.conversation().await;
        agent.say(&holding(20_000, 5_000)).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(node.seen.try_recv().is_err());
        let ended = Instant::now();
        match madness {
            None => drop(agent),
            Some(line) => agent.say_raw(line).await,
        }
        assert_eq!(node.forwarded_timeout().await, 29, "{madness:?}");
        assert!(ended.elapsed() < Duration::from_millis(500));
    }
}

#[tokio::test]
async fn the_reserve_is_left_whatever_the_agent_says() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let _call = node.stop(3);
    let mut agent = node.conversation().await;
    agent.say(&holding(u64::MAX, 2_000)).await;
    assert_eq!(node.forwarded_timeout().await, 2);
    assert_about(started.elapsed(), 1000);
    soon(agent.closed()).await;
}

#[tokio::test]
async fn the_agents_deadline_ends_a_hold_without_its_word() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let _call = node.stop(30);
    let mut agent = node.conversation().await;
    agent.say(&holding(400, 5_000)).await;
    assert_eq!(node.forwarded_timeout().await, 29);
    assert_about(started.elapsed(), 400);
}

#[tokio::test]
async fn a_hold_ends_in_time_for_an_impatient_caller() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let _call = node.call(STOP, Some("3500m"), stop(30));
    let mut agent = node.conversation().await;
    agent.say(&holding(60_000, 1_000)).await;
    // What is forwarded ends in time, too, down to the reserve.
    assert_eq!(node.forwarded_timeout().await, 1);
    assert_about(started.elapsed(), 500);
}

#[tokio::test]
async fn a_hold_that_the_agent_extends_outlasts_its_timeout_and_not_its_caller() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let _call = node.call(STOP, Some("7500m"), stop(3));
    let mut agent = node.conversation().await;
    agent
        .say(&HoldMessage::Holding {
            pod: PodUid::new("pod-1"),
            deadline_ms: 60_000,
            reserve_ms: 1_000,
            extended: true,
        })
        .await;
    assert_eq!(node.forwarded_timeout().await, 1);
    // 7.5 s less a margin of 2 s and a reserve of 1 s.
    assert_about(started.elapsed(), 4_500);
}

#[tokio::test]
async fn numbers_without_sense_hold_nothing() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let _call = node.stop(30);
    let mut agent = node.conversation().await;
    agent.say(&holding(u64::MAX, u64::MAX)).await;
    assert_eq!(node.forwarded_timeout().await, 30);
    assert!(started.elapsed() < Duration::from_millis(500));

    let call = node.stop(i64::MAX);
    let mut agent = node.conversation().await;
    agent.say(&holding(u64::MAX, 0)).await;
    agent.say(&RELEASE).await;
    assert_eq!(node.forwarded_timeout().await, i64::MAX - 1);
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_caller_that_goes_away_gives_its_hold_up() {
    let mut node = Node::start().await;
    // By cancelling the call …
    let call = node.stop(30);
    let mut agent = node.conversation().await;
    agent.say(&holding(20_000, 5_000)).await;
    call.abort();
    soon(agent.closed()).await;
    // … while it is still being asked about …
    let call = node.stop(30);
    let mut agent = node.conversation().await;
    call.abort();
    soon(agent.closed()).await;
    // … and by closing its connection.
    let other = node.proxy.raw().await;
    let call = tokio::spawn({
        let other = other.clone();
        async move {
            other
                .send(request(STOP, &[], whole(stop(30), HeaderMap::new())))
                .await
        }
    });
    let mut agent = node.conversation().await;
    agent.say(&holding(20_000, 5_000)).await;
    drop(other.connection);
    drop(other.sender);
    call.abort();
    soon(agent.closed()).await;
    assert!(node.seen.try_recv().is_err(), "nothing was forwarded");
}

#[tokio::test]
async fn three_hundred_holds_at_once_delay_nobody() {
    let mut node = Node::start().await;
    let calls: Vec<_> = (0..300).map(|_| node.stop(30)).collect();
    let mut agents = Vec::new();
    for _ in 0..300 {
        let mut agent = node.conversation().await;
        agent.say(&holding(20_000, 5_000)).await;
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
        agent.say(&RELEASE).await;
    }
    for call in calls {
        assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    }
}

#[tokio::test]
async fn what_is_no_stop_call_inside_is_left_to_the_runtime() {
    let mut node = Node::start().await;
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
        // Larger than anything that is read before it is forwarded.
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
    assert!(node.asked.try_recv().is_err());
}

#[tokio::test]
async fn the_runtimes_error_about_a_stop_call_reaches_the_caller() {
    let proxy = Proxy::start().await;
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

#[tokio::test]
async fn a_proxy_that_is_stopped_forwards_what_it_holds_and_is_gone_in_two_seconds() {
    let mut node = Node::start().await;
    let held = node.stop(30);
    let mut agent = node.conversation().await;
    agent.say(&holding(20_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;

    let started = Instant::now();
    node.proxy.shutdown.cancel();
    assert_eq!(node.forwarded_timeout().await, 29);
    assert_eq!(soon(held).await.unwrap().trailers, Some(trailers("0")));
    soon(&mut node.proxy.serving).await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "idle connections go at once"
    );
    assert!(!node.proxy.socket().exists());
}

#[tokio::test]
async fn a_proxy_that_is_stopped_does_not_wait_for_endless_streams() {
    let mut proxy = Proxy::start().await;
    let (dropped, mut cancelled) = Dropped::new();
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

/// A runtime whose containers take until the test says so to stop, and that answers all else.
fn slow_to_stop(proxy: &Proxy) -> (Runtime, mpsc::UnboundedReceiver<()>, mpsc::Sender<()>) {
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
async fn a_proxy_that_is_stopped_serves_on_until_a_forwarded_stop_is_answered() {
    let mut proxy = Proxy::start().await;
    let (_runtime, mut calls, stopped) = slow_to_stop(&proxy);
    let client = proxy.raw().await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.unary(STOP, &[], stop(30)).await }
    });
    soon(calls.recv()).await.unwrap();
    proxy.shutdown.cancel();
    // Much longer than a proxy that nobody waits for takes to end.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(!call.is_finished() && !proxy.serving.is_finished());
    // Nobody else has to wait meanwhile, whether connected before or not; and nobody is held.
    let (_agent, mut asked) = agent(&proxy.agent());
    soon(client.unary(VERSION, &[("grpc-timeout", "5S")], frame(b""))).await;
    let other = proxy.raw().await;
    soon(other.unary(VERSION, &[("grpc-timeout", "5S")], frame(b""))).await;
    let second = tokio::spawn(async move { other.unary(STOP, &[], stop(30)).await });
    soon(calls.recv()).await;
    assert!(
        asked.try_recv().is_err(),
        "a proxy that stops holds nothing"
    );

    stopped.send(()).await.unwrap();
    assert_eq!(soon(call).await.unwrap().trailers, Some(trailers("0")));
    assert!(!proxy.serving.is_finished(), "the second is not answered");
    stopped.send(()).await.unwrap();
    assert_eq!(soon(second).await.unwrap().trailers, Some(trailers("0")));
    soon(&mut proxy.serving).await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_is_stopped_waits_for_an_answer_no_longer_than_it_may() {
    let mut proxy =
        Proxy::start_with(|options| options.answer_within = Duration::from_millis(500)).await;
    let (_runtime, mut calls, _stopped) = slow_to_stop(&proxy);
    let client = proxy.raw().await;
    let body = whole(stop(30), HeaderMap::new());
    let call = tokio::spawn(async move { client.send(request(STOP, &[], body)).await });
    soon(calls.recv()).await.unwrap();
    proxy.shutdown.cancel();
    soon(&mut proxy.serving).await.unwrap();
    assert!(soon(call).await.unwrap().is_err());
}
