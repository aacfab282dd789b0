//! `ebb doctor` and `ebb explain` on a real node.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use ebb::host::doctor::{Check, CheckStatus, Diagnosis};
use ebb_protocol::views::{Explanation, SettingSource};
use ebb_testkit::kubelet::{ContainerSpec, PodSpec};
use libtest_mimic::Trial;
use tokio::process::Command;

use crate::{
    agent::{Agent, EBB, Proxy},
    hold::stop,
    peer::Peer,
    scene::{ExclusiveScene, SECOND, Scene, directory, eventually, server, trial, trial_alone},
    schema,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("doctor_passes_on_this_node_and_names_what_is_missing", node),
        trial(
            "doctor_warns_of_a_process_that_ignores_its_stop_signal_and_of_old_connections",
            pod,
        ),
        trial(
            "explain_shows_why_a_stop_was_held_and_with_which_settings",
            held,
        ),
        trial("explain_shows_why_stops_were_not_held", not_held),
        trial(
            "explain_and_doctor_agree_that_a_grace_period_of_two_seconds_is_never_held",
            grace_of_two,
        ),
        trial_alone(
            "doctor_in_a_container_finds_that_the_kubelet_uses_the_proxy_and_fails_without_an_agent",
            in_a_container,
        ),
        trial(
            "a_restarted_agent_knows_the_drains_and_stops_of_the_one_before",
            remembered,
        ),
    ]
}

/// Runs `ebb doctor -o json`. Returns the diagnosis and the exit status.
pub(crate) async fn doctor(
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
    let diagnosis =
        schema::parse(&text).with_context(|| String::from_utf8_lossy(&out.stderr).into_owned())?;
    Ok((diagnosis, out.status.code()))
}

