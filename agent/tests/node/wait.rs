//! `GET /v1/wait` on the node port, the preStop hook.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::{ReleaseReason, Report};
use ebb_testkit::{
    http,
    kubelet::{ExecOutput, PodSpec, PreStop, StartedPod},
};
use libtest_mimic::Trial;
use rustix::net::{AddressFamily, SocketType};
use tokio::time::sleep;

use crate::{
    agent::Agent,
    hold::stop,
    peer::Peer,
    scene::{FIXTURE, NODE_V4, NODE_V6, SECOND, Scene, free_port, server, trial},
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_wait_from_inside_a_pod_ends_with_that_pods_report_when_it_has_drained",
            from_a_pod,
        ),
        trial(
            "a_wait_from_a_host_network_pod_is_identified_by_its_cgroup",
            from_the_host_network,
        ),
        trial("a_caller_in_no_pod_of_the_node_may_not_wait", from_no_pod),
        trial(
            "a_caller_on_the_nodes_loopback_is_not_taken_for_a_pod_with_the_same_addresses",
            with_addresses_of_a_pod,
        ),
        trial("a_wait_ends_at_the_timeout_of_its_request", with_a_timeout),
        trial(
            "a_drain_whose_sandbox_is_gone_can_be_released",
            without_a_sandbox,
        ),
        trial(
            "a_stop_after_a_pre_stop_wait_is_forwarded_at_once_and_belongs_to_the_same_drain",
            pre_stop,
        ),
    ]
}

fn url(agent: &Agent) -> String {
    format!("http://{NODE_V4}:{}/v1/wait", agent.port)
}

fn report(out: &ExecOutput) -> Result<Report> {
    ensure!(out.status == 0, "{out:?}");
    serde_json::from_slice(&out.stdout).with_context(|| format!("no report: {out:?}"))
}

async fn from_a_pod(scene: Scene) -> Result<()> {
    // A second node port, for both families at once.
    let port = free_port();
    let both = format!("[::]:{port}");
    let agent = scene.agent(&["--quiet", "300ms", "--http", &both]).await?;
    let pod = scene.serve("waiter").await?;
    let other = scene.serve("waiter-2").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let others = Peer::served(other.v4(8080)?).await?;
    let kubelet = scene.kubelet()?;
    let waits = [
        dial(&kubelet, &pod.containers[0], url(&agent)),
        dial(
            &kubelet,
            &pod.containers[0],
            format!("http://[{NODE_V6}]:{port}/v1/wait"),
        ),
        dial(
            &kubelet,
            &other.containers[0],
            format!("http://{NODE_V4}:{port}/v1/wait"),
        ),
    ];
    let begun = agent.until_draining("waiter").await?;
    ensure!(
        begun.flows_at_start.is_some_and(|f| f.total() == 1),
        "{begun:?}"
    );
    sleep(2 * SECOND).await;
    ensure!(waits.iter().all(|w| !w.is_finished()), "a wait has ended");
    ensure!(agent.drain("waiter").await?.holds == 2);
    drop(peer);
    let [first, second, third] = waits;
    for wait in [first, second] {
        let report = report(&wait.await??)?;
        ensure!(report.pod.name == "waiter", "{report:?}");
        ensure!(report.pod.uid.as_str() == pod.spec.uid, "{report:?}");
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(
            report.ended == Some(1) && report.cut_total == Some(0),
            "{report:?}"
        );
    }
    ensure!(
        !third.is_finished(),
        "a pod was released by another's drain"
    );
    drop(others);
    let report = report(&third.await??)?;
    ensure!(report.pod.name == "waiter-2", "{report:?}");
    Ok(())
}

