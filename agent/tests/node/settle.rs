//! The settle phase: those who have not heard that the pod is leaving.

use std::{net::IpAddr, time::Duration};

use anyhow::{Result, ensure};
use ebb::drain::report::{Phase, ReleaseReason};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    hold::stop,
    peer::Peer,
    scene::{FIXTURE, NODE_V4, SECOND, Scene, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "new_connections_prolong_the_settle_phase_and_late_peers_are_named",
            late_peers,
        ),
        trial("the_settle_phase_has_an_end", settle_max),
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
