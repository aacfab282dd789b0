//! The settle phase: peers that still connect to a pod that is ending, and pods that nothing connects to.

use std::{net::IpAddr, time::Duration};

use anyhow::{Result, ensure};
use ebb_core::drain_report::{Phase, ReleaseReason, Report, SettleReport, SettleRule};
use ebb_protocol::views::Released;
use ebb_testkit::kubelet::{ContainerSpec, PodSpec};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    hold::stop,
    peer::Peer,
    scene::{ExclusiveScene, FIXTURE, NODE_V4, SECOND, Scene, run, server, trial, trial_alone},
    wait_port::until_listening,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "new_connections_prolong_the_settle_phase_and_late_peers_are_named",
            late_peers,
        ),
        trial("the_settle_phase_ends_at_its_maximum", settle_max),
        trial(
            "a_pod_in_which_nothing_listens_ends_at_once_and_an_idle_server_settles",
            no_listener,
        ),
        trial_alone(
            "ebbs_own_listener_in_a_pod_is_nothing_to_wait_for",
            own_listener,
        ),
        trial(
            "a_pods_settle_min_and_settle_max_exceed_the_nodes",
            annotations,
        ),
        trial("a_pod_that_no_client_has_called_settles_soon", never_called),
    ]
}

async fn late_peers(scene: Scene) -> Result<()> {
    let agent = scene
        .agent(&["--hold-unknown", "--quiet", "1500ms"])
        .await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("stale").await?;
    let other = scene.serve("stale-client").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("stale").await?;
    let server = pod.v4(8080)?;
    for _ in 0..8 {
        Peer::served(server).await?;
        sleep(SECOND / 2).await;
        ensure!(
            !stopping.is_finished(),
            "released while connections come in"
        );
    }
    let url = format!("http://{server}/");
    let kubelet = scene.kubelet()?;
    let out = kubelet
        .exec(&other.containers[0], &[FIXTURE, "get", &url], 5 * SECOND)
        .await?;
    ensure!(out.status == 0, "{out:?}");
    let report = agent.drain("stale").await?;
    ensure!(report.phase == Phase::Settle, "{report:?}");
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");

    let report = agent.drain("stale").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.held_ms >= 4000 + 1500, "{report:?}");
    ensure!(
        report.arrived == Some(9) && report.ended == Some(9),
        "{report:?}"
    );
    let late: Vec<(IpAddr, u32)> = report
        .late_peers
        .iter()
        .map(|p| (p.address, p.flows))
        .collect();
    let expected = [(NODE_V4.parse()?, 8), (other.v4(0)?.ip(), 1)];
    ensure!(late == expected, "{report:?}");
    Ok(())
}

async fn settle_max(scene: Scene) -> Result<()> {
    let flags = ["--hold-unknown", "--quiet", "1s", "--settle-max", "3s"];
    let agent = scene.agent(&flags).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("restless").await?;
    let server = pod.v4(8080)?;
    let clients = tokio::spawn(async move {
        while Peer::served(server).await.is_ok() {
            sleep(Duration::from_millis(200)).await;
        }
    });
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    clients.abort();
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("restless").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!((3000..8000).contains(&report.held_ms), "{report:?}");
    ensure!(report.arrived > Some(5), "{report:?}");
    Ok(())
}

/// Long enough that a busy machine does not end a drain later than this without settling.
const LONG: &[&str] = &["--hold-unknown", "--quiet", "20s", "--settle-max", "20s"];

/// Demands that the pod's drain ended because nothing listens in it.
fn ended_at_once(report: &Report) -> Result<()> {
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.held_ms < 15_000 && report.dumps_ended == 1,
        "{report:?}"
    );
    let rule = report.settle.map(|settle| settle.rule);
    ensure!(rule == Some(SettleRule::NoListener), "{report:?}");
    Ok(())
}

/// A pod whose program does not use the network.
fn worker(name: &str) -> PodSpec {
    PodSpec::new(name).container(ContainerSpec::fixture("app", &["pause"]))
}

