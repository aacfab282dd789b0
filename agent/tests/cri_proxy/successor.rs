//! Holds of an agent that is stopped, and what the agent that comes next makes of them.

use std::time::{Duration, Instant};

use ebb::{
    drain::report::ReleaseReason,
    hold::wire::{HoldMessage, HoldRequest},
};

use super::{hold::*, support::*};

const STOPPED: HoldMessage = HoldMessage::Release {
    reason: ReleaseReason::Shutdown,
    held_ms: 1,
};

impl Node {
    /// The agent stops politely: it says so to whoever holds, and is gone.
    async fn stop_agent(&mut self, mut holds: Conversation) {
        drop(self.agent.take());
        std::fs::remove_file(self.proxy.agent()).unwrap();
        holds.say(&STOPPED).await;
    }

    /// Another agent comes up in its place.
    fn start_agent(&mut self) {
        let (agent, asked) = agent(&self.proxy.agent());
        (self.agent, self.asked) = (Some(agent), asked);
    }

    /// Begins a stop that is held.
    async fn held(
        &mut self,
        timeout: i64,
        terms: HoldMessage,
    ) -> (tokio::task::JoinHandle<Seen>, Conversation) {
        let call = self.stop(timeout);
        let mut agent = self.conversation().await;
        assert!(!agent.request.resumed);
        agent.say(&terms).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        (call, agent)
    }
}

#[tokio::test]
async fn a_hold_goes_on_with_the_successor_of_an_agent_that_was_stopped() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let (call, agent) = node.held(30, holding(20_000, 5_000)).await;
    let first = agent.request.clone();
    node.stop_agent(agent).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(
        node.seen.try_recv().is_err(),
        "it is kept while nobody is there"
    );
    node.start_agent();
    let mut successor = node.conversation().await;
    // The same question, of the call that came then.
    assert!(successor.request.resumed && first.arrived.is_some());
    let resumed = HoldRequest {
        resumed: true,
        ..first
    };
    assert_eq!(successor.request, resumed);
    successor.say(&holding(18_000, 5_000)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(node.seen.try_recv().is_err() && !call.is_finished());
    successor.say(&RELEASE).await;
    let left = node.forwarded_timeout().await;
    let held = i64::try_from(started.elapsed().as_secs()).unwrap() + 1;
    assert!(
        left == 30 - held || left == 31 - held,
        "{left} s after {held} s"
    );
    soon(call).await.unwrap();
}

#[tokio::test]
async fn without_a_successor_in_time_the_call_goes_on_with_what_is_left() {
    let mut node = Node::start_with(|o| o.agent_restart_within = Duration::from_secs(1)).await;
    let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
    let stopped = Instant::now();
    node.stop_agent(agent).await;
    assert_eq!(node.forwarded_timeout().await, 28);
    assert_about(stopped.elapsed(), 1000);
}

#[tokio::test]
async fn a_proxy_that_is_to_wait_for_no_successor_forwards_at_once() {
    let mut node = Node::start_with(|o| o.agent_restart_within = Duration::ZERO).await;
    let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
    let stopped = Instant::now();
    node.stop_agent(agent).await;
    assert_eq!(node.forwarded_timeout().await, 29);
    assert_about(stopped.elapsed(), 0);
}

#[tokio::test]
async fn no_successor_is_waited_for_beyond_the_first_deadline_or_what_the_call_allows() {
    for (timeout, terms, left) in [
        (30, holding(1_000, 5_000), 28),
        (3, holding(60_000, 2_000), 2),
    ] {
        let mut node = Node::start().await;
        let started = Instant::now();
        let (_call, agent) = node.held(timeout, terms).await;
        node.stop_agent(agent).await;
        assert_eq!(node.forwarded_timeout().await, left);
        assert_about(started.elapsed(), 1000);
    }
}

#[tokio::test]
async fn a_successor_that_would_hold_longer_does_not_move_the_first_deadline() {
    let mut node = Node::start().await;
    let started = Instant::now();
    let (_call, agent) = node.held(30, holding(2_000, 5_000)).await;
    node.stop_agent(agent).await;
    node.start_agent();
    let mut successor = node.conversation().await;
    successor.say(&holding(60_000, 1_000)).await;
    assert_eq!(node.forwarded_timeout().await, 27);
    assert_about(started.elapsed(), 2000);
    soon(successor.closed()).await;
}

#[tokio::test]
async fn a_successor_that_does_not_hold_or_dies_lets_the_call_go_on_with_what_is_left() {
    for answer in [
        Some(HoldMessage::Pass {
            why: "exited".into(),
        }),
        Some(RELEASE),
        None,
    ] {
        let mut node = Node::start().await;
        let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
        node.stop_agent(agent).await;
        node.start_agent();
        let mut successor = node.conversation().await;
        match answer {
            Some(answer) => successor.say(&answer).await,
            None => {
                successor.say(&holding(18_000, 5_000)).await;
                drop(successor);
            }
        }
        assert_eq!(node.forwarded_timeout().await, 29);
    }
}

#[tokio::test]
async fn an_agent_can_be_stopped_again_and_again() {
    let mut node = Node::start().await;
    let (call, mut agent) = node.held(30, holding(20_000, 5_000)).await;
    for _ in 0..3 {
        node.stop_agent(agent).await;
        node.start_agent();
        // Such as the first answers of an agent that still stops.
        let mut early = node.conversation().await;
        early.say(&STOPPED).await;
        agent = node.conversation().await;
        agent.say(&holding(18_000, 5_000)).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(node.seen.try_recv().is_err());
    agent.say(&RELEASE).await;
    soon(call).await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_is_stopped_while_it_waits_for_a_successor_forwards_at_once() {
    let mut node = Node::start().await;
    let (_call, agent) = node.held(30, holding(20_000, 5_000)).await;
    node.stop_agent(agent).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let stopped = Instant::now();
    node.proxy.shutdown.cancel();
    assert_eq!(node.forwarded_timeout().await, 29);
    assert_about(stopped.elapsed(), 0);
    soon(&mut node.proxy.serving).await.unwrap();
}

#[tokio::test]
async fn a_caller_that_leaves_while_a_successor_is_waited_for_is_asked_for_no_more() {
    let mut node = Node::start().await;
    let (call, agent) = node.held(30, holding(20_000, 5_000)).await;
    node.stop_agent(agent).await;
    call.abort();
    tokio::time::sleep(Duration::from_millis(100)).await;
    node.start_agent();
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert!(node.asked.try_recv().is_err());
    assert!(node.seen.try_recv().is_err());
}
