//! One pod, its clients, and its end.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use ebb_node::{
    Node,
    clients::{Kind, Tally},
    kubelet::Kubelet,
};

use crate::{ebb::Ebb, say, scene};

/// How often the flows are shown while they drain.
const LOOK_EVERY: Duration = Duration::from_secs(4);

/// How a round went.
pub(crate) struct Round {
    /// What became of each kind of client's requests.
    pub(crate) tallies: BTreeMap<Kind, Tally>,
    /// How long the kubelet's calls took, from the first StopContainer to the end of StopPodSandbox.
    pub(crate) stop: Duration,
}

impl Round {
    /// All requests.
    pub(crate) fn total(&self) -> Tally {
        Tally::sum(self.tallies.values())
    }
}

/// Runs a pod with clients and stops it as `kubelet`; with `ebb`, shows the flows meanwhile.
pub(crate) async fn play(
    node: &Node,
    kubelet: &Kubelet,
    name: &str,
    ebb: Option<&Ebb>,
) -> Result<Round> {
    let pod = scene::pod(node, kubelet, name).await?;
    let mut clients = scene::clients(&pod).await?;
    say(
        "clients are at work: 2 slow downloads, 8 requests that take 5 s, 6 idle keep-alive connections, 12 in an accept queue",
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
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK_EVERY, LOOK_EVERY);
    let stop = loop {
        tokio::select! {
            stop = &mut stopping => break stop,
            _ = look.tick(), if ebb.is_some() => {
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
