//! Calls during the stop of an agent and after it, and their continuation with the next agent.

use std::time::{Duration, Instant};

use ebb_core::{clock::BootTime, release::ReleaseReason};
use ebb_protocol::hold::{BypassReason, HoldMessage, HoldRequest, format_stop_note, stop_note};
use k8s_cri::v1::StopPodSandboxRequest;

use super::{hold::*, support::*};

const STOPPED: HoldMessage = HoldMessage::Release {
    reason: ReleaseReason::Shutdown,
    held_ms: 1,
};

impl ProxySetup {
    /// The agent stops: it sends `release: shutdown` to the hold, and ends.
    async fn stop_agent(&mut self, mut holds: HoldConnection) {
        drop(self.agent.take());
        std::fs::remove_file(self.proxy.agent()).unwrap();
        holds.send(&STOPPED).await;
    }

    /// The agent stops while it has no request. `ago`: how long that is in the past.
    fn leave_note(&mut self, ago: Duration) {
        drop(self.agent.take());
        std::fs::remove_file(self.proxy.agent()).unwrap();
        let note = format_stop_note(BootTime::now().before(ago));
        std::fs::write(stop_note(&self.proxy.agent()), note).unwrap();
    }

    /// Starts another agent in its place.
    fn start_agent(&mut self) {
        let (agent, requests, reports) = agent_with_reports(&self.proxy.agent());
        (self.agent, self.requests, self.reports) = (Some(agent), requests, reports);
    }

    /// Starts a stop that is held.
    async fn held(
        &mut self,
        timeout: i64,
        terms: HoldMessage,
    ) -> (tokio::task::JoinHandle<RecordedCall>, HoldConnection) {
        let call = self.stop(timeout);
        let mut agent = self.next_hold().await;
        assert!(!agent.request.resumed);
        agent.send(&terms).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        (call, agent)
    }
}

#[tokio::test]
async fn a_hold_continues_with_the_next_agent_after_one_has_stopped() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let (call, agent) = node.held(30, holding(20_000, 5_000)).await;
    let first = agent.request.clone();
    node.stop_agent(agent).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(
        node.seen.try_recv().is_err(),
        "it stays held while no agent runs"
    );
    node.start_agent();
    let mut successor = node.next_hold().await;
    // The same hold request, with the original arrival.
    assert!(successor.request.resumed && first.arrived.is_some());
    let resumed = HoldRequest {
        resumed: true,
        ..first
    };
    assert_eq!(successor.request, resumed);
    successor.send(&holding(18_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(node.seen.try_recv().is_err() && !call.is_finished());
    successor.send(&RELEASE).await;
    let left = node.forwarded_timeout().await;
    let held = i64::try_from(started.elapsed().as_secs()).unwrap();
    assert!(
        left == 30 - held || left == 31 - held,
        "{left} s after {held} s"
    );
    soon(call).await.unwrap();
}

#[tokio::test]
async fn without_a_next_agent_in_time_the_call_is_forwarded_with_reduced_timeouts() {
    let mut node =
        ProxySetup::start_with(|o| o.agent_restart_within = Duration::from_secs(1)).await;
    let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
    let stopped = Instant::now();
    node.stop_agent(agent).await;
    assert_eq!(node.forwarded_timeout().await, 29);
    assert_about(stopped.elapsed(), 1000);
}

#[tokio::test]
async fn with_a_restart_time_of_zero_the_call_is_forwarded_at_once() {
    let mut node = ProxySetup::start_with(|o| o.agent_restart_within = Duration::ZERO).await;
    let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
    let stopped = Instant::now();
    node.stop_agent(agent).await;
    assert_eq!(node.forwarded_timeout().await, 30);
    assert_about(stopped.elapsed(), 0);
}

#[tokio::test]
async fn the_wait_for_the_next_agent_ends_at_the_first_deadline_or_the_calls_own_limit() {
    for (timeout, terms, left) in [
        (30, holding(1_000, 5_000), 29),
        (3, holding(60_000, 2_000), 2),
    ] {
        let mut node = ProxySetup::start().await;
        let started = Instant::now();
        let (_call, agent) = node.held(timeout, terms).await;
        node.stop_agent(agent).await;
        assert_eq!(node.forwarded_timeout().await, left);
        assert_about(started.elapsed(), 1000);
    }
}

#[tokio::test]
async fn a_next_agent_with_a_later_deadline_does_not_move_the_first_deadline() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let (_call, agent) = node.held(30, holding(2_000, 5_000)).await;
    node.stop_agent(agent).await;
    node.start_agent();
    let mut successor = node.next_hold().await;
    successor.send(&holding(60_000, 1_000)).await;
    assert_eq!(node.forwarded_timeout().await, 28);
    assert_about(started.elapsed(), 2000);
    soon(successor.closed()).await;
}

#[tokio::test]
async fn if_the_next_agent_does_not_hold_or_dies_the_call_is_forwarded_with_reduced_timeouts() {
    for answer in [
        Some(HoldMessage::Forward {
            why: "exited".into(),
        }),
        Some(RELEASE),
        None,
    ] {
        let mut node = ProxySetup::start().await;
        let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
        node.stop_agent(agent).await;
        node.start_agent();
        let mut successor = node.next_hold().await;
        match answer {
            Some(answer) => successor.send(&answer).await,
            None => {
                successor.send(&holding(18_000, 5_000)).await;
                drop(successor);
            }
        }
        assert_eq!(node.forwarded_timeout().await, 30);
    }
}

