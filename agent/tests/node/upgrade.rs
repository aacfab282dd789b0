//! One agent after another: what the next one knows of the flows that it finds.

use anyhow::{Context as _, Result, ensure};
use ebb::report::view::FlowView;
use libtest_mimic::Trial;
use tokio::time::{Instant, sleep};

use crate::{
    agent::Agent,
    peer::Peer,
    scene::{SECOND, Scene, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "flows_are_as_old_after_an_upgrade_of_the_agent_as_before",
            upgraded,
        ),
        trial(
            "after_a_killed_agent_flows_are_known_to_be_older_than_the_next",
            killed,
        ),
    ]
}

async fn only(agent: &Agent, pod: &str) -> Result<FlowView> {
    let mut flows = agent.flows(pod).await?;
    ensure!(flows.len() == 1, "{flows:#?}");
    Ok(flows.remove(0))
}

async fn upgraded(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let pod = scene.serve("upgraded").await?;
    let opened = Instant::now();
    let _peer = Peer::served(pod.v4(8080)?).await?;
    sleep(2 * SECOND).await;
    // Twice: what one has from another is told on.
    let mut agent = agent;
    for _ in 0..2 {
        agent.stop().await?;
        agent = scene.agent(&[]).await?;
        let flow = only(&agent, "upgraded").await?;
        let age = flow.age_ms.context("no age")?;
        ensure!(
            flow.older_than_agent == Some(false)
                && age >= 2000
                && u128::from(age) <= opened.elapsed().as_millis(),
            "{flow:?} after {:?}",
            opened.elapsed()
        );
        ensure!(!agent.run.join("flows").exists(), "read and not removed");
    }
    agent.stop().await
}

async fn killed(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let pod = scene.serve("after-a-kill").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    sleep(2 * SECOND).await;
    agent.kill().await?;
    let started = Instant::now();
    let agent = scene.agent(&[]).await?;
    let bound = only(&agent, "after-a-kill").await?;
    ensure!(
        bound.older_than_agent == Some(true)
            && bound
                .age_ms
                .is_some_and(|age| u128::from(age) <= started.elapsed().as_millis()),
        "{bound:?}"
    );
    // Of this flow the next agent knows as much, and no more than that.
    agent.stop().await?;
    let agent = scene.agent(&[]).await?;
    let flow = only(&agent, "after-a-kill").await?;
    ensure!(
        flow.older_than_agent == Some(true) && flow.age_ms > bound.age_ms,
        "{bound:?}\n{flow:?}"
    );
    agent.stop().await
}
