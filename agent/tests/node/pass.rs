//! What is not to be held, passes.

use std::time::Duration;

use anyhow::{Result, ensure};
use ebb_node::kubelet::{Container, Kubelet, Pod, PodSpec};
use libtest_mimic::Trial;

use crate::{
    agent::{Agent, timed},
    peer::Peer,
    scene::{SECOND, Scene, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "one_of_two_containers_is_restarted_and_its_stop_is_not_held",
            restarted_container,
        ),
        trial(
            "the_only_container_is_not_held_where_nobody_can_tell_why_it_stops",
            only_container,
        ),
        trial(
            "timeouts_of_two_seconds_and_less_are_never_held",
            short_timeout,
        ),
        trial("a_pod_that_says_off_is_not_held", off),
        trial("without_an_agent_the_proxy_passes_everything", no_agent),
    ]
}

/// Stops a container through the proxy, which must take no longer than the wait for a verdict.
async fn passes(kubelet: &Kubelet, container: &Container, timeout: Duration) -> Result<Duration> {
    let (result, took) = timed(kubelet.stop_container(container, timeout)).await;
    result?;
    ensure!(took < 4 * SECOND, "held for {took:?}");
    Ok(took)
}

async fn not_held(agent: &Agent, pod: &Pod, why: Option<&str>) -> Result<()> {
    let drains = agent.drains(&pod.spec.name).await?;
    ensure!(drains.is_empty(), "{drains:?}");
    if let Some(why) = why {
        let metric =
            format!("ebb_holds_passed_total{{reason=\"not-terminating\",evidence=\"{why}\"}}");
        ensure!(agent.metric(&metric).await? == 1, "{why} was not counted");
    }
    Ok(())
}

async fn restarted_container(scene: Scene) -> Result<()> {
    // Even so: that there are others which go on, can be told.
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("restarts")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let mut pod = scene.run(spec).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let side = Peer::served(pod.v4(8081)?).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let app = pod.container("app")?.clone();
    passes(&kubelet, &app, 30 * SECOND).await?;
    not_held(&agent, &pod, Some("others-run")).await?;
    let timeouts = scene.stop_timeouts(&app.id)?;
    // Less the second that the verdict took, which is one begun.
    ensure!(timeouts == [28], "{timeouts:?}");
    // The restart itself, and the rest of the pod, are as without ebb.
    kubelet.restart(&mut pod, "app", 1).await?;
    ebb_node::http::until_open(pod.v4(8080)?, 5 * SECOND).await?;
    let flows = agent.flows("restarts").await?;
    ensure!(flows.iter().any(|f| f.remote == side.address), "{flows:?}");
    let view = agent.pod("restarts").await?;
    let running = view.containers.iter().filter(|c| c.running);
    ensure!(running.count() == 2, "{view:?}");
    Ok(())
}

async fn only_container(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("only").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    passes(&scene.kubelet_at(&proxy)?, &pod.containers[0], 30 * SECOND).await?;
    not_held(&agent, &pod, Some("only-container")).await
}

async fn short_timeout(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    for seconds in 0..=2 {
        let name = format!("evicted-{seconds}");
        let pod = scene.serve(&name).await?;
        let _peer = Peer::served(pod.v4(8080)?).await?;
        let timeout = Duration::from_secs(seconds);
        passes(&kubelet, &pod.containers[0], timeout).await?;
        not_held(&agent, &pod, None).await?;
        let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
        ensure!(timeouts == [seconds], "{timeouts:?}");
    }
    Ok(())
}

async fn off(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("off")
        .annotation("ebb.dev/drain", "off")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none() && stop.took < 4 * SECOND, "{stop:?}");
    let drains = agent.drains("off").await?;
    ensure!(drains.is_empty(), "{drains:?}");
    Ok(())
}

async fn no_agent(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    agent.stop().await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    ensure!(kubelet.is_ready().await?);
    // Through the proxy from its first call to its last.
    let pod = kubelet
        .run(&PodSpec::new("alone").container(server("app", 8080)))
        .await?;
    ebb_node::http::until_open(pod.v4(8080)?, 5 * SECOND).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let stop = kubelet.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none() && stop.took < 4 * SECOND, "{stop:?}");
    kubelet.remove(&pod).await
}
