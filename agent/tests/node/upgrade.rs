//! An agent and the flows that are older than itself.

use anyhow::{Context as _, Result, ensure};
use ebb_core::flow::Direction;
use ebb_protocol::views::FlowView;
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::Agent,
    peer::Peer,
    scene::{SECOND, Scene, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "after_an_upgrade_flows_are_at_least_as_old_as_their_silence",
            |scene| restarted(scene, false),
        ),
        trial(
            "after_a_killed_agent_flows_are_at_least_as_old_as_their_silence",
            |scene| restarted(scene, true),
        ),
    ]
}

async fn only_flow(agent: &Agent, pod: &str) -> Result<FlowView> {
    let mut flows = agent.flows(pod).await?;
    ensure!(flows.len() == 1, "{flows:#?}");
    Ok(flows.remove(0))
}

async fn restarted(scene: Scene, killed: bool) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let pod = scene
        .serve(if killed { "after-a-kill" } else { "upgraded" })
        .await?;
    let mut peer = Peer::served(pod.v4(8080)?).await?;
    sleep(2 * SECOND).await;
    let flow = only_flow(&agent, &pod.spec.name).await?;
    ensure!(
        flow.age_ms.is_some_and(|age| age >= 2000) && flow.age_at_least_ms.is_none(),
        "{flow:?}"
    );
    if killed {
        agent.kill().await?;
    } else {
        agent.stop().await?;
    }
    let agent = scene.agent(&[]).await?;
    let flow = only_flow(&agent, &pod.spec.name).await?;
    ensure!(
        flow.direction == Direction::Inbound && flow.holds,
        "{flow:?}"
    );
    let at_least = flow.age_at_least_ms.context("no bound of its age")?;
    ensure!(flow.age_ms.is_none() && at_least >= 2000, "{flow:?}");
    // New data does not make the flow younger than its silence.
    peer.ask("/").await?;
    let flow = only_flow(&agent, &pod.spec.name).await?;
    ensure!(flow.age_at_least_ms >= Some(flow.quiet_ms), "{flow:?}");
    let text = agent.query(&["flows", &pod.spec.name]).await?;
    ensure!(
        text.lines().nth(1).is_some_and(|line| line.contains('>')),
        "{text}"
    );
    agent.stop().await
}
