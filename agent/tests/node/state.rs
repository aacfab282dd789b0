//! The states of flows, each made by real servers and clients.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use ebb_core::{
    drain_report::ReleaseReason,
    flow::{FlowCounts, FlowState},
};
use ebb_testkit::kubelet::PodSpec;
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::Agent,
    peer::Peer,
    scene::{SECOND, Scene, eventually, queue, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("each_state_of_a_flow_is_recognised", all_states),
        trial(
            "a_slow_request_is_awaiting_until_it_is_answered_and_idle_afterwards",
            slow_request,
        ),
        trial(
            "a_flow_that_the_pod_has_closed_holds_until_the_peer_has_all_data",
            flushing,
        ),
        trial(
            "connections_in_the_accept_queue_hold_until_they_are_served",
            backlog,
        ),
    ]
}

async fn states(agent: &Agent, pod: &str) -> Result<BTreeMap<SocketAddr, FlowState>> {
    let flows = agent.flows(pod).await?;
    Ok(flows.iter().map(|f| (f.remote, f.state)).collect())
}

async fn all_states(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--idle-after", "1s"]).await?;
    let spec = PodSpec::new("states")
        .container(server("app", 8080))
        .container(queue("queue", 8081));
    let pod = scene.run(spec).await?;
    let (app, queue) = (pod.v4(8080)?, pod.v4(8081)?);

    let active = Peer::asking(app, "/stream?chunks=1000&ms=50")
        .await?
        .keep_reading();
    let awaiting = Peer::asking(app, "/slow?ms=60000").await?;
    let idle = Peer::served(app).await?;
    // The pod goes on answering after the peer has closed its sending side.
    let mut half_closed = Peer::asking(app, "/stream?chunks=1000&ms=50").await?;
    half_closed.end_sending().await?;
    let half_closed = half_closed.keep_reading();
    // More than this peer's receive buffer holds, less than the pod's send buffer holds.
    let mut flushing = Peer::narrow(app).await?;
    flushing
        .ask_and_close("/stream?chunks=1&ms=0&size=30000")
        .await?;
    // The server waits for a request on the first connection and accepts no other.
    let accepted = Peer::connect(queue).await?;
    let waiting = [
        Peer::asking(queue, "/").await?,
        Peer::asking(queue, "/").await?,
    ];

    let expected = BTreeMap::from([
        (active.address, FlowState::Active),
        (awaiting.address, FlowState::Awaiting),
        (idle.address, FlowState::Idle),
        (half_closed.address, FlowState::HalfClosed),
        (flushing.address, FlowState::Flushing),
        // The peer has sent nothing, so the pod has not answered either.
        (accepted.address, FlowState::Awaiting),
        (waiting[0].address, FlowState::Backlog),
        (waiting[1].address, FlowState::Backlog),
    ]);
    let mut last = BTreeMap::new();
    eventually("each flow is in its state", async || {
        last = states(&agent, "states").await?;
        Ok((last == expected).then_some(()))
    })
    .await
    .with_context(|| format!("expected {expected:#?}, the last list was {last:#?}"))?;
    for flow in agent.flows("states").await? {
        ensure!(flow.live == (flow.state != FlowState::Idle), "{flow:?}");
        ensure!(flow.holds, "{flow:?}");
    }
    let counts = FlowCounts {
        backlog: 2,
        active: 1,
        awaiting: 2,
        idle: 1,
        flushing: 1,
        half_closed: 1,
        lost: 0,
    };
    let view = agent.pod("states").await?;
    ensure!(view.flows == Some(counts), "{view:?}");
    ensure!(view.peers == Some(1), "{view:?}");
    ensure!(view.oldest_ms.is_some_and(|age| age > 1000), "{view:?}");
    Ok(())
}

async fn slow_request(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--idle-after", "1s"]).await?;
    let pod = scene.serve("slow").await?;
    let mut peer = Peer::asking(pod.v4(8080)?, "/slow?ms=4000").await?;
    until(&agent, &peer, FlowState::Active, &[FlowState::Backlog]).await?;
    until(&agent, &peer, FlowState::Awaiting, &[FlowState::Active]).await?;
    peer.answer("slow\n").await?;
    until(&agent, &peer, FlowState::Idle, &[FlowState::Active]).await?;
    // The next request makes the flow live again.
    peer.ask("/slow?ms=60000").await?;
    until(&agent, &peer, FlowState::Active, &[FlowState::Idle]).await
}

/// Waits until the peer's flow to the pod "slow" is in `state`. Until then it may only be in one of `before`.
async fn until(agent: &Agent, peer: &Peer, state: FlowState, before: &[FlowState]) -> Result<()> {
    eventually(state.name(), async || {
        let seen = states(agent, "slow").await?.remove(&peer.address);
        let seen = seen.context("the flow is gone")?;
        ensure!(
            seen == state || before.contains(&seen),
            "{seen} on the way to {state}"
        );
        Ok((seen == state).then_some(()))
    })
    .await
}

async fn flushing(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "200ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("flusher").await?;
    let mut peer = Peer::narrow(pod.v4(8080)?).await?;
    peer.ask_and_close("/stream?chunks=1&ms=0&size=30000")
        .await?;
    eventually("the pod closes", async || {
        let states = states(&agent, "flusher").await?;
        Ok((states.get(&peer.address) == Some(&FlowState::Flushing)).then_some(()))
    })
    .await?;

    let kubelet = scene.kubelet_at(&proxy)?;
    let stopping = tokio::spawn(async move { kubelet.stop(&pod, 30 * SECOND).await });
    let report = agent.until_draining("flusher").await?;
    ensure!(
        report.flows_at_start.is_some_and(|f| f.flushing == 1),
        "{report:?}"
    );
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with data on its way");
    let read = peer.read_to_end().await?;
    ensure!(read > 30_000, "only {read} bytes arrived");
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("flusher").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.ended == Some(1) && report.cut_total == Some(0),
        "{report:?}"
    );
    Ok(())
}

async fn backlog(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "200ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("queue").container(queue("app", 8080));
    let pod = scene.run(spec).await?;
    let accepted = Peer::connect(pod.v4(8080)?).await?;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(Peer::asking(pod.v4(8080)?, "/slow?ms=300").await?);
    }
    let kubelet = scene.kubelet_at(&proxy)?;
    let stopping = tokio::spawn(async move { kubelet.stop(&pod, 30 * SECOND).await });
    let report = agent.until_draining("queue").await?;
    ensure!(
        report.flows_at_start.is_some_and(|f| f.backlog == 3),
        "{report:?}"
    );
    sleep(SECOND).await;
    ensure!(
        !stopping.is_finished(),
        "released with clients in the queue"
    );
    drop(accepted);
    for mut peer in waiting {
        let read = peer.read_to_end().await?;
        ensure!(read > 0, "cut off in the queue");
    }
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("queue").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.ended == Some(4) && report.cut_total == Some(0),
        "{report:?}"
    );
    Ok(())
}
