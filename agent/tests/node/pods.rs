//! The list of pods, and their annotations.

use anyhow::{Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use ebb_protocol::views::Network;
use ebb_testkit::kubelet::PodSpec;
use libtest_mimic::Trial;

use crate::{
    peer::Peer,
    scene::{SECOND, Scene, eventually, free_port, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "bad_annotations_are_named_and_the_defaults_apply",
            bad_annotations,
        ),
        trial(
            "a_new_pod_with_the_name_of_an_old_one_is_a_different_pod",
            replaced,
        ),
        trial("pods_are_listed_as_the_runtime_lists_them", listed),
    ]
}

async fn bad_annotations(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("typo")
        .annotation("ebb.dev/quiet", "soon")
        .annotation("ebb.dev/untill", "idle")
        .annotation("ebb.dev/max-hold", "30")
        .annotation("example.com/quiet", "soon")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let expected = [
        ("ebb.dev/quiet", "\"soon\""),
        ("ebb.dev/untill", "ebb.dev/until"),
        ("ebb.dev/max-hold", "30s"),
    ];
    let named = |warnings: &[String]| {
        warnings.len() == expected.len()
            && expected.iter().all(|(name, says)| {
                let about = format!("annotation {name}: ");
                warnings
                    .iter()
                    .any(|w| w.starts_with(&about) && w.contains(says))
            })
    };
    let view = agent.pod("typo").await?;
    ensure!(named(&view.warnings), "{:#?}", view.warnings);

    let stopping = crate::hold::stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("typo").await?;
    tokio::time::sleep(SECOND).await;
    // `until` is still zero: the idle flow holds.
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("typo").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.deadline_ms >= 24_000, "{report:?}");
    ensure!(named(&report.warnings), "{report:?}");
    Ok(())
}

async fn replaced(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let old = scene.serve("again").await?;
    ensure!(agent.pod("again").await?.pod.uid.as_str() == old.spec.uid);
    let peer = Peer::served(old.v4(8080)?).await?;
    ensure!(agent.flows("again").await?.len() == 1);
    drop(peer);
    let stop = kubelet.stop(&old, 10 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(
        agent.pods("again").await?.is_empty(),
        "a stopped pod is listed"
    );
    let out = agent.verb(&["flows", "again"]).await?;
    ensure!(out.status.code() == Some(10), "{out:?}");

    // The old sandbox still exists, because a kubelet removes it later.
    let new = scene.serve("again").await?;
    let peer = Peer::served(new.v4(8080)?).await?;
    let view = agent.pod("again").await?;
    ensure!(view.pod.uid.as_str() == new.spec.uid, "{view:?}");
    ensure!(view.ips == new.ips, "{view:?}");
    let flows = agent.flows("again").await?;
    ensure!(
        flows.len() == 1 && flows[0].remote == peer.address,
        "{flows:?}"
    );
    kubelet.remove(&old).await?;
    ensure!(agent.flows("again").await?.len() == 1);

    // The new pod gets a drain of its own, because the old pod's is over.
    let stopping = crate::hold::stop(kubelet, &new, 10 * SECOND);
    let begun = agent.until_draining("again").await?;
    ensure!(begun.pod.uid.as_str() == new.spec.uid, "{begun:?}");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let drains = agent.drains("again").await?;
    ensure!(drains.len() == 2, "{drains:?}");
    ensure!(
        drains[0].pod.uid.as_str() == new.spec.uid,
        "newest first: {drains:?}"
    );
    Ok(())
}

async fn listed(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let spec = PodSpec::new("listed")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = scene.run(spec).await?;
    let host = PodSpec::new("listed-host").host_network();
    scene
        .run(host.container(server("app", free_port())))
        .await?;
    let view = agent.pod("listed").await?;
    ensure!(
        view.pod.namespace == "default" && view.network == Network::Pod,
        "{view:?}"
    );
    ensure!(view.ips == pod.ips && view.ips.len() == 2, "{view:?}");
    let containers: Vec<_> = view
        .containers
        .iter()
        .map(|c| (&*c.name, c.id.as_str()))
        .collect();
    let expected: Vec<_> = pod.containers.iter().map(|c| (&*c.name, &*c.id)).collect();
    ensure!(containers == expected, "{view:?}");
    ensure!(view.containers.iter().all(|c| c.running), "{view:?}");
    ensure!(
        view.untracked.is_none() && view.warnings.is_empty(),
        "{view:?}"
    );
    let view = agent.pod("listed-host").await?;
    ensure!(view.network == Network::Host, "{view:?}");

    // A container that has exited is shown as not running.
    let kubelet = scene.kubelet()?;
    kubelet
        .stop_container(pod.container("side")?, 2 * SECOND)
        .await?;
    eventually("the stop is seen", async || {
        let view = agent.pod("listed").await?;
        let side = view.containers.iter().find(|c| c.name == "side");
        Ok(side.is_none_or(|c| !c.running).then_some(()))
    })
    .await
}
