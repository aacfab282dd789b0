//! `ebb advise`: what the drains that the agent remembers say about a workload.

use anyhow::{Context as _, Result, ensure};
use ebb_protocol::views::{AdviceList, WorkloadAdvice};
use ebb_testkit::kubelet::{Kubelet, PodSpec};
use libtest_mimic::Trial;

use crate::{
    agent::Agent,
    peer::Peer,
    scene::{SECOND, Scene, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial(
        "the_advice_rests_on_the_drains_of_a_workload_and_says_if_they_are_too_few",
        advise,
    )]
}

async fn advice(agent: &Agent) -> Result<WorkloadAdvice> {
    let mut list: AdviceList = agent.json(&["advise", "advised"]).await?;
    list.workloads.pop().context("no advice")
}

/// Runs and stops a pod of the Deployment `advised`, one of whose connections is open when it stops.
async fn run_and_stop(scene: &Scene, kubelet: &Kubelet, n: usize, cuts: bool) -> Result<()> {
    let spec = PodSpec::new(&format!("advised-5d9c-{n}"))
        .label("pod-template-hash", "5d9c")
        .grace(6 * SECOND)
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    drop(Peer::served(pod.v4(8080)?).await?);
    let path = if cuts {
        "/slow?ms=60000"
    } else {
        "/slow?ms=1000"
    };
    let mut peer = Peer::asking(pod.v4(8080)?, path).await?;
    let answered = async {
        if !cuts {
            peer.answer("slow\n").await?;
        }
        drop(peer);
        anyhow::Ok(())
    };
    let stopped = match cuts {
        // The connection stays open until the stop has returned.
        true => kubelet.stop(&pod, 6 * SECOND).await,
        false => {
            let (stopped, answered) = tokio::join!(kubelet.stop(&pod, 6 * SECOND), answered);
            answered?;
            stopped
        }
    };
    ensure!(stopped.error().is_none(), "{stopped:?}");
    Ok(())
}

async fn advise(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let out = agent.verb(&["advise", "advised"]).await?;
    let text = String::from_utf8(out.stderr)?;
    ensure!(
        out.status.success() && text.contains("no drain yet"),
        "{text}"
    );
    for n in 0..3 {
        run_and_stop(&scene, &kubelet, n, false).await?;
    }
    let few = advice(&agent).await?;
    ensure!(few.advice.drains == 3, "{few:?}");
    ensure!(few.advice.enough_grace_ms.is_none(), "{few:?}");
    let table = agent.query(&["advise", "--no-headers"]).await?;
    ensure!(table.contains("3 drains: too few to advise"), "{table}");

    run_and_stop(&scene, &kubelet, 3, false).await?;
    run_and_stop(&scene, &kubelet, 4, true).await?;
    let advised = advice(&agent).await?;
    let a = &advised.advice;
    ensure!(
        (advised.namespace.as_str(), advised.workload.as_str()) == ("default", "advised"),
        "{advised:?}"
    );
    ensure!((a.drains, a.cut, a.cut_short) == (5, 1, 1), "{a:?}");
    let drain = a.drain.context("no drains")?;
    // The deadline of 4 s counts from the arrival of the stop, before the agent lists the pods.
    ensure!(drain.p50_ms < drain.p99_ms && drain.p99_ms >= 3000, "{a:?}");
    let settle = a.settle.context("no settling")?;
    ensure!((300..4000).contains(&settle.p50_ms), "{a:?}");
    // At least the one connection of each pod that was closed before its stop, and the slow ones.
    let lifetimes = a.lifetimes.context("no lifetimes")?;
    ensure!(lifetimes.connections >= 8, "{a:?}");
    ensure!(lifetimes.p99_ms.is_some_and(|ms| ms >= 5000), "{a:?}");
    // The longest drain lasted for the whole deadline of 4 s, and its connection somewhat longer.
    ensure!(
        a.grace_ms == Some(6000),
        "by the deadline of the last drain: {a:?}"
    );
    let set = a.recommendations.first().map(|r| r.set.as_str());
    ensure!(
        set.is_some_and(|set| set.starts_with("terminationGracePeriodSeconds: ")),
        "{a:?}"
    );
    let enough = a.enough_grace_ms.context("no grace period")?;
    ensure!(enough >= 10_000 && enough % 5000 == 0, "{a:?}");

    // Another agent knows the drains, but not how long the connections lasted.
    agent.stop().await?;
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let later = advice(&agent).await?;
    ensure!(
        later.advice.drains == 5 && later.advice.cut == 1,
        "{later:?}"
    );
    ensure!(later.advice.enough_grace_ms.is_none(), "{later:?}");
    agent.stop().await
}
