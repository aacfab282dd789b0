//! `--drain=observe`: stops are forwarded at once, and the reports say what a hold would have been.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::{ReleaseReason, Report};
use ebb_protocol::views::SettingSource;
use ebb_testkit::{
    api_server::{AnswerMode, ApiServer, Faults},
    http,
    kubelet::{ContainerSpec, PodSpec},
};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::{Agent, timed},
    hold::stop,
    kube::Cluster,
    peer::Peer,
    scene::{NODE_V4, SECOND, SOON, Scene, eventually, free_port, server, trial},
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "an_observed_stop_is_not_delayed_and_its_report_names_what_it_cut",
            cut,
        ),
        trial(
            "an_observed_pod_that_drains_is_reported_with_the_hold_that_it_would_have_had",
            drained,
        ),
        trial("a_wait_of_an_observed_pod_returns_at_once", waits),
        trial(
            "a_namespace_is_observed_but_its_pod_that_is_on_is_held",
            namespace,
        ),
        trial(
            "an_observed_restart_leaves_no_report_and_no_event",
            restarted,
        ),
        trial(
            "without_the_right_to_watch_namespaces_the_log_says_so_once",
            forbidden,
        ),
    ]
}

/// The report of a pod's only drain, once that is over.
async fn over(agent: &Agent, pod: &str) -> Result<Report> {
    eventually("the observed drain is over", async || {
        let drains = agent.drains(pod).await?;
        Ok(drains.into_iter().find(|r| r.reason.is_some()))
    })
    .await
}

async fn cut(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--drain", "observe"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("observed")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = scene.run(spec).await?;
    let busy = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let left = Peer::served(pod.v4(8081)?).await?;
    drop(left);
    let (stop, took) = timed(scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND)).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(took < 4 * SECOND, "stopped after {took:?}");
    for container in &pod.containers {
        let timeouts = scene.stop_timeouts(&container.id)?;
        ensure!(timeouts == [30], "the whole timeout: {timeouts:?}");
    }

    let report = over(&agent, "observed").await?;
    ensure!(
        report.observed && report.reason == Some(ReleaseReason::Exited),
        "{report:?}"
    );
    ensure!(report.holds == 0 && report.held_ms < 4000, "{report:?}");
    ensure!(report.deadline_ms == 25_000, "{report:?}");
    ensure!(report.cut_total == Some(1), "{report:?}");
    ensure!(report.cut[0].remote == busy.address, "{report:?}");
    let explanation = agent.explain(&pod.spec.uid).await?;
    let stops = explanation.stops.iter();
    let stops: Vec<_> = stops.filter(|s| s.call == "StopContainer").collect();
    ensure!(
        stops.len() == 2
            && stops
                .iter()
                .all(|s| !s.held && s.reason.as_deref() == Some("observe")),
        "{stops:?}"
    );
    let text = agent.query(&["explain", &pod.spec.uid]).await?;
    ensure!(
        text.contains("ebb observed its last drain") && text.contains("cut 1 connection"),
        "{text}"
    );
    let table = agent.query(&["drains", "observed", "--no-headers"]).await?;
    ensure!(table.trim_end().ends_with("1  observed: exited"), "{table}");
    let workload = "namespace=\"default\",workload=\"none\"";
    let cut = agent.counted("ebb_observed_flows_cut_total", workload);
    ensure!(cut.await? == 1);
    ensure!(agent.counted("ebb_flows_cut_total", workload).await? == 0);
    ensure!(agent.metric("ebb_drains_active").await? == 0);
    let observed = format!("{workload},reason=\"exited\"");
    ensure!(
        agent
            .counted("ebb_observed_drains_total", &observed)
            .await?
            == 1
    );
    let log = std::fs::read_to_string(agent.log())?;
    ensure!(
        log.contains("DrainObserved: ebb would have held it"),
        "{log}"
    );
    ensure!(!log.contains("DrainStarted"), "{log}");
    agent.stop().await
}

async fn drained(scene: Scene) -> Result<()> {
    let flags = ["--drain", "observe", "--hold-unknown", "--quiet", "500ms"];
    let agent = scene.agent(&flags).await?;
    let proxy = scene.proxy(&agent).await?;
    // It ignores the stop signal, so it serves its client to the end.
    let app = ContainerSpec::fixture("app", &["serve", "--port", "8080", "--no-signal-handlers"]);
    let grace = 15 * SECOND;
    let pod = scene
        .run(
            PodSpec::new("observed-to-its-end")
                .grace(grace)
                .container(app),
        )
        .await?;
    let mut slow = Peer::asking(pod.v4(8080)?, "/slow?ms=3000").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, grace);
    let under_way = agent.until_draining("observed-to-its-end").await?;
    ensure!(under_way.observed && under_way.holds == 0, "{under_way:?}");
    slow.answer("slow\n").await?;
    drop(slow);
    let report = over(&agent, "observed-to-its-end").await?;
    ensure!(!stopping.is_finished(), "known before the container exits");
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!((2000..6000).contains(&report.held_ms), "{report:?}");
    ensure!(
        report.cut_total == Some(0) && report.ended == Some(1),
        "{report:?}"
    );
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(agent.drains("observed-to-its-end").await?.len() == 1);
    agent.stop().await
}

