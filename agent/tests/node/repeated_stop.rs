//! Stops that are repeated or come out of order, also after a restart of the agent or the proxy.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use ebb_testkit::kubelet::{ContainerSpec, PodSpec};
use k8s_cri::v1::VersionRequest;
use libtest_mimic::Trial;
use rustix::{
    mount::{MountFlags, mount},
    process::{Pid, Signal, kill_process},
};
use tokio::{
    process::{Child, Command},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::{
    agent::{Agent, proxy},
    hold::stop,
    peer::Peer,
    scene::{SECOND, Scene, eventually, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_second_stop_joins_the_hold_and_a_shorter_timeout_shortens_it",
            joins_and_shortens,
        ),
        trial(
            "a_forced_kill_ends_the_hold_of_an_earlier_stop",
            killed_by_a_second,
        ),
        trial(
            "a_sandbox_stop_without_container_stops_is_held_until_the_pod_has_drained",
            sandbox_alone,
        ),
        trial(
            "after_a_killed_proxy_the_next_one_on_its_socket_continues_the_hold",
            proxy_killed,
        ),
        trial(
            "after_a_stopped_agent_the_next_one_continues_the_hold_and_its_deadline",
            agent_stopped,
        ),
        trial(
            "after_a_killed_proxy_and_a_killed_agent_the_next_ones_keep_the_deadline",
            both_killed,
        ),
        trial(
            "after_a_killed_proxy_the_next_one_holds_the_stop_of_the_sandbox",
            sandbox_next,
        ),
        trial(
            "a_stopped_proxy_still_answers_a_slow_stop",
            proxy_stopped_late,
        ),
        trial(
            "no_call_fails_while_proxies_are_replaced_on_the_same_socket",
            replaced,
        ),
        trial("a_full_disk_causes_a_warning_and_ends_no_hold", full_disk),
    ]
}

async fn joins_and_shortens(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("twice").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let call = |timeout: Duration| {
        let (kubelet, container) = (kubelet.clone(), pod.containers[0].clone());
        tokio::spawn(async move { kubelet.stop_container(&container, timeout).await })
    };
    let first = call(90 * SECOND);
    let begun = agent.until_draining("twice").await?;
    ensure!(begun.deadline_ms > 80_000, "{begun:?}");
    // A longer timeout changes nothing, a shorter one shortens the hold.
    let second = call(100 * SECOND);
    agent.until_held_by("twice", 2).await?;
    ensure!(agent.drain("twice").await?.deadline_ms == begun.deadline_ms);
    let joined = Instant::now();
    let third = call(9 * SECOND);
    for call in [first, second, third] {
        call.await??;
    }
    // 9 s less the reserve of a third, plus the container's own exit.
    ensure!(joined.elapsed() < 14 * SECOND, "{:?}", joined.elapsed());
    let report = agent.drain("twice").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.deadline_ms < 25_000, "{report:?}");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(
        timeouts.len() == 3 && timeouts.contains(&3) && timeouts.iter().all(|t| *t < 100),
        "{timeouts:?}"
    );
    Ok(())
}

async fn killed_by_a_second(scene: Scene) -> Result<()> {
    // The settle phase alone would take longer than the release may take.
    let agent = scene.agent(&["--hold-unknown", "--quiet", "10s"]).await?;
    let proxy = scene.proxy(&agent).await?;
    // It ignores the stop signal: only the runtime's kill ends it.
    let app = ContainerSpec::fixture("app", &["serve", "--port", "8080", "--no-signal-handlers"]);
    let pod = scene.run(PodSpec::new("forced").container(app)).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let first = stop_container(&scene, &proxy.socket, &pod)?;
    agent.until_draining("forced").await?;
    let forced = Instant::now();
    let kubelet = scene.kubelet_at(&proxy)?;
    kubelet
        .stop_container(&pod.containers[0], 2 * SECOND)
        .await?;
    first.await??;
    ensure!(forced.elapsed() < 5 * SECOND, "{:?}", forced.elapsed());
    // The drain ended with the container, so its report counts the flow that was cut.
    let report = agent.drain("forced").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.cut_total == Some(1), "{report:?}");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(timeouts.first() == Some(&2), "{timeouts:?}");
    Ok(())
}

async fn sandbox_alone(scene: Scene) -> Result<()> {
    // Without --hold-unknown, because a sandbox is stopped only when its pod ends.
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("sandbox-alone").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let stopping = tokio::spawn({
        let pod = pod.clone();
        async move { kubelet.stop_sandbox(&pod).await }
    });
    agent.until_draining("sandbox-alone").await?;
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "not held");
    drop(peer);
    stopping.await??;
    let report = agent.drain("sandbox-alone").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