#[tokio::test]
async fn a_hold_outlasts_several_agents() {
    let mut node = ProxySetup::start().await;
    let (call, mut agent) = node.held(30, holding(20_000, 5_000)).await;
    for _ in 0..3 {
        node.stop_agent(agent).await;
        node.start_agent();
        // The old agent may still answer while it stops.
        let mut early = node.next_hold().await;
        early.send(&STOPPED).await;
        agent = node.next_hold().await;
        agent.send(&holding(18_000, 5_000)).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(node.seen.try_recv().is_err());
    agent.send(&RELEASE).await;
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_stops_while_it_waits_for_the_next_agent_forwards_at_once() {
    let mut node = ProxySetup::start().await;
    let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
    node.stop_agent(agent).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let stopped = Instant::now();
    node.proxy.shutdown.cancel();
    assert_eq!(node.forwarded_timeout().await, 30);
    assert_about(stopped.elapsed(), 0);
    soon(&mut node.proxy.serving).await.unwrap();
}

#[tokio::test]
async fn a_call_that_is_cancelled_during_the_wait_for_the_next_agent_is_not_requested_again() {
    let mut node = ProxySetup::start().await;
    let (call, agent) = node.held(30, holding(20_000, 5_000)).await;
    node.stop_agent(agent).await;
    call.abort();
    tokio::time::sleep(Duration::from_millis(100)).await;
    node.start_agent();
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert!(node.requests.try_recv().is_err());
    assert!(node.seen.try_recv().is_err());
}

#[tokio::test]
async fn a_call_whose_agent_stops_before_it_has_decided_is_decided_by_the_next_agent() {
    for answer in [
        holding(20_000, 5_000),
        HoldMessage::Forward {
            why: "not-terminating".into(),
        },
    ] {
        let mut node = ProxySetup::start().await;
        let call = node.stop(30);
        let agent = node.next_hold().await;
        let first = agent.request.clone();
        node.stop_agent(agent).await;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert!(node.seen.try_recv().is_err() && !call.is_finished());
        node.start_agent();
        let mut successor = node.next_hold().await;
        // Not resumed: no agent has held it.
        assert_eq!(successor.request, first);
        let is_held = matches!(answer, HoldMessage::Holding { .. });
        successor.send(&answer).await;
        if is_held {
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(node.seen.try_recv().is_err() && !call.is_finished());
            successor.send(&RELEASE).await;
        }
        let left = node.forwarded_timeout().await;
        assert!(
            (25..30).contains(&left),
            "{left} s: the wait is not subtracted"
        );
        soon(call).await.unwrap();
    }
}

#[tokio::test]
async fn a_call_that_arrives_between_two_agents_is_held_by_the_next() {
    let mut node = ProxySetup::start().await;
    node.leave_note(Duration::from_secs(2));
    let call = node.stop(30);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(node.seen.try_recv().is_err() && !call.is_finished());
    node.start_agent();
    let mut agent = node.next_hold().await;
    assert!(!agent.request.resumed);
    agent.send(&holding(20_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(node.seen.try_recv().is_err());
    agent.send(&RELEASE).await;
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_call_that_arrives_after_the_agent_told_another_call_that_it_stops_waits_too() {
    let mut node = ProxySetup::start().await;
    let (held, agent) = node.held(30, holding(20_000, 5_000)).await;
    node.stop_agent(agent).await;
    let call = node.stop(30);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(node.seen.try_recv().is_err());
    node.start_agent();
    for _ in 0..2 {
        node.next_hold().await.send(&RELEASE).await;
    }
    soon(held).await.unwrap();
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_call_waits_for_the_next_agent_no_longer_than_its_own_timeouts_allow() {
    let mut node = ProxySetup::start().await;
    node.leave_note(Duration::ZERO);
    let started = Instant::now();
    // 3 s less a reserve of a second.
    let call = node.stop(3);
    assert_eq!(node.forwarded_timeout().await, 1);
    assert_about(started.elapsed(), 2000);
    soon(call).await.unwrap();
    node.start_agent();
    let report = soon(node.reports.recv()).await.unwrap();
    assert_eq!(report.why, BypassReason::AgentAway);
}

#[tokio::test]
async fn a_call_does_not_wait_for_an_agent_that_stopped_long_ago_or_crashed() {
    // With the longer times a test on a busy machine still tells a wait from none.
    let mut node = ProxySetup::start().await;
    node.leave_note(Duration::from_secs(11));
    let started = Instant::now();
    soon(node.stop(30)).await.unwrap();
    assert_eq!(node.forwarded_timeout().await, 30);
    // A note from before the last boot.
    let ahead = BootTime::now() + Duration::from_secs(3600);
    std::fs::write(stop_note(&node.proxy.agent()), format_stop_note(ahead)).unwrap();
    soon(node.stop(30)).await.unwrap();
    // A crashed agent leaves none.
    std::fs::remove_file(stop_note(&node.proxy.agent())).unwrap();
    soon(node.stop(30)).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));

    let mut node = ProxySetup::start_with(|o| o.agent_restart_within = Duration::ZERO).await;
    node.leave_note(Duration::ZERO);
    let started = Instant::now();
    soon(node.stop(30)).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_sandbox_stop_that_finds_no_agent_does_not_wait_for_the_next() {
    let mut node = ProxySetup::start().await;
    node.leave_note(Duration::ZERO);
    let started = Instant::now();
    // It may be the sandbox of the agent that has stopped, and the next agent starts only after it.
    let body = grpc_frame(&StopPodSandboxRequest {
        pod_sandbox_id: "s1".into(),
    });
    soon(node.call(STOP_SANDBOX, None, body)).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(node.forwarded().await.uri.path(), STOP_SANDBOX);
}
