//! Pods with sidecars, without an API server: their containers are stopped one after the other.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use ebb_testkit::kubelet::{PodSpec, PodStop, PreStop};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::Agent,
    hold::stop,
    peer::Peer,
    scene::{ExclusiveScene, FIXTURE, NODE_V4, SECOND, Scene, run, server, trial, trial_alone},
    wait_port::{PORT, annotated, hook, until_listening},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "the_stops_of_a_pod_with_a_sidecar_look_like_restarts_and_are_not_held",
            not_held,
        ),
        trial(
            "hold_unknown_holds_the_remaining_sidecar_and_not_the_main_container",
            hold_unknown,
        ),
        trial_alone(
            "a_container_without_a_hook_is_held_while_another_containers_hook_waits",
            beside_a_hook,
        ),
        trial(
            "a_pre_stop_wait_covers_the_flows_of_sidecars_which_then_stop_with_the_remaining_grace",
            pre_stop,
        ),
    ]
}

fn spec(name: &str) -> PodSpec {
    PodSpec::new(name).container(server("side", 8081).sidecar())
}

/// Requires that the main container was stopped first, then the sidecar.
pub(crate) fn in_turn(stop: &PodStop) -> Result<()> {
    let names: Vec<_> = stop.containers.iter().map(|c| c.name.as_str()).collect();
    ensure!(names == ["app", "side"], "{names:?}");
    ensure!(stop.error().is_none(), "{stop:?}");
    Ok(())
}

async fn others_run(agent: &Agent) -> Result<i64> {
    let labels = "reason=\"not-terminating\",evidence=\"others-run\"";
    agent.counted("ebb_holds_bypassed_total", labels).await
}

async fn not_held(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene
        .run(spec("side-passed").container(server("app", 8080)))
        .await?;
    let _app = Peer::served(pod.v4(8080)?).await?;
    let _side = Peer::served(pod.v4(8081)?).await?;
    let stop = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND).await?;
    in_turn(&stop)?;
    ensure!(stop.took < 10 * SECOND, "{stop:?}");
    ensure!(others_run(&agent).await? == 1, "the main container's stop");
    ensure!(agent.drains("side-passed").await?.is_empty());
    Ok(())
}

async fn hold_unknown(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene
        .run(spec("side-held").container(server("app", 8080)))
        .await?;
    let _app = Peer::served(pod.v4(8080)?).await?;
    let side = Peer::served(pod.v4(8081)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("side-held").await?;
    ensure!(others_run(&agent).await? == 1, "the main container's stop");
    let app = scene.stop_timeouts(&pod.container("app")?.id)?;
    // 30 s less the agent's decision, which takes between one and two seconds, and more on a busy machine.
    ensure!(matches!(app[..], [26..=29]), "{app:?}");
    sleep(2 * SECOND).await;
    ensure!(!stopping.is_finished(), "the sidecar is not held");
    drop(side);
    let stop = stopping.await?;
    in_turn(&stop)?;
    let timeouts = scene.stop_timeouts(&pod.container("side")?.id)?;
    ensure!(
        timeouts.len() == 1 && timeouts[0] <= 28,
        "neither the decision nor the hold was subtracted: {timeouts:?}"
    );
    let report = agent.drain("side-held").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

async fn pre_stop(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
    let hook = PreStop::Exec(vec![FIXTURE.into(), "get".into(), url]);
    let spec = spec("side-hooked").container(server("app", 8080).pre_stop(hook));
    let pod = scene.run(spec).await?;
    let side = Peer::served(pod.v4(8081)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("side-hooked").await?;
    sleep(3 * SECOND).await;
    ensure!(!stopping.is_finished(), "the hook has ended");
    for container in &pod.containers {
        let timeouts = scene.stop_timeouts(&container.id)?;
        ensure!(timeouts.is_empty(), "{}: {timeouts:?}", container.name);
    }
    drop(side);
    let stop = stopping.await?;
    in_turn(&stop)?;
    let side = stop.containers.last().context("no sidecar")?;
    ensure!(side.timeout <= 27 * SECOND, "{stop:?}");
    ensure!(side.timeout > Duration::from_secs(10), "{stop:?}");
    // Neither stop is held again: it is the same termination.
    let report = agent.drain("side-hooked").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

/// Needs the node to itself, because every other agent would listen on the wait port of its pod.
async fn beside_a_hook(scene: ExclusiveScene) -> Result<()> {
    let (agent, proxy) = scene.ebb(&["--quiet", "300ms"]).await?;
    let mut spec = annotated("beside-hook").container(server("plain", 8081));
    spec.containers[0].pre_stop = Some(hook(PORT));
    let pod = run(&scene.node, spec).await?;
    until_listening(&pod).await?;
    let peer = Peer::served(pod.v4(8081)?).await?;
    // Both containers are stopped at once: the hook's wait begins before or after the other's stop arrives.
    let kubelet = scene.node.kubelet_at(&proxy.socket)?;
    let stopping = stop(kubelet, &pod, 30 * SECOND);
    agent.until_draining("beside-hook").await?;
    sleep(3 * SECOND).await;
    ensure!(!stopping.is_finished(), "not held");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("beside-hook").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let stops = agent.explain("beside-hook").await?.stops;
    let plain = stops
        .iter()
        .find(|s| s.container.as_deref() == Some("plain"));
    let plain = plain.context("the stop is not listed")?;
    ensure!(
        plain.held && plain.evidence.as_deref() == Some("prestop-wait"),
        "{plain:?}"
    );
    agent.stop().await
}