fn status(diagnosis: &Diagnosis, name: &str) -> Option<CheckStatus> {
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
            status(&diagnosis, name) == Some(CheckStatus::Ok),
            "{name}: {diagnosis:?}"
        );
    }
    // This node has no kubelet.
    ensure!(
        status(&diagnosis, "kubelet") == Some(CheckStatus::Warn),
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
    let deaf = ContainerSpec::fixture("deaf", &["serve", "--port", "8081", "--no-signal-handlers"]);
    let spec = PodSpec::new("patient-sick")
        .grace(3 * SECOND)
        .annotation("ebb.dev/untill", "idle")
        .container(server("app", 8080))
        .container(deaf);
    let pod = scene.run(spec).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    // The longest hold is only 3 s, less the reserve of 1 s.
    let diagnosis = eventually("the connection is older than a hold", async || {
        let (diagnosis, code) = doctor(&scene, &agent, &proxy, &["patient-sick"]).await?;
        ensure!(code == Some(0), "warnings only: {diagnosis:?}");
        Ok((status(&diagnosis, "grace period") == Some(CheckStatus::Warn)).then_some(diagnosis))
    })
    .await?;
    ensure!(
        status(&diagnosis, "container app") == Some(CheckStatus::Ok),
        "{diagnosis:?}"
    );
    ensure!(
        status(&diagnosis, "container deaf") == Some(CheckStatus::Warn),
        "{diagnosis:?}"
    );
    ensure!(
        status(&diagnosis, "policy") == Some(CheckStatus::Warn),
        "{diagnosis:?}"
    );
    let (_, code) = doctor(&scene, &agent, &proxy, &["no-such-pod"])
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
    let policy = now.now.as_ref().context("the pod is gone")?;
    let from = |name: &str| {
        let setting = policy.settings.iter().find(|s| s.name == name);
        setting.map(|s| (s.value.as_str(), s.from))
    };
    ensure!(
        from("reserve") == Some(("2s", SettingSource::Annotation)),
        "{now:?}"
    );
    ensure!(
        from("quiet") == Some(("300ms", SettingSource::Node)),
        "{now:?}"
    );
    ensure!(
        from("until") == Some(("zero", SettingSource::Default)),
        "{now:?}"
    );
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

    // `ebb explain` also knows a pod that is gone.
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

async fn not_held(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("puzzling").await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    kubelet
        .stop_container(&pod.containers[0], 30 * SECOND)
        .await?;
    let explanation = explain(&agent, "puzzling").await?;
    let stop = explanation.stops.first().context("a stop")?;
    ensure!(!stop.held && stop.ending.is_none(), "{explanation:?}");
    ensure!(
        stop.reason.as_deref() == Some("not-terminating"),
        "{explanation:?}"
    );
    ensure!(
        stop.evidence.as_deref() == Some("only-container"),
        "{explanation:?}"
    );

    // The proxy reports stops that it forwards without asking the agent.
    let evicted = scene.serve("evicted").await?;
    kubelet
        .stop_container(&evicted.containers[0], 2 * SECOND)
        .await?;
    let stop = eventually("the proxy has reported the stop", async || {
        Ok(explain(&agent, "evicted").await?.stops.into_iter().next())
    })
    .await?;
    ensure!(stop.reason.as_deref() == Some("no-time"), "{stop:?}");
    ensure!(stop.timeout_ms == Some(2_000), "{stop:?}");
    let metric = "ebb_holds_bypassed_total{reason=\"no-time\",evidence=\"none\"}";
    ensure!(agent.metric(metric).await? == 1);

    // It also reports those that it forwarded while no agent was running.
    let missed = scene.serve("missed").await?;
    agent.stop().await?;
    kubelet
        .stop_container(&missed.containers[0], 30 * SECOND)
        .await?;
    let agent = scene.agent(&[]).await?;
    let stop = eventually("the proxy has reported the stop", async || {
        Ok(explain(&agent, "missed").await?.stops.into_iter().next())
    })
    .await?;
    ensure!(stop.reason.as_deref() == Some("agent-away"), "{stop:?}");
    Ok(())
}

async fn grace_of_two(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("hasty")
        .grace(2 * SECOND)
        .container(server("app", 8080));
    scene.run(spec).await?;
    let explanation = explain(&agent, "hasty").await?;
    let policy = explanation.now.as_ref().context("the pod is gone")?;
    ensure!(
        policy.deadline_ms == 0 && policy.never_held.is_some(),
        "{explanation:?}"
    );
    let text = agent.query(&["explain", "hasty"]).await?;
    ensure!(text.contains("No stop of it is held"), "{text}");
    let (diagnosis, _) = doctor(&scene, &agent, &proxy, &["hasty"]).await?;
    let mut checks = diagnosis.checks.iter();
    let said = checks.any(|c| c.detail.contains("no stop of it is held"));
    ensure!(said, "{diagnosis:?}");
    ensure!(
        status(&diagnosis, "grace period").is_none(),
        "{diagnosis:?}"
    );
    Ok(())
}

/// A process that is called kubelet, with a configuration in a directory that the doctor's container does not have.
async fn in_a_container(scene: ExclusiveScene) -> Result<()> {
    let (agent, proxy) = scene.ebb(&[]).await?;
    let hidden = directory(&scene.directory, "kubelet")?;
    let config = hidden.join("config.yaml");
    fs::write(
        &config,
        format!(
            "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: unix://{}\n",
            proxy.socket.display()
        ),
    )?;
    let program = hidden.join("kubelet");
    fs::write(&program, "#!/bin/sh\nsleep 600\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let _kubelet = Command::new(&program)
        .arg(format!("--config={}", config.display()))
        .kill_on_drop(true)
        .spawn()?;
    let socket = agent.socket();
    let doctor = async || doctor_without(&scene, &proxy, &hidden, &socket).await;
    // The process has its name only after its exec.
    let not_restarted = eventually("the doctor sees the kubelet", async || {
        let (diagnosis, _) = doctor().await?;
        let is_proxy = |check: &Check| {
            check.name == "kubelet's endpoint" && check.detail.contains("(the proxy)")
        };
        Ok(diagnosis.checks.into_iter().find(is_proxy))
    })
    .await?;
    ensure!(
        not_restarted.status == CheckStatus::Warn && not_restarted.why.is_some(),
        "{not_restarted:?}"
    );
    let client = scene.node.kubelet_at(&proxy.socket)?;
    ensure!(client.is_ready().await?);
    let (diagnosis, code) = doctor().await?;
    ensure!(
        status(&diagnosis, "kubelet's endpoint") == Some(CheckStatus::Ok),
        "{diagnosis:?}"
    );
    ensure!(code == Some(0), "{diagnosis:?}");
    agent.stop().await?;
    let (diagnosis, code) = doctor().await?;
    ensure!(
        status(&diagnosis, "agent") == Some(CheckStatus::Fail) && code == Some(11),
        "{diagnosis:?}"
    );
    Ok(())
}

/// Runs `ebb doctor` in a mount namespace where the directory `hidden` is empty.
async fn doctor_without(
    scene: &ExclusiveScene,
    proxy: &Proxy,
    hidden: &Path,
    agent: &Path,
) -> Result<(Diagnosis, Option<i32>)> {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg(r#"mount -t tmpfs tmpfs "$0" && exec "$@""#)
        .arg(hidden)
        .args([EBB, "doctor", "-o", "json", "--proxy"])
        .arg(&proxy.socket)
        .arg("--runtime")
        .arg(scene.node.socket())
        .arg("--agent")
        .arg(agent);
    let out = command.output().await?;
    let diagnosis = schema::parse(&String::from_utf8_lossy(&out.stdout))
        .with_context(|| String::from_utf8_lossy(&out.stderr).into_owned())?;
    Ok((diagnosis, out.status.code()))
}

async fn remembered(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("yesterday").await?;
    let stopped = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    scene.kubelet()?.remove(&pod).await?;
    let before = agent.drain("yesterday").await?;
    let stops = agent.explain("yesterday").await?.stops;
    // A killed agent loses at most the last second.
    eventually("the history is saved", async || {
        let saved = fs::read_to_string(agent.run.join("history")).unwrap_or_default();
        Ok((saved.lines().count() > stops.len()).then_some(()))
    })
    .await?;
    agent.kill().await?;

    let agent = scene.agent(&[]).await?;
    ensure!(agent.drain("yesterday").await? == before);
    ensure!(agent.explain("yesterday").await?.stops == stops);
    let run = agent.run.clone();
    agent.stop().await?;

    // A damaged file is no reason not to start.
    fs::write(run.join("history"), "{\"drain\":")?;
    let agent = scene.agent(&[]).await?;
    ensure!(agent.drains("yesterday").await?.is_empty());
    let log = fs::read_to_string(agent.log())?;
    ensure!(log.contains("history"), "{log}");
    agent.stop().await
}