/// Starts a proxy with a socket that outlives it, as systemd does.
fn start_activated(scene: &Scene, agent: &Agent, socket: &UnixListener) -> Result<Child> {
    let proxy = proxy(
        scene.node.socket(),
        Path::new("/nowhere/cri.sock"),
        &agent.socket(),
    );
    let passed: OwnedFd = socket.try_clone()?.into();
    let child = Command::new("sh")
        .args([
            "-c",
            r#"exec 3<&0; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@""#,
        ])
        .arg(proxy.as_std().get_program())
        .args(proxy.as_std().get_args())
        .stdin(passed)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    Ok(child)
}

async fn proxy_killed(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let path = scene.directory("systemd")?.join("cri.sock");
    let socket = UnixListener::bind(&path)?;
    let mut proxy = start_activated(&scene, &agent, &socket)?;
    let pod = scene.serve("proxy-killed").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let first = stop_container(&scene, &path, &pod)?;
    let begun = agent.until_draining("proxy-killed").await?;
    proxy.kill().await?;
    ensure!(first.await?.is_err(), "answered by a killed proxy");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(timeouts.is_empty(), "was stopped: {timeouts:?}");

    // Called again before the next proxy accepts: the call waits in the socket's queue.
    let again = stop_container(&scene, &path, &pod)?;
    sleep(2 * SECOND).await;
    ensure!(!again.is_finished(), "refused");
    let _successor = start_activated(&scene, &agent, &socket)?;
    agent.until_resumed("proxy-killed", &begun).await?;
    ensure!(!again.is_finished(), "not held");
    drop(peer);
    again.await??;
    let report = agent.drain("proxy-killed").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

/// The kubelet may not repeat StopContainer: its next call may be StopPodSandbox, which would kill the container.
async fn sandbox_next(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let path = scene.directory("systemd")?.join("cri.sock");
    let socket = UnixListener::bind(&path)?;
    let mut proxy = start_activated(&scene, &agent, &socket)?;
    // StopPodSandbox has no timeout, so ebb uses the grace period of the pod's spec.
    let spec = PodSpec::new("sandbox-next").grace(60 * SECOND);
    let pod = scene.run(spec.container(server("app", 8080))).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let first = stop_container(&scene, &path, &pod)?;
    let begun = agent.until_draining("sandbox-next").await?;
    proxy.kill().await?;
    ensure!(first.await?.is_err(), "answered by a killed proxy");

    let kubelet = scene.node.kubelet_at(&path)?;
    let next = tokio::spawn({
        let pod = pod.clone();
        async move { kubelet.stop_sandbox(&pod).await }
    });
    sleep(SECOND).await;
    ensure!(!next.is_finished(), "refused");
    let _successor = start_activated(&scene, &agent, &socket)?;
    agent.until_resumed("sandbox-next", &begun).await?;
    sleep(SECOND).await;
    ensure!(!next.is_finished(), "not held");
    drop(peer);
    next.await??;
    let report = agent.drain("sandbox-next").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.cut_total == Some(0), "{report:?}");
    Ok(())
}

async fn agent_stopped(scene: Scene) -> Result<()> {
    let first = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&first).await?;
    let pod = scene.serve("handed-over").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let call = stop_container(&scene, &proxy.socket, &pod)?;
    let begun = first.until_draining("handed-over").await?;
    let log = first.log();
    first.stop().await?;
    // The next agent holds the stop, so no connection is reported as cut.
    let log = std::fs::read_to_string(log)?;
    ensure!(
        log.contains("DrainReleased: shutdown") && !log.contains(" cut"),
        "{log}"
    );
    sleep(2 * SECOND).await;
    ensure!(!call.is_finished(), "forwarded without an agent");
    // Without --hold-unknown it can't tell that the pod is ending, but the first agent could.
    let second = scene.agent(&["--quiet", "300ms"]).await?;
    second.until_draining("handed-over").await?;
    second.until_resumed("handed-over", &begun).await?;
    let stops = second.explain("handed-over").await?.stops;
    let evidence = stops.first().and_then(|s| s.evidence.as_deref());
    ensure!(evidence == Some("resumed"), "{stops:?}");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(timeouts.is_empty(), "{timeouts:?}");

    let closed = Instant::now();
    drop(peer);
    call.await??;
    ensure!(closed.elapsed() < 5 * SECOND, "{:?}", closed.elapsed());
    let report = second.drain("handed-over").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    // It was held for more than two seconds.
    ensure!(timeouts.len() == 1 && timeouts[0] <= 58, "{timeouts:?}");
    Ok(())
}

