//! Stops that ebb does not hold: it forwards them at once.

use std::time::Duration;

use anyhow::{Result, ensure};
use ebb_testkit::kubelet::{Kubelet, PodSpec, StartedContainer, StartedPod};
use libtest_mimic::Trial;

use crate::{
    agent::{Agent, timed},
    peer::Peer,
    scene::{SECOND, Scene, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "the_restart_of_one_of_two_containers_is_not_held",
            restarted_container,
        ),
        trial(
            "the_only_container_is_not_held_while_the_reason_for_its_stop_is_unknown",
            only_container,
        ),
        trial(
            "stops_with_a_timeout_of_two_seconds_or_less_are_never_held",
            short_timeout,
        ),
        trial("a_pod_with_the_annotation_drain_off_is_not_held", off),
        trial("without_an_agent_the_proxy_forwards_every_call", no_agent),
    ]
}

/// Stops a container through the proxy. Requires that this takes no longer than the agent may take to decide.
async fn stop_at_once(
    kubelet: &Kubelet,
    container: &StartedContainer,
    timeout: Duration,
) -> Result<Duration> {
    let (result, took) = timed(kubelet.stop_container(container, timeout)).await;
    result?;
    ensure!(took < 4 * SECOND, "held for {took:?}");
    Ok(took)
}

async fn not_held(agent: &Agent, pod: &StartedPod, why: Option<&str>) -> Result<()> {
    let drains = agent.drains(&pod.spec.name).await?;
    ensure!(drains.is_empty(), "{drains:?}");
    if let Some(why) = why {
        let metric =
            format!("ebb_holds_bypassed_total{{reason=\"not-terminating\",evidence=\"{why}\"}}");
        ensure!(agent.metric(&metric).await? == 1, "{why} was not counted");
    }
    Ok(())
}

async fn restarted_container(scene: Scene) -> Result<()> {
    // Not held even with --hold-unknown, because the pod's other container keeps running.
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
    stop_at_once(&kubelet, &app, 30 * SECOND).await?;
    not_held(&agent, &pod, Some("others-run")).await?;
    let timeouts = scene.stop_timeouts(&app.id)?;
    // 30 s less the agent's decision, which takes between one and two seconds.
    ensure!(matches!(timeouts[..], [27..=29]), "{timeouts:?}");
    // The restart works, and the rest of the pod is not affected.
    kubelet.restart(&mut pod, "app", 1).await?;
    ebb_testkit::http::until_open(pod.v4(8080)?, 5 * SECOND).await?;
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
    stop_at_once(&scene.kubelet_at(&proxy)?, &pod.containers[0], 30 * SECOND).await?;
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
        stop_at_once(&kubelet, &pod.containers[0], timeout).await?;
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
    // After a stop, calls wait for the next agent.
    agent.kill().await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    ensure!(kubelet.is_ready().await?);
    // All calls for this pod go through the proxy.
    let pod = kubelet
        .run(&PodSpec::new("alone").container(server("app", 8080)))
        .await?;
    ebb_testkit::http::until_open(pod.v4(8080)?, 5 * SECOND).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let stop = kubelet.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none() && stop.took < 4 * SECOND, "{stop:?}");
    kubelet.remove(&pod).await
}