async fn waits(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--drain", "observe"]).await?;
    let pod = scene.serve("observed-wait").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
    let kubelet = scene.kubelet()?;
    let (out, took) = timed(dial(&kubelet, &pod.containers[0], url)).await;
    let out = out??;
    ensure!(took < 5 * SECOND, "{took:?}");
    let report: Report = serde_json::from_slice(&out.stdout)?;
    ensure!(report.observed && report.reason.is_none(), "{report:?}");
    ensure!(
        report.flows_at_start.is_some_and(|f| f.total() == 1),
        "{report:?}"
    );
    agent.stop().await
}

async fn namespace(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    c.api
        .annotate_namespace("gentle", "ebb.dev/drain", Some("observe"));
    let spec = |name: &str| {
        let mut spec = PodSpec::new(name).container(server("app", 8080));
        spec.namespace = "gentle".into();
        spec
    };
    let observed = c.run(spec("of-namespace")).await?;
    let on = c
        .run(spec("on-itself").annotation("ebb.dev/drain", "on"))
        .await?;
    eventually("the agent reads the namespace's annotation", async || {
        let now = c.agent.explain("of-namespace").await?.now;
        let now = now.context("the pod is unknown")?;
        let drain = now.settings.into_iter().find(|s| s.name == "drain");
        Ok(drain.filter(|s| s.value == "observe" && s.from == SettingSource::Namespace))
    })
    .await?;
    let peer = Peer::served(on.v4(8080)?).await?;
    c.api.delete(&on.spec, 30 * SECOND);
    c.is_held(&on, peer, "deleting").await?;

    let peer = Peer::asking(observed.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&observed.spec, 30 * SECOND);
    let (stop, took) = timed(c.kubelet()?.stop(&observed, 30 * SECOND)).await;
    ensure!(
        stop.error().is_none() && took < 4 * SECOND,
        "{took:?}: {stop:?}"
    );
    // As the kubelet does when the pod has ended.
    c.api.remove(&observed.spec);
    let report = over(&c.agent, "of-namespace").await?;
    ensure!(
        report.observed && report.reason == Some(ReleaseReason::Exited),
        "{report:?}"
    );
    ensure!(
        report.cut_total == Some(1) && report.cut[0].remote == peer.address,
        "{report:?}"
    );
    let event = eventually("the Event", async || {
        let mut events = c.api.events();
        events.retain(|e| e["reason"] == "DrainObserved");
        Ok(events.pop())
    })
    .await?;
    let note = event["note"].as_str().unwrap_or_default();
    ensure!(
        note.contains("would have held it for longer") && note.contains("1 cut: "),
        "{note}"
    );
    // The namespace is on again.
    c.api.annotate_namespace("gentle", "ebb.dev/drain", None);
    let later = c.run(spec("later")).await?;
    let peer = Peer::served(later.v4(8080)?).await?;
    c.api.delete(&later.spec, 30 * SECOND);
    c.is_held(&later, peer, "deleting").await
}

async fn restarted(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--drain", "observe"]).await?;
    let mut pod = c.serve("observed-restart").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let container = pod.container("app")?;
    let stopped = timed(c.kubelet()?.stop_container(container, 30 * SECOND)).await;
    stopped.0?;
    ensure!(stopped.1 < 4 * SECOND, "{:?}", stopped.1);
    c.kubelet()?.restart(&mut pod, "app", 1).await?;
    http::until_open(pod.v4(8080)?, SOON).await?;
    let stops = eventually("the stop is classified", async || {
        let stops = c.stops(&pod).await?;
        Ok((!stops.is_empty()).then_some(stops))
    })
    .await?;
    ensure!(
        stops[0].reason.as_deref() == Some("not-terminating"),
        "{stops:?}"
    );
    sleep(Duration::from_secs(3)).await;
    let drains = c.agent.drains("observed-restart").await?;
    ensure!(drains.is_empty(), "{drains:?}");
    ensure!(c.api.events().is_empty(), "{:?}", c.api.events());
    Ok(())
}

async fn forbidden(scene: Scene) -> Result<()> {
    let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
    api.misbehave(Faults {
        namespaces: AnswerMode::Status(403),
        ..Faults::default()
    });
    let c = Cluster::start_with(scene, api, &["--drain", "observe"]).await?;
    c.until_watched().await?;
    c.serve("forbidden").await?;
    sleep(3 * SECOND).await;
    let now = c.agent.explain("forbidden").await?.now;
    let now = now.context("the pod is unknown")?;
    let why = now.never_held.unwrap_or_default();
    ensure!(why.contains("observe"), "{why}");
    let log = std::fs::read_to_string(c.agent.log())?;
    ensure!(
        log.matches("list or watch namespaces").count() == 1,
        "{log}"
    );
    Ok(())
}
