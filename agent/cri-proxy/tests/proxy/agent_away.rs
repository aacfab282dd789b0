//! Stop calls while the agent is away, silent, or sends nonsense.

use std::time::{Duration, Instant};

use ebb_protocol::hold::{BypassReason, HoldMessage};
use k8s_cri::v1::StopContainerRequest;

use super::{hold::*, support::*};

#[tokio::test]
async fn a_call_to_an_agent_that_ends_without_an_answer_is_forwarded_and_reported_later() {
    let mut node = ProxySetup::start().await;
    let _call = node.stop(30);
    drop(node.next_hold().await);
    assert_eq!(node.forwarded_timeout().await, 30);
    let report = soon(node.reports.recv()).await.unwrap();
    assert_eq!(report.why, BypassReason::AgentAway);
}

#[tokio::test]
async fn without_an_agent_calls_are_forwarded_at_once() {
    let mut node = ProxySetup::start().await;
    // First with a stale agent socket, then without a socket.
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
async fn a_call_to_a_silent_agent_is_forwarded_after_the_first_message_timeout() {
    let mut node = ProxySetup::start().await;
    let started = Instant::now();
    let _call = node.stop(30);
    let mut agent = node.next_hold().await;
    // The whole seconds of the delay are subtracted.
    assert_eq!(node.forwarded_timeout().await, 28);
    assert_about(started.elapsed(), 2500);
    soon(agent.closed()).await;
}

#[tokio::test]
async fn a_refused_hold_request_that_took_a_second_reduces_the_timeouts() {
    let mut node = ProxySetup::start().await;
    for (timeout, after, left) in [(30, 1200, 29), (3, 1800, 2), (30, 200, 30)] {
        let _call = node.call(STOP, Some("150S"), stop(timeout));
        let mut agent = node.next_hold().await;
        tokio::time::sleep(Duration::from_millis(after)).await;
        let why = "not-terminating".into();
        agent.send(&HoldMessage::Forward { why }).await;
        let forwarded = node.forwarded().await;
        assert_eq!(forwarded.decode::<StopContainerRequest>().timeout, left);
        let is_whole = forwarded.headers["grpc-timeout"] == "150S";
        assert_eq!(is_whole, left == timeout, "after {after} ms");
    }
}

#[tokio::test]
async fn an_invalid_first_message_forwards_the_call() {
    for invalid in [
        "moo\n",
        "{\"type\":\"maybe\"}\n",
        "{}\n",
        "[]\n",
        "{\"type\":\"holding\",\"pod\":7}\n",
    ] {
        let mut node = ProxySetup::start().await;
        let started = Instant::now();
        let _call = node.stop(30);
        node.next_hold().await.send_raw(invalid).await;
        assert_eq!(node.forwarded_timeout().await, 30, "{invalid}");
        assert!(started.elapsed() < Duration::from_millis(900), "{invalid}");
    }
    let mut node = ProxySetup::start().await;
    let _call = node.stop(30);
    node.next_hold().await.send_raw(&"x".repeat(100_000)).await;
    assert_eq!(node.forwarded_timeout().await, 30);
}

#[tokio::test]
async fn an_agent_that_dies_or_sends_an_invalid_message_ends_its_hold() {
    for invalid in [None, Some("moo\n")] {
        let mut node = ProxySetup::start().await;
        let _call = node.stop(30);
        let mut agent = node.next_hold().await;
        agent.send(&holding(20_000, 5_000)).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(node.seen.try_recv().is_err());
        let ended = Instant::now();
        match invalid {
            None => drop(agent),
            Some(line) => agent.send_raw(line).await,
        }
        assert_eq!(node.forwarded_timeout().await, 30, "{invalid:?}");
        assert!(ended.elapsed() < Duration::from_millis(500));
    }
}
