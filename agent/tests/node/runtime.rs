//! The container runtime crashes and is started again, or is slow.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use ebb_testkit::kubelet::PodSpec;
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use crate::{
    hold::stop,
    peer::Peer,
    scene::{ExclusiveScene, SECOND, eventually, run, server, trial_alone},
    wait_port::raw_get,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial_alone("after_a_crash_of_the_runtime_ebb_works_as_before", crashes),
        trial_alone(
            "a_stop_of_a_new_container_is_held_although_the_runtime_is_slow",
            slow,
        ),
    ]
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
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "not held");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("before").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    agent.stop().await?;
    proxy.stop().await
}

async fn slow(mut scene: ExclusiveScene) -> Result<()> {
    let (mut agent, proxy) = scene.ebb(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let spec = PodSpec::new("slow").container(server("app", 8080));
    let mut pod = run(&scene.node, spec).await?;
    let direct = scene.node.kubelet()?;
    direct.stop_container(&pod.containers[0], SECOND).await?;
    // Until the agent has listed the pods after this. The next change leads to a list 0.25 s later.
    sleep(3 * SECOND).await;
    direct.restart(&mut pod, "app", 1).await?;
    let runtime = scene.node.containerd().pid().context("no containerd")?;
    let runtime = Pid::from_raw(runtime.cast_signed()).context("no pid")?;
    kill_process(runtime, Signal::STOP)?;
    let kubelet = scene.node.kubelet_at(&proxy.socket)?;
    let stopping = stop(kubelet, &pod, 30 * SECOND);
    sleep(Duration::from_millis(650)).await;
    kill_process(runtime, Signal::CONT)?;
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("slow").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(agent.runs()?, "the agent has ended");
    agent.stop().await?;
    proxy.stop().await
}
