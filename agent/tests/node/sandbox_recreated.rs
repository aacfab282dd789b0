//! The kubelet recreates the sandbox of a pod that the API server says is not being deleted.

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::{
    api_server::ApiServer,
    kubelet::{Kubelet, PodSpec, StartedPod},
};
use k8s_cri::v1::{PodSandboxState, PodSandboxStatusRequest};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use crate::{
    agent::{NODE_NAME, Proxy},
    hold::stop,
    peer::Peer,
    scene::{ExclusiveScene, SECOND, directory, eventually, free_port, run, server, trial_alone},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial_alone(
        "the_stops_of_a_pod_whose_sandbox_is_recreated_are_not_held",
        recreated,
    )]
}

/// The state of the pod's sandbox, and the pid of its process.
async fn sandbox(kubelet: &Kubelet, pod: &StartedPod) -> Result<(PodSandboxState, Pid)> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.sandbox_id.clone(),
        verbose: true,
    };
    let reply = kubelet.runtime().pod_sandbox_status(request).await?;
    let reply = reply.into_inner();
    let info: serde_json::Value =
        serde_json::from_str(reply.info.get("info").map_or("", String::as_str))?;
    let pid = info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    // A sandbox that is not ready has pid 0.
    let pid = pid.and_then(Pid::from_raw).unwrap_or(Pid::INIT);
    let state = reply.status.context("no status")?.state();
    Ok((state, pid))
}

async fn recreated(mut scene: ExclusiveScene) -> Result<()> {
    let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
    let agent = scene.agent_with_api(&api, &["--quiet", "300ms"]).await?;
    let proxy = directory(&scene.directory, "proxy")?;
    let proxy = Proxy::at(scene.node.socket(), &proxy, &agent.socket()).await?;
    let spec = |name: &str| {
        PodSpec::new(name)
            .container(server("app", 8080))
            .container(server("side", 8081))
    };
    let mut pods = Vec::new();
    for name in ["recreated", "recreated-unseen"] {
        let spec = spec(name);
        api.create(&spec, NODE_NAME);
        let spec = spec.annotation("kubernetes.io/config.source", "api");
        let pod = run(&scene.node, spec).await?;
        let peer = Peer::served(pod.v4(8080)?).await?;
        ensure!(agent.pod(name).await?.containers.len() == 2);
        pods.push((pod, peer));
    }
    let direct = scene.node.kubelet()?;
    let through_ebb = scene.node.kubelet_at(&proxy.socket)?;

    // The runtime shows that the sandbox is not ready.
    let (seen, _peer) = &pods[0];
    let (state, pause) = sandbox(&direct, seen).await?;
    ensure!(state == PodSandboxState::SandboxReady);
    kill_process(pause, Signal::KILL)?;
    eventually("the sandbox is not ready", async || {
        let (state, _) = sandbox(&direct, seen).await?;
        Ok((state == PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    let stopped = stop(through_ebb.clone(), seen, 60 * SECOND).await?;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    ensure!(stopped.took < 30 * SECOND, "held: {stopped:?}");
    let drains = agent.drains("recreated").await?;
    ensure!(drains.is_empty(), "{drains:?}");

    // The runtime does not answer, so the agent's last list has the sandbox as it was.
    let (unseen, _peer) = &pods[1];
    let (_, pause) = sandbox(&direct, unseen).await?;
    let runtime = scene.node.containerd().pid().context("no containerd")?;
    let runtime = Pid::from_raw(runtime.cast_signed()).context("no pid")?;
    kill_process(runtime, Signal::STOP)?;
    kill_process(pause, Signal::KILL)?;
    let sandbox_stop = tokio::spawn({
        let (kubelet, pod) = (through_ebb.clone(), unseen.clone());
        async move { kubelet.stop_sandbox(&pod).await }
    });
    sleep(SECOND / 2).await;
    let stopping = stop(through_ebb, unseen, 60 * SECOND);
    let decided = eventually("all stops are decided", async || {
        let stops = agent.explain("recreated-unseen").await?.stops;
        Ok((stops.len() == 3).then_some(stops))
    })
    .await;
    kill_process(runtime, Signal::CONT)?;
    for stop in decided? {
        ensure!(
            !stop.held
                && stop.reason.as_deref() == Some("not-terminating")
                && stop.evidence.as_deref() == Some("sandbox-not-ready"),
            "{stop:?}"
        );
    }
    // A kubelet does not make these calls at the same time, and the runtime may fail one of them.
    let _ = sandbox_stop.await?;
    let _ = stopping.await?;
    let drains = agent.drains("recreated-unseen").await?;
    ensure!(drains.is_empty(), "{drains:?}");
    Ok(())
}
