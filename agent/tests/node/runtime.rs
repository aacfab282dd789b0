//! The container runtime crashes and is started again.

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use ebb_testkit::kubelet::PodSpec;
use libtest_mimic::Trial;

use crate::{
    hold::stop,
    peer::Peer,
    scene::{ExclusiveScene, SECOND, eventually, run, server, trial_alone},
    wait_port::raw_get,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial_alone(
        "after_a_crash_of_the_runtime_ebb_works_as_before",
        crashes,
    )]
}

async fn crashes(mut scene: ExclusiveScene) -> Result<()> {
    let (mut agent, proxy) = scene.ebb(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let before = run(
        &scene.node,
        PodSpec::new("before").container(server("app", 8080)),
    )
    .await?;
    let peer = Peer::served(before.v4(8080)?).await?;
    ensure!(agent.flows("before").await?.len() == 1);
    let kubelet = scene.node.kubelet_at(&proxy.socket)?;
    ensure!(kubelet.is_ready().await?);
    ensure!(agent.get("/readyz").await?.status == 200);

    scene.node.containerd().kill().await?;
    // The agent still shows the pods it knew, with their present flows.
    let second = Peer::served(before.v4(8080)?).await?;
    let flows = agent.flows("before").await?;
    ensure!(flows.len() == 2, "{flows:?}");
    ensure!(
        flows.iter().any(|f| f.remote == second.address),
        "{flows:?}"
    );
    ensure!(
        agent
            .pod("before")
            .await?
            .flows
            .is_some_and(|f| f.total() == 2)
    );
    drop(second);
    // The proxy answers the kubelet with the error of a runtime that does not run.
    let error = kubelet
        .is_ready()
        .await
        .err()
        .context("the proxy answers without a runtime")?;
    ensure!(format!("{error:#}").contains("Unavailable"), "{error:#}");
    // The agent stays ready for a moment after the runtime's last answer.
    eventually("it is not ready without a runtime", async || {
        Ok(agent.get("/readyz").await.is_err().then_some(()))
    })
    .await?;
    ensure!(agent.get("/healthz").await?.status == 200);
    // The cause is in the log only, because any client can reach the port.
    let answer = raw_get(
        ([127, 0, 0, 1], agent.port).into(),
        "/readyz",
        "Accept: */*",
    )
    .await?;
    ensure!(
        answer.ends_with(r#"{"error":"waiting for the container runtime to answer"}"#),
        "{answer}"
    );
    let log = std::fs::read_to_string(agent.log())?;
    ensure!(log.matches("not ready while").count() == 1, "{log}");

    scene.node.containerd().resume().await?;
    ensure!(agent.runs()?, "the agent has ended");
    eventually("the proxy is back", async || {
        Ok(kubelet.is_ready().await.unwrap_or(false).then_some(()))
    })
    .await?;
    eventually("the agent is ready", async || {
        Ok(agent.get("/readyz").await.is_ok().then_some(()))
    })
    .await?;
    let after = kubelet
        .run(&PodSpec::new("after").container(server("app", 8080)))
        .await?;
    ebb_testkit::http::until_open(after.v4(8080)?, 5 * SECOND).await?;
    let other = Peer::served(after.v4(8080)?).await?;
    let flows = agent.flows("after").await?;
    ensure!(
        flows.len() == 1 && flows[0].remote == other.address,
        "{flows:?}"
    );
    ensure!(agent.flows("before").await?.len() == 1);

    let stopping = stop(kubelet, &before, 30 * SECOND);
    agent.until_draining("before").await?;
    tokio::time::sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "not held");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("before").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    agent.stop().await?;
    proxy.stop().await
}
