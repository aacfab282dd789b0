//! `ebb doctor` and `ebb explain` on a real node.

use anyhow::{Context as _, Result, ensure};
use ebb::{
    host::doctor::{Diagnosis, Status},
    report::view::{Explanation, Origin},
};
use ebb_node::kubelet::{ContainerSpec, PodSpec};
use libtest_mimic::Trial;

use crate::{
    agent::{Agent, Proxy},
    hold::stop,
    peer::Peer,
    scene::{SECOND, Scene, eventually, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "doctor_finds_this_node_able_and_names_what_is_missing",
            node,
        ),
        trial(
            "doctor_sees_a_first_process_that_is_deaf_and_old_connections",
            pod,
        ),
        trial("explain_says_why_a_stop_was_held_and_by_what", held),
        trial("explain_says_why_stops_were_passed", passed),
    ]
}

/// Runs `ebb doctor` as JSON, and gives its exit status, too.
async fn doctor(
    scene: &Scene,
    agent: &Agent,
    proxy: &Proxy,
    more: &[&str],
) -> Result<(Diagnosis, Option<i32>)> {
    let socket = scene
        .node
        .socket()
        .to_str()
        .context("a path that is text")?
        .to_owned();
    let proxy = proxy.socket.to_str().context("a path that is text")?;
    let verb = [
        "doctor",
        "-o",
        "json",
        "--runtime",
        &socket,
        "--proxy",
        proxy,
    ];
    let out = agent.verb(&[&verb, more].concat()).await?;
    let text = String::from_utf8_lossy(&out.stdout);
    let diagnosis = serde_json::from_str(&text)
        .with_context(|| format!("{text}{}", String::from_utf8_lossy(&out.stderr)))?;
    Ok((diagnosis, out.status.code()))
}

fn status(diagnosis: &Diagnosis, name: &str) -> Option<Status> {
    let check = diagnosis.checks.iter().find(|c| c.name == name);
    check.map(|c| c.status)
}

async fn node(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let (diagnosis, code) = doctor(&scene, &agent, &proxy, &[]).await?;
    for name in [
        "kernel",
        "kernel types",
        "capabilities",
        "cgroup v2",
        "runtime",
        "agent",
        "proxy",
        "proxy's runtime",
    ] {
        ensure!(
            status(&diagnosis, name) == Some(Status::Ok),
            "{name}: {diagnosis:?}"
        );
    }
    // There is none on this node.
    ensure!(
        status(&diagnosis, "kubelet") == Some(Status::Warn),
        "{diagnosis:?}"
    );
    ensure!(code == Some(0), "{code:?}");

    agent.stop().await?;
    proxy.stop().await?;
    let gone = scene.agent_in("other", &[]).await?;
    let nowhere = [
        "doctor",
        "--runtime",
        "/nowhere.sock",
        "--proxy",
        "/nowhere/either.sock",
    ];
    let out = gone.verb(&nowhere).await?;
    ensure!(out.status.code() == Some(11), "{out:?}");
    let text = String::from_utf8_lossy(&out.stdout);
    ensure!(
        text.lines().any(|l| l.starts_with("FAIL  runtime")),
        "{text}"
    );
    ensure!(
        text.lines().any(|l| l.starts_with("warn  proxy ")),
        "{text}"
    );
    Ok(())
}

async fn pod(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let deaf = ContainerSpec::fixture("deaf", &["serve", "--port", "8081", "--deaf"]);
    let spec = PodSpec::new("patient-sick")
        .grace(3 * SECOND)
        .annotation("ebb.dev/untill", "idle")
        .container(server("app", 8080))
        .container(deaf);
    let pod = scene.run(spec).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    // Three seconds, less the reserve of one, are soon over.
    let diagnosis = eventually("the connection is older than a hold", async || {
        let (diagnosis, code) = doctor(&scene, &agent, &proxy, &["patient-sick"]).await?;
        ensure!(code == Some(0), "warnings only: {diagnosis:?}");
        Ok((status(&diagnosis, "grace period") == Some(Status::Warn)).then_some(diagnosis))
    })
    .await?;
    ensure!(
        status(&diagnosis, "container app") == Some(Status::Ok),
        "{diagnosis:?}"
    );
    ensure!(
        status(&diagnosis, "container deaf") == Some(Status::Warn),
        "{diagnosis:?}"
    );
    ensure!(
        status(&diagnosis, "policy") == Some(Status::Warn),
        "{diagnosis:?}"
    );
    let (_, code) = doctor(&scene, &agent, &proxy, &["nobody"])
        .await
        .map_or((None, Some(10)), |(d, c)| (Some(d), c));
    ensure!(code == Some(10), "{code:?}");
    Ok(())
}