async fn both_killed(scene: Scene) -> Result<()> {
    let flags = ["--hold-unknown", "--quiet", "300ms"];
    let agent = scene.agent(&flags).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("both-killed").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let first = stop_container(&scene, &proxy.socket, &pod)?;
    let begun = agent.until_draining("both-killed").await?;
    proxy.kill().await?;
    agent.kill().await?;
    ensure!(first.await?.is_err(), "answered by a killed proxy");
    sleep(2 * SECOND).await;

    let agent = scene.agent(&flags).await?;
    let proxy = scene.proxy(&agent).await?;
    let again = stop_container(&scene, &proxy.socket, &pod)?;
    agent.until_draining("both-killed").await?;
    agent.until_resumed("both-killed", &begun).await?;
    ensure!(!again.is_finished(), "not held");
    drop(peer);
    again.await??;
    let report = agent.drain("both-killed").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

fn stop_container(
    scene: &Scene,
    socket: &Path,
    pod: &ebb_testkit::kubelet::StartedPod,
) -> Result<tokio::task::JoinHandle<Result<Duration>>> {
    let kubelet = scene.node.kubelet_at(socket)?;
    let container = pod.containers[0].clone();
    Ok(tokio::spawn(async move {
        kubelet.stop_container(&container, 60 * SECOND).await
    }))
}

async fn proxy_stopped_late(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    // It ignores its stop signal and runs until the runtime kills it.
    let app = ContainerSpec::fixture("app", &["serve", "--port", "8080", "--no-signal-handlers"]);
    let pod = scene.run(PodSpec::new("late").container(app)).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let container = pod.containers[0].clone();
    let stopping =
        tokio::spawn(async move { kubelet.stop_container(&container, 6 * SECOND).await });
    eventually("the stop is forwarded", async || {
        let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
        Ok((timeouts == [6]).then_some(()))
    })
    .await?;
    proxy.stop().await?;
    let took = stopping.await??;
    ensure!(took > 5 * SECOND, "answered after {took:?}");
    Ok(())
}

/// Whether no server has processed the call, so that a gRPC client may retry it by itself: it was never sent, or came
/// after the last stream that a stopping server accepts (GOAWAY without an error).
fn is_unprocessed(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
        }
        source = error.source();
    }
    status.code() == Code::Cancelled
}

async fn replaced(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let path = scene.directory("systemd")?.join("cri.sock");
    let socket = UnixListener::bind(&path)?;
    let mut proxy = start_activated(&scene, &agent, &socket)?;
    let over = CancellationToken::new();
    let calling = tokio::spawn({
        let (kubelet, over) = (scene.node.kubelet_at(&path)?, over.clone());
        async move {
            let mut runtime = kubelet.runtime();
            let mut answers = 0;
            while !over.is_cancelled() {
                let mut call = async || {
                    let mut call = tonic::Request::new(VersionRequest::default());
                    call.set_timeout(10 * SECOND);
                    runtime.version(call).await
                };
                let mut answer = call().await;
                // A kubelet's client retries by itself, and this one does not.
                if answer.as_ref().is_err_and(is_unprocessed) {
                    answer = call().await;
                }
                answer.with_context(|| format!("after {answers} answers"))?;
                answers += 1;
            }
            anyhow::Ok(answers)
        }
    });
    for _ in 0..8 {
        sleep(SECOND / 4).await;
        let pid = proxy.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(pid.context("it has ended by itself")?, Signal::TERM)?;
        ensure!(proxy.wait().await?.success());
        ensure!(!calling.is_finished(), "{:?}", calling.await?);
        // For a moment no proxy runs, as under systemd.
        sleep(SECOND / 10).await;
        proxy = start_activated(&scene, &agent, &socket)?;
    }
    sleep(SECOND / 4).await;
    over.cancel();
    let answers = calling.await??;
    ensure!(answers > 100, "{answers} answers");
    Ok(())
}

async fn full_disk(scene: Scene) -> Result<()> {
    let journal = scene.directory("ebb/journal")?;
    mount(
        "tmpfs",
        &journal,
        "tmpfs",
        MountFlags::empty(),
        c"size=4k,mode=700",
    )
    .context("mounting a small file system")?;
    fs::write(journal.join("filler"), [0; 4096])?;
    let full = fs::write(journal.join("more"), "x").map_err(|e| e.kind());
    ensure!(full == Err(io::ErrorKind::StorageFull), "{full:?}");

    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("full-disk").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 60 * SECOND);
    agent.until_draining("full-disk").await?;
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "not held");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("full-disk").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let log = fs::read_to_string(agent.log())?;
    ensure!(log.contains("can't journal a drain"), "no warning: {log}");
    Ok(())
}