async fn from_the_host_network(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let mut pods: Vec<StartedPod> = Vec::new();
    for name in ["host-waiter", "host-waiter-2"] {
        let spec = PodSpec::new(name).host_network();
        pods.push(
            scene
                .run(spec.container(server("app", free_port())))
                .await?,
        );
    }
    let pod = &pods[0];
    let port: u16 = pod.spec.containers[0].args[2].parse()?;
    let peer = Peer::served(pod.v4(port)?).await?;
    let loopback = format!("http://127.0.0.1:{}/v1/wait", agent.port);
    let wait = dial(&scene.kubelet()?, &pod.containers[0], loopback);
    agent.until_draining("host-waiter").await?;
    ensure!(agent.drains("host-waiter-2").await?.is_empty());
    sleep(SECOND).await;
    ensure!(!wait.is_finished(), "the wait has ended");
    drop(peer);
    let report = report(&wait.await??)?;
    ensure!(report.pod.name == "host-waiter", "{report:?}");
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

async fn from_no_pod(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let _pod = scene.serve("bystander").await?;
    // This process is on the host's network, in no pod's cgroup, whatever address it uses.
    for ip in ["127.0.0.1", NODE_V4] {
        let reply = http::get(SocketAddr::new(ip.parse()?, agent.port), "/v1/wait").await?;
        ensure!(reply.status == 403, "{reply:?}");
        let body: serde_json::Value = serde_json::from_slice(&reply.body)?;
        let error = body["error"].as_str().context("no error")?;
        ensure!(error.contains("no pod of this node"), "{error}");
    }
    ensure!(agent.drains("bystander").await?.is_empty());
    Ok(())
}

/// Every namespace has a 127.0.0.1: a pod can connect to itself with the same four-tuple as a connection between a
/// process on the node and the agent.
async fn with_addresses_of_a_pod(scene: Scene) -> Result<()> {
    let port = free_port();
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let agent = scene.agent(&["--http", &at.to_string()]).await?;
    let pod = scene.serve("double").await?;
    let pid = scene.kubelet()?.pid(&pod.containers[0]).await?;
    let within = ebb::linux::netns::Netns::of_process(pid)?;
    // A port that the kernel chooses inside the pod might be in use on the node.
    let from = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let dial = move || -> std::io::Result<TcpStream> {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
        rustix::net::bind(&socket, &from)?;
        rustix::net::connect(&socket, &at)?;
        Ok(TcpStream::from(socket))
    };
    let (_listener, _double) = within.run(|| {
        let listener = TcpListener::bind(at)?;
        Ok((listener, dial()?))
    })?;
    let answer = tokio::task::spawn_blocking(move || -> Result<String> {
        let mut caller = dial()?;
        caller.set_read_timeout(Some(5 * SECOND))?;
        caller.write_all(b"GET /v1/wait HTTP/1.1\r\nHost: ebb\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        caller.read_to_string(&mut answer)?;
        Ok(answer)
    });
    let answer = answer.await?.context("no answer: it waits for the pod")?;
    ensure!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    ensure!(agent.drains("double").await?.is_empty());
    Ok(())
}

async fn with_a_timeout(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let pod = scene.serve("impatient").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = scene.kubelet()?;
    let bad = format!("{}?timeout=soon", url(&agent));
    let out = dial(&kubelet, &pod.containers[0], bad).await??;
    ensure!(out.status != 0, "{out:?}");
    ensure!(
        String::from_utf8_lossy(&out.stdout).contains("timeout is not a duration"),
        "{out:?}"
    );
    ensure!(agent.drains("impatient").await?.is_empty());
    let url = format!("{}?timeout=2s", url(&agent));
    let report = report(&dial(&kubelet, &pod.containers[0], url).await??)?;
    ensure!(report.reason.is_none(), "{report:?}");
    ensure!((1900..4000).contains(&report.held_ms), "{report:?}");
    // The timeout of one request does not end the drain for others.
    let drains = agent.drains("impatient").await?;
    ensure!(
        drains.len() == 1 && drains[0].reason.is_none(),
        "{drains:?}"
    );
    ensure!(drains[0].deadline_ms > 10_000, "{drains:?}");
    Ok(())
}

async fn pre_stop(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let hook = PreStop::Exec(vec![FIXTURE.into(), "get".into(), url(&agent)]);
    let spec = PodSpec::new("hooked").container(server("app", 8080).pre_stop(hook));
    let pod = scene.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("hooked").await?;
    sleep(2 * SECOND).await;
    ensure!(!stopping.is_finished(), "the hook has ended");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let app = &stop.containers[0];
    let (hook, result) = app.pre_stop.as_ref().context("no hook ran")?;
    ensure!(
        result.is_ok() && *hook > Duration::from_millis(1900),
        "{stop:?}"
    );
    let stopped = app.result.as_ref().ok().context("not stopped")?;
    ensure!(*stopped < 3 * SECOND, "{stop:?}");
    ensure!(app.timeout < 29 * SECOND, "{stop:?}");
    let report = agent.drain("hooked").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.ended == Some(1), "{report:?}");
    Ok(())
}

async fn without_a_sandbox(scene: Scene) -> Result<()> {
    // The settle phase is longer than the trial.
    let agent = scene
        .agent(&["--quiet", "2m", "--settle-max", "2m"])
        .await?;
    let pod = scene
        .run(
            PodSpec::new("no-sandbox")
                .grace(200 * SECOND)
                .container(server("app", 8080)),
        )
        .await?;
    let kubelet = scene.kubelet()?;
    let wait = dial(&kubelet, &pod.containers[0], url(&agent));
    agent.until_draining("no-sandbox").await?;
    kubelet.stop_sandbox(&pod).await?;
    kubelet.remove(&pod).await?;
    ensure!(agent.pods("no-sandbox").await?.is_empty(), "still listed");
    ensure!(agent.drain("no-sandbox").await?.reason.is_none());
    agent.query(&["release", "no-sandbox"]).await?;
    let reason = agent.drains("no-sandbox").await?[0].reason;
    ensure!(reason == Some(ReleaseReason::Manual), "{reason:?}");
    // The waiting process has ended with the pod.
    let _ = wait.await;
    Ok(())
}
