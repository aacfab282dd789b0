//! A release that does not wait for a walk of the node's connection table.

use std::net::{TcpListener, TcpStream};

use anyhow::{Context as _, Result, ensure};
use ebb::drain::report::{LookKind, Phase, ReleaseReason};
use libtest_mimic::Trial;
use tokio::task::spawn_blocking;

use crate::{
    hold::stop,
    peer::Peer,
    scene::{SECOND, Scene, eventually, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial(
        "a_pod_is_released_by_lookups_with_thousands_of_connections_elsewhere_on_the_node",
        among_thousands,
    )]
}

/// Connections of others; each is two sockets of the node.
const OTHERS: usize = 2_500;
/// Pods that end one after the other. One that finds the agent without time to run is released by a walk.
const PODS: usize = 3;

async fn among_thousands(scene: Scene) -> Result<()> {
    let _others = spawn_blocking(others).await??;
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let mut by_lookup = 0;
    for n in 0..PODS {
        let name = format!("one-of-many-{n}");
        let pod = scene.serve(&name).await?;
        let peer = Peer::served(pod.v4(8080)?).await?;
        let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
        eventually("the drain phase has been looked at", async || {
            let drains = agent.drains(&name).await?;
            let looked = |r: &ebb::drain::report::Report| r.phase == Phase::Drain && r.walks >= 2;
            Ok(drains.iter().any(looked).then_some(()))
        })
        .await?;
        drop(peer);
        let stop = stopping.await?;
        ensure!(stop.error().is_none(), "{stop:?}");
        let report = agent.drain(&name).await?;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.cut_total == Some(0), "{report:?}");
        report.release_lag_us.context("a close ended it")?;
        by_lookup += i64::from(report.released_by == Some(LookKind::Lookup));
    }
    ensure!(by_lookup > 0, "all were released by walks");
    let metric = |kind: &str| format!("ebb_drain_looks_total{{kind=\"{kind}\"}}");
    let lookups = agent.metric(&metric("lookup")).await?;
    ensure!(lookups >= by_lookup, "{lookups} rounds of lookups");
    let walks = agent.metric(&metric("walk")).await?;
    ensure!(walks >= 2 * PODS as i64, "{walks} walks");
    // Each drain was followed by an audit, if its pod was not gone sooner.
    eventually("all drains have been audited", async || {
        let mut outcomes = [0; 3];
        for (n, outcome) in outcomes.iter_mut().zip(["done", "left-out", "failed"]) {
            let metric = format!("ebb_audits_total{{outcome=\"{outcome}\"}}");
            *n = agent.metric(&metric).await?;
        }
        let all = outcomes.iter().sum::<i64>() == PODS as i64;
        Ok((all && outcomes[0] > 0).then_some(()))
    })
    .await
}

fn others() -> Result<Vec<(TcpStream, TcpStream)>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let at = listener.local_addr()?;
    (0..OTHERS)
        .map(|_| {
            let client = TcpStream::connect(at)?;
            Ok((listener.accept()?.0, client))
        })
        .collect()
}
