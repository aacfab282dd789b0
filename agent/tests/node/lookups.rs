//! Releases by lookups, which do not wait for a dump of the node's connection table.

use std::net::{TcpListener, TcpStream};

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::{Phase, ReleaseReason, ReleasedBy};
use libtest_mimic::Trial;
use tokio::task::spawn_blocking;

use crate::{
    hold::stop,
    peer::Peer,
    scene::{SECOND, Scene, eventually, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial(
        "a_pod_is_released_by_lookups_on_a_node_with_thousands_of_other_connections",
        among_thousands,
    )]
}

/// Connections that are not the pod's. Each is two sockets of the node.
const OTHER_CONNECTIONS: usize = 2_500;
/// Pods that end one after the other. If the agent gets no CPU time for a while, a dump releases the pod instead.
const PODS: usize = 3;

async fn among_thousands(scene: Scene) -> Result<()> {
    let _connections = spawn_blocking(connect_others).await??;
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let mut by_lookup = 0;
    for n in 0..PODS {
        let name = format!("one-of-many-{n}");
        let pod = scene.serve(&name).await?;
        let peer = Peer::served(pod.v4(8080)?).await?;
        let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
        eventually("the drain phase has had a dump", async || {
            let drains = agent.drains(&name).await?;
            let dumped =
                |r: &ebb_core::drain_report::Report| r.phase == Phase::Drain && r.dumps_ended >= 2;
            Ok(drains.iter().any(dumped).then_some(()))
        })
        .await?;
        drop(peer);
        let stop = stopping.await?;
        ensure!(stop.error().is_none(), "{stop:?}");
        let report = agent.drain(&name).await?;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.cut_total == Some(0), "{report:?}");
        report.release_lag_us.context("no close has ended it")?;
        by_lookup += i64::from(report.released_by == Some(ReleasedBy::Lookup));
    }
    ensure!(by_lookup > 0, "all were released by dumps");
    let lookups = agent.metric("ebb_drain_lookups_total").await?;
    ensure!(lookups >= by_lookup, "{lookups} rounds of lookups");
    for reason in ["first", "settle-over"] {
        let metric = format!("ebb_drain_dumps_total{{reason=\"{reason}\"}}");
        let dumps = agent.metric(&metric).await?;
        ensure!(
            dumps == PODS as i64,
            "{dumps} dumps for the reason {reason}"
        );
    }
    Ok(())
}

fn connect_others() -> Result<Vec<(TcpStream, TcpStream)>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let at = listener.local_addr()?;
    (0..OTHER_CONNECTIONS)
        .map(|_| {
            let client = TcpStream::connect(at)?;
            Ok((listener.accept()?.0, client))
        })
        .collect()
}
