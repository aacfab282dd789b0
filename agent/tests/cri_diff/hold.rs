//! One hold from its beginning to its end.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::{
    Node, http,
    kubelet::{ContainerSpec, PodSpec},
};
use k8s_cri::v1::ContainerState;
use tokio::{net::TcpStream, time::sleep};

use crate::node::{agent, directory, proxy};

const SECOND: Duration = Duration::from_secs(1);

/// Stops a pod of two containers while a client is connected to it.
pub(crate) async fn held_until_drained(node: &Node) -> Result<()> {
    let run = directory(node)?;
    let _agent = agent(node, &run).await?;
    let socket = run.join("cri.sock");
    let _proxy = proxy(node, &socket, &run.join("agent.sock")).await?;
    let server = |name, port| ContainerSpec::fixture(name, &["serve", "--port", port]);
    let spec = PodSpec::new("held")
        .container(server("app", "8080"))
        .container(server("side", "8081"));
    let kubelet = node.kubelet_at(&socket)?;
    let pod = kubelet.run(&spec).await?;
    for port in [8080, 8081] {
        http::until_open(pod.v4(port)?, 15 * SECOND).await?;
    }
    let peer = TcpStream::connect(pod.v4(8080)?).await?;

    let stopping = tokio::spawn({
        let (kubelet, pod) = (kubelet.clone(), pod.clone());
        async move { kubelet.stop(&pod, 30 * SECOND).await }
    });
    sleep(4 * SECOND).await;
    ensure!(!stopping.is_finished(), "not held");
    for container in &pod.containers {
        let state = kubelet.status(container).await?.state();
        ensure!(state == ContainerState::ContainerRunning, "{state:?}");
    }
    let closed = Instant::now();
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(closed.elapsed() < 10 * SECOND, "{:?}", closed.elapsed());
    for container in &pod.containers {
        let status = kubelet.status(container).await?;
        ensure!(
            status.state() == ContainerState::ContainerExited && status.exit_code == 0,
            "{status:?}"
        );
    }
    kubelet.remove(&pod).await.context("removing the pod")
}
