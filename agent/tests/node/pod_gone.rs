//! Holds whose caller or pod goes away leave nothing behind.

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};
use ebb::host::kubelet::clients_of;
use ebb_core::drain_report::ReleaseReason;
use k8s_cri::v1::{RemovePodSandboxRequest, StopPodSandboxRequest};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::{Agent, Proxy},
    peer::Peer,
    scene::{SECOND, Scene, eventually, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_cancelled_call_leaves_nothing_open_and_the_next_call_keeps_its_deadline",
            caller,
        ),
        trial(
            "removing_a_sandbox_without_the_proxy_ends_the_hold_of_its_container",
            sandbox,
        ),
    ]
}

/// Waits until the agent has no client and the proxy has no more than `files` files open.
async fn until_nothing_is_left(agent: &Agent, proxy: &Proxy, files: usize) -> Result<()> {
    eventually("the connections of the hold are closed", async || {
        let connected = clients_of(Path::new("/"), &agent.socket())?;
        Ok((connected == 0 && proxy.open_files()? <= files).then_some(()))
    })
    .await
}

async fn caller(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("caller-gone").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    ensure!(kubelet.is_ready().await?);
    let files = proxy.open_files()?;
    let call = || {
        let (kubelet, container) = (kubelet.clone(), pod.containers[0].clone());
        tokio::spawn(async move { kubelet.stop_container(&container, 60 * SECOND).await })
    };
    let first = call();
    let begun = agent.until_draining("caller-gone").await?;
    ensure!(proxy.open_files()? > files, "a hold has a connection");
    first.abort();
    until_nothing_is_left(&agent, &proxy, files).await?;
    agent.until_held_by("caller-gone", 0).await?;
    // The caller is gone, so the container is not stopped.
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(timeouts.is_empty(), "{timeouts:?}");

    sleep(SECOND).await;
    let second = call();
    agent.until_resumed("caller-gone", &begun).await?;
    ensure!(!second.is_finished(), "not held");
    drop(peer);
    second.await??;
    let report = agent.drain("caller-gone").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    until_nothing_is_left(&agent, &proxy, files).await
}

async fn sandbox(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "10s"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("sandbox-gone").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    ensure!(kubelet.is_ready().await?);
    let files = proxy.open_files()?;
    let stopping = tokio::spawn({
        let (kubelet, container) = (kubelet.clone(), pod.containers[0].clone());
        async move { kubelet.stop_container(&container, 60 * SECOND).await }
    });
    agent.until_draining("sandbox-gone").await?;
    ensure!(!stopping.is_finished(), "not held");
    // Directly in the runtime, which kills and removes the container too.
    let mut runtime = scene.kubelet()?.runtime();
    let pod_sandbox_id = pod.sandbox_id.clone();
    let stop = StopPodSandboxRequest { pod_sandbox_id };
    runtime.stop_pod_sandbox(stop).await?;
    let pod_sandbox_id = pod.sandbox_id.clone();
    let remove = RemovePodSandboxRequest { pod_sandbox_id };
    runtime.remove_pod_sandbox(remove).await?;
    let removed = Instant::now();
    // The kubelet takes the runtime's answer for a removed container as success.
    stopping.await??;
    ensure!(removed.elapsed() < 4 * SECOND, "{:?}", removed.elapsed());
    let stops = agent.explain("sandbox-gone").await?.stops;
    let why: Vec<_> = stops.iter().map(|s| s.reason.as_deref()).collect();
    ensure!(why == [Some("exited")], "{stops:?}");
    eventually("the agent no longer lists the pod", async || {
        Ok(agent.pods("sandbox-gone").await?.is_empty().then_some(()))
    })
    .await?;
    until_nothing_is_left(&agent, &proxy, files).await
}
