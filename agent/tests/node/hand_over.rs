//! Calls that meet an agent that stops, and locks that others take.

use std::{fs, path::Path, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use ebb_protocol::hold::stop_note;
use ebb_testkit::{
    api_server::{AnswerMode, ApiServer, Faults},
    kubelet::PodSpec,
};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::sleep,
};

use crate::{
    agent::{EBB, Proxy, agent},
    hold::stop,
    kube::Cluster,
    peer::Peer,
    scene::{NODE_V4, SECOND, Scene, eventually, free_port, server, trial},
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "stops_that_an_agent_has_not_decided_and_stops_in_the_gap_are_held_by_the_next_agent",
            undecided,
        ),
        trial(
            "a_stop_that_arrives_between_two_agents_is_held_by_the_next",
            in_the_gap,
        ),
        trial(
            "a_wait_of_a_container_that_was_restarted_unseen_begins_the_only_drain",
            stale_list,
        ),
        trial(
            "a_user_who_may_read_the_run_directory_cannot_keep_the_services_from_starting",
            locked_by_others,
        ),
    ]
}

async fn undecided(scene: Scene) -> Result<()> {
    let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
    // So the agent takes a second: for the API server, and for the stop of the other container.
    api.misbehave(Faults {
        lists: AnswerMode::Never,
        gets: AnswerMode::Never,
        ..Faults::default()
    });
    let c = Cluster::start_with(scene, api, &[]).await?;
    let spec = PodSpec::new("undecided")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = c.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let call = |name: &str| {
        let (kubelet, container) = (c.kubelet()?, pod.container(name)?.clone());
        anyhow::Ok(tokio::spawn(async move {
            kubelet.stop_container(&container, 60 * SECOND).await
        }))
    };
    let app = call("app")?;
    sleep(SECOND / 5).await;
    let note = stop_note(&c.agent.socket());
    let pid = Pid::from_raw(c.agent.pid()?.cast_signed()).context("no pid")?;
    kill_process(pid, Signal::TERM)?;
    eventually("the first agent has stopped", async || {
        Ok((note.exists() && !c.agent.socket().exists()).then_some(()))
    })
    .await?;
    // The kubelet stops all containers of a pod at once.
    let side = call("side")?;
    sleep(SECOND).await;
    ensure!(!app.is_finished() && !side.is_finished(), "forwarded");
    for container in &pod.containers {
        let timeouts = c.scene.stop_timeouts(&container.id)?;
        ensure!(timeouts.is_empty(), "{}: {timeouts:?}", container.name);
    }
    let next = c.scene.agent(&["--quiet", "300ms"]).await?;
    let held = |stop: &&ebb_protocol::views::StopView| stop.held;
    next.until_draining("undecided").await?;
    eventually("both stops are held", async || {
        let stops = next.explain("undecided").await?.stops;
        Ok((stops.iter().filter(held).count() == 2).then_some(()))
    })
    .await?;
    ensure!(!note.exists(), "an agent that runs has a note of its stop");
    let stops = next.explain("undecided").await?.stops;
    let by_stops =
        |stop: &ebb_protocol::views::StopView| stop.evidence.as_deref() == Some("all-containers");
    ensure!(stops.iter().all(by_stops), "{stops:?}");
    drop(peer);
    app.await??;
    side.await??;
    let report = next.drain("undecided").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

async fn in_the_gap(scene: Scene) -> Result<()> {
    let flags = ["--hold-unknown", "--quiet", "300ms"];
    let first = scene.agent(&flags).await?;
    let proxy = scene.proxy(&first).await?;
    let pod = scene.serve("in-the-gap").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    first.stop().await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 60 * SECOND);
    sleep(2 * SECOND).await;
    ensure!(!stopping.is_finished(), "forwarded without an agent");
    let next = scene.agent(&flags).await?;
    next.until_draining("in-the-gap").await?;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = next.drain("in-the-gap").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

async fn stale_list(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let mut pod = scene.serve("stale-list").await?;
    // The agent lists the pod with its first container.
    ensure!(agent.pod("stale-list").await?.containers.len() == 1);
    let kubelet = scene.kubelet()?;
    let first = pod.containers[0].clone();
    kubelet.stop_container(&first, 30 * SECOND).await?;
    kubelet.restart(&mut pod, "app", 1).await?;
    ebb_testkit::http::until_open(pod.v4(8080)?, crate::scene::SOON).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
    let wait = dial(&kubelet, &pod.containers[0], url);
    let begun = agent.until_draining("stale-list").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_held_by("stale-list", 2).await?;
    drop(peer);
    ensure!(wait.await??.status == 0);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("stale-list").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.started_at == begun.started_at, "{report:?}");
    Ok(())
}

/// Takes a lock as a user who is not root, and keeps it. `None` if that user can't.
async fn lock_as_nobody(path: &Path) -> Result<Option<tokio::process::Child>> {
    let mut command = Command::new("flock");
    command.arg("--nonblock").arg(path);
    command.args(["sh", "-c", "echo locked; exec sleep 60"]);
    command.uid(65534).gid(65534).kill_on_drop(true);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("flock")?;
    let mut said = String::new();
    let out = child.stdout.take().context("no output")?;
    BufReader::new(out).read_line(&mut said).await?;
    Ok((said == "locked\n").then_some(child))
}

async fn locked_by_others(scene: Scene) -> Result<()> {
    // Where any user may look, as in /run.
    let run = tempfile::Builder::new()
        .prefix("ebb-run")
        .tempdir_in("/run")?;
    fs::set_permissions(
        run.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    // As an older agent has left it.
    fs::write(run.path().join("agent.lock"), "")?;
    let socket = run.path().join("agent.sock");
    let start = || {
        let mut command = agent(scene.node.socket(), run.path());
        command.args(["--http", &format!("127.0.0.1:{}", free_port())]);
        command.kill_on_drop(true).spawn()
    };
    let answers = async || {
        let mut drains = Command::new(EBB);
        drains.args(["drains", "--agent"]).arg(&socket);
        let out = drains.output().await?;
        Ok(out.status.success().then_some(()))
    };
    let mut first = start()?;
    eventually("the first agent answers", answers).await?;
    first.kill().await?;

    let lock = run.path().join("agent.lock");
    ensure!(
        lock_as_nobody(&lock).await?.is_none(),
        "the lock is open to all"
    );
    let of_directory = lock_as_nobody(run.path()).await?;
    ensure!(of_directory.is_some(), "the directory can't be locked");
    let _second = start()?;
    eventually("the second agent answers", answers).await?;
    let _proxy = Proxy::at(scene.node.socket(), run.path(), &socket).await?;
    Ok(())
}