async fn explain(agent: &Agent, pod: &str) -> Result<Explanation> {
    let text = agent.query(&["explain", pod, "-o", "json"]).await?;
    Ok(serde_json::from_str(&text)?)
}

async fn held(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("explained")
        .annotation("ebb.dev/reserve", "2s")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("explained").await?;
    let now = explain(&agent, "explained").await?;
    let policy = now.now.as_ref().context("it is still here")?;
    let from = |name: &str| {
        let setting = policy.settings.iter().find(|s| s.name == name);
        setting.map(|s| (s.value.as_str(), s.from))
    };
    ensure!(
        from("reserve") == Some(("2s", Origin::Annotation)),
        "{now:?}"
    );
    ensure!(from("quiet") == Some(("300ms", Origin::Node)), "{now:?}");
    ensure!(from("until") == Some(("zero", Origin::Default)), "{now:?}");
    ensure!(
        policy.deadline_ms == 28_000 && policy.reserve_ms == 2_000,
        "{now:?}"
    );
    ensure!(now.stops.len() == 1 && now.stops[0].held, "{now:?}");
    ensure!(
        now.stops[0].held_ms.is_none() && now.drain.is_some(),
        "{now:?}"
    );
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");

    // Also when it is gone.
    scene.kubelet()?.remove(&pod).await?;
    let over = explain(&agent, "explained").await?;
    ensure!(over.now.is_none(), "{over:?}");
    let first = over.stops.last().context("a stop")?;
    ensure!(
        first.call == "StopContainer" && first.container.as_deref() == Some("app"),
        "{over:?}"
    );
    ensure!(
        first.timeout_ms == Some(30_000) && first.ending == Some(true),
        "{over:?}"
    );
    ensure!(
        first.evidence.as_deref() == Some("hold-unknown"),
        "{over:?}"
    );
    ensure!(
        first.reason.as_deref() == Some("drained") && first.held_ms.is_some(),
        "{over:?}"
    );
    let text = agent.query(&["explain", "explained"]).await?;
    ensure!(text.contains("released (drained)"), "{text}");
    Ok(())
}

async fn passed(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("puzzling").await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    kubelet
        .stop_container(&pod.containers[0], 30 * SECOND)
        .await?;
    let told = explain(&agent, "puzzling").await?;
    let stop = told.stops.first().context("a stop")?;
    ensure!(!stop.held && stop.ending.is_none(), "{told:?}");
    ensure!(
        stop.reason.as_deref() == Some("not-terminating"),
        "{told:?}"
    );
    ensure!(
        stop.evidence.as_deref() == Some("only-container"),
        "{told:?}"
    );

    // What the proxy decides by itself, it tells.
    let evicted = scene.serve("evicted").await?;
    kubelet
        .stop_container(&evicted.containers[0], 2 * SECOND)
        .await?;
    let stop = eventually("the agent has heard of it", async || {
        Ok(explain(&agent, "evicted").await?.stops.into_iter().next())
    })
    .await?;
    ensure!(stop.reason.as_deref() == Some("no-time"), "{stop:?}");
    ensure!(stop.timeout_ms == Some(2_000), "{stop:?}");
    let metric = "ebb_holds_passed_total{reason=\"no-time\",evidence=\"none\"}";
    ensure!(agent.metric(metric).await? == 1);

    // Also when the agent was away meanwhile.
    let missed = scene.serve("missed").await?;
    agent.stop().await?;
    kubelet
        .stop_container(&missed.containers[0], 30 * SECOND)
        .await?;
    let agent = scene.agent(&[]).await?;
    let stop = eventually("the agent has heard of it", async || {
        Ok(explain(&agent, "missed").await?.stops.into_iter().next())
    })
    .await?;
    ensure!(stop.reason.as_deref() == Some("agent-away"), "{stop:?}");
    Ok(())
}
