//! One round: runs a pod with clients and stops it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use ebb_testkit::{
    Node,
    clients::{ClientKind, RequestCounts},
    kubelet::Kubelet,
};

use crate::{ebb::Ebb, say, scene};

/// How often the demo prints the flows during the drain.
const SHOW_EVERY: Duration = Duration::from_secs(4);

/// The results of a round.
pub(crate) struct Round {
    /// Requests and failures by kind of client.
    pub(crate) tallies: BTreeMap<ClientKind, RequestCounts>,
    /// The time from the first StopContainer to the reply to StopPodSandbox.
    pub(crate) stop: Duration,
}

impl Round {
    pub(crate) fn total(&self) -> RequestCounts {
        RequestCounts::sum(self.tallies.values())
    }
}

/// Runs a pod with clients and stops it with the calls of `kubelet`. With `ebb`, prints the flows meanwhile.
pub(crate) async fn play(
    node: &Node,
    kubelet: &Kubelet,
    name: &str,
    ebb: Option<&Ebb>,
) -> Result<Round> {
    let pod = scene::pod(node, kubelet, name).await?;
    let mut clients = scene::clients(&pod).await?;
    say(
        "clients are busy: 2 slow downloads, 8 requests that take 5 s, 6 idle keep-alive connections, 12 in an accept queue",
    );
    if let Some(ebb) = ebb {
        eprint!("{}", ebb.table(&["flows", name]).await?);
    }
    say(
        "the pod is stopped: StopContainer for each container with 30 s of grace, then StopPodSandbox; new connections keep coming for 3 s",
    );
    scene::stale(&mut clients, pod.v4(8080)?);
    let started = Instant::now();
    let stopping = kubelet.stop(&pod, scene::GRACE);
    tokio::pin!(stopping);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + SHOW_EVERY, SHOW_EVERY);
    let stop = loop {
        tokio::select! {
            stop = &mut stopping => break stop,
            _ = ticks.tick(), if ebb.is_some() => {
                if let Some(ebb) = ebb {
                    say(&format!("{:.0} s later", started.elapsed().as_secs_f64()));
                    eprint!("{}", ebb.table(&["drains"]).await?);
                    eprint!("{}", ebb.table(&["flows", name]).await?);
                }
            }
        }
    };
    if let Some(e) = stop.error() {
        anyhow::bail!("stopping the pod failed: {e:#}");
    }
    let tallies = clients.finish().await;
    kubelet.remove(&pod).await?;
    say(&format!(
        "the pod is gone after {:.1} s",
        stop.took.as_secs_f64()
    ));
    Ok(Round {
        tallies,
        stop: stop.took,
    })
}