/// The agents of other trials would listen in the pod, too.
async fn own_listener(scene: ExclusiveScene) -> Result<()> {
    let (agent, proxy) = scene.ebb(LONG).await?;
    let spec = worker("hooked").annotation("ebb.dev/wait-port", "9690");
    let pod = run(&scene.node, spec).await?;
    until_listening(&pod).await?;
    let kubelet = scene.node.kubelet_at(&proxy.socket)?;
    let stop = kubelet.stop(&pod, 60 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    ended_at_once(&agent.drain("hooked").await?)
}

async fn no_listener(scene: Scene) -> Result<()> {
    let agent = scene.agent(LONG).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.run(worker("worker")).await?;
    let stopped = scene.kubelet_at(&proxy)?.stop(&pod, 60 * SECOND).await;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    ended_at_once(&agent.drain("worker").await?)?;
    let idle = scene.serve("idle-server").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &idle, 60 * SECOND);
    agent.until_draining("idle-server").await?;
    sleep(3 * SECOND).await;
    let report = agent.drain("idle-server").await?;
    ensure!(report.phase == Phase::Settle, "{report:?}");
    let expected = SettleReport {
        quiet_ms: 20_000,
        rule: SettleRule::Set,
        gap_ms: None,
    };
    ensure!(report.settle == Some(expected), "{report:?}");
    let released: Released = agent.json(&["release", "idle-server"]).await?;
    ensure!(
        released.report.reason == Some(ReleaseReason::Manual),
        "{released:?}"
    );
    ensure!(stopping.await?.error().is_none());
    Ok(())
}

async fn annotations(scene: Scene) -> Result<()> {
    let flags = ["--hold-unknown", "--quiet", "100ms", "--settle-max", "1s"];
    let agent = scene.agent(&flags).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("slow-balancer")
        .annotation("ebb.dev/settle-min", "4s")
        .container(server("app", 8080));
    let patient = scene.run(spec).await?;
    let spec = PodSpec::new("slower-balancer")
        .annotation("ebb.dev/quiet", "3s")
        .annotation("ebb.dev/settle-max", "30s")
        .container(server("app", 8080));
    let quiet = scene.run(spec).await?;
    for (pod, least) in [(&patient, 4000), (&quiet, 3000)] {
        let stop = scene.kubelet_at(&proxy)?.stop(pod, 60 * SECOND).await;
        ensure!(stop.error().is_none(), "{stop:?}");
        let report = agent.drain(&pod.spec.name).await?;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.held_ms >= least, "{report:?}");
        ensure!(report.warnings.is_empty(), "{report:?}");
    }
    // The deadline comes first.
    let spec = PodSpec::new("slowest-balancer")
        .annotation("ebb.dev/settle-min", "10m")
        .annotation("ebb.dev/max-hold", "2s")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 60 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain(&pod.spec.name).await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    Ok(())
}

/// The agent must have counted for a minute before it goes by its counters.
async fn never_called(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    // No check of the kit's connects to it.
    let args = ["serve", "--port=8080"];
    let spec = PodSpec::new("uncalled").container(ContainerSpec::fixture("app", &args));
    let pod = scene.run(spec).await?;
    let young = PodSpec::new("uncalled-young").container(ContainerSpec::fixture("app", &args));
    sleep(62 * SECOND).await;
    let young = scene.run(young).await?;
    for (pod, rule, quiet_ms) in [
        (&pod, SettleRule::Rare, 500),
        (&young, SettleRule::Unknown, 3000),
    ] {
        let stop = scene.kubelet_at(&proxy)?.stop(pod, 30 * SECOND).await;
        ensure!(stop.error().is_none(), "{stop:?}");
        let report = agent.drain(&pod.spec.name).await?;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        let expected = SettleReport {
            quiet_ms,
            rule,
            gap_ms: None,
        };
        ensure!(report.settle == Some(expected), "{report:?}");
        ensure!(report.held_ms >= quiet_ms, "{report:?}");
    }
    let told = agent.query(&["explain", "uncalled"]).await?;
    ensure!(told.contains("no client has connected"), "{told}");
    Ok(())
}
