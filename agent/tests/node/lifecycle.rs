//! The end of the agent, by a stop or a kill, and what it leaves behind.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::{ReleaseReason, Report};
use ebb_testkit::kubelet::PodSpec;
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::{Agent, EBB},
    hold::stop,
    peer::Peer,
    scene::{NODE_V4, SECOND, Scene, eventually, free_port, server, trial},
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "after_a_restart_of_the_agent_a_drain_continues_with_its_first_deadline",
            restarted,
        ),
        trial(
            "the_holds_of_a_stopped_agent_wait_ten_seconds_for_the_next_agent",
            stopped,
        ),
        trial("the_holds_of_a_killed_agent_end_at_once", killed),
        trial(
            "a_stopped_agent_answers_its_waits_with_a_report",
            wait_answered,
        ),
        trial(
            "a_stopped_proxy_forwards_the_stops_it_holds_at_once",
            proxy_stopped,
        ),
        trial("a_hold_ends_when_its_caller_cancels", caller_gone),
        trial(
            "a_stopped_agent_leaves_nothing_attached",
            async |scene: Scene| nothing_left(scene, "leaver-stopped", true).await,
        ),
        trial(
            "a_killed_agent_leaves_nothing_attached",
            async |scene: Scene| nothing_left(scene, "leaver-killed", false).await,
        ),
        trial(
            "the_streams_of_a_server_without_a_listener_hold_its_drain_after_the_agent_was_killed",
            streams_hold,
        ),
        trial(
            "cleanup_is_refused_while_an_agent_runs_and_removes_what_a_killed_one_leaves",
            cleaned_up,
        ),
    ]
}

/// Includes the container's own exit on a busy machine. A hold would last for 25 s.
const AT_ONCE: Duration = Duration::from_secs(5);

async fn stopped(scene: Scene) -> Result<()> {
    ends_during_a_hold(scene, "agent-stopped", true).await
}

async fn killed(scene: Scene) -> Result<()> {
    ends_during_a_hold(scene, "agent-killed", false).await
}

async fn ends_during_a_hold(scene: Scene, name: &str, graceful: bool) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve(name).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining(name).await?;
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "not held");
    let log = agent.log();
    let now = Instant::now();
    if graceful {
        agent.stop().await?;
        let log = fs::read_to_string(log)?;
        ensure!(
            log.contains("DrainReleased: shutdown, "),
            "no report: {log}"
        );
    } else {
        agent.kill().await?;
    }
    let stop = stopping.await?;
    // After a stop the proxy waits 10 s for the next agent, after a kill not at all.
    let kept = if graceful {
        10 * SECOND
    } else {
        Duration::ZERO
    };
    let released = now.elapsed();
    ensure!(released < kept + AT_ONCE, "after {released:?}");
    ensure!(released + SECOND > kept, "after {released:?}");
    ensure!(stop.error().is_none(), "{stop:?}");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    let [timeout] = timeouts[..] else {
        anyhow::bail!("stopped with {timeouts:?}");
    };
    let most = 30 - kept.as_secs();
    ensure!(
        (most - 10..most).contains(&timeout),
        "{timeout} s left of 30"
    );
    Ok(())
}

async fn wait_answered(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let pod = scene.serve("wait-answered").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
    let wait = dial(&scene.kubelet()?, &pod.containers[0], url);
    agent.until_draining("wait-answered").await?;
    let now = Instant::now();
    agent.stop().await?;
    let out = wait.await??;
    ensure!(now.elapsed() < AT_ONCE, "after {:?}", now.elapsed());
    let report: Report = serde_json::from_slice(&out.stdout)?;
    ensure!(report.reason == Some(ReleaseReason::Shutdown), "{report:?}");
    ensure!(report.pod.name == "wait-answered", "{report:?}");
    // It is not known whether a stop follows.
    ensure!(report.cut_total == Some(0), "{report:?}");
    Ok(())
}

async fn proxy_stopped(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("proxy-stopped").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let container = pod.containers[0].clone();
    let kubelet = scene.kubelet_at(&proxy)?;
    let stopping =
        tokio::spawn(async move { kubelet.stop_container(&container, 30 * SECOND).await });
    agent.until_draining("proxy-stopped").await?;
    let socket = proxy.socket.clone();
    let now = Instant::now();
    proxy.stop().await?;
    ensure!(now.elapsed() < AT_ONCE, "after {:?}", now.elapsed());
    stopping.await??;
    ensure!(!socket.exists(), "its socket is left");
    agent.until_held_by("proxy-stopped", 0).await.map(drop)
}

async fn caller_gone(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("caller-gone").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let container = pod.containers[0].clone();
    let kubelet = scene.kubelet_at(&proxy)?;
    let stopping =
        tokio::spawn(async move { kubelet.stop_container(&container, 30 * SECOND).await });
    agent.until_draining("caller-gone").await?;
    // As a restart of the kubelet does.
    stopping.abort();
    agent.until_held_by("caller-gone", 0).await?;
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(timeouts.is_empty(), "was stopped: {timeouts:?}");
    // The kubelet calls again, and the call joins the running drain.
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_held_by("caller-gone", 1).await?;
    agent.query(&["release", "caller-gone"]).await?;
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    Ok(())
}

async fn restarted(scene: Scene) -> Result<()> {
    let flags = ["--quiet", "300ms"];
    let grace = 12 * SECOND;
    let spec = PodSpec::new("restart").grace(grace);
    let pod = scene.run(spec.container(server("app", 8080))).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = scene.kubelet()?;

    let agent = scene.agent_in("ebb", &flags).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
    let began = Instant::now();
    let wait = dial(&kubelet, &pod.containers[0], url);
    let first = agent.until_draining("restart").await?;
    ensure!(first.deadline_ms == 8000, "{first:?}");
    sleep(2 * SECOND).await;
    agent.kill().await?;
    ensure!(wait.await??.status != 0, "answered by a killed agent");

    // The next agent starts in spite of what the killed one has left.
    let agent = scene.agent_in("ebb", &flags).await?;
    ensure!(agent.drains("restart").await?.is_empty());
    let url = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
    let wait = dial(&kubelet, &pod.containers[0], url);
    let second = agent.until_draining("restart").await?;
    ensure!(second.deadline_ms == 8000, "{second:?}");
    ensure!(
        second.started_at == first.started_at,
        "{first:?} {second:?}"
    );
    ensure!(second.held_ms > 2000, "{second:?}");
    ensure!(wait.await??.status == 0);
    let took = began.elapsed();
    ensure!((7 * SECOND..11 * SECOND).contains(&took), "{took:?}");
    let report = agent.drain("restart").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!((7900..10_000).contains(&report.held_ms), "{report:?}");
    Ok(())
}

/// Like a gRPC server, which closes its listener first. It listens on an ephemeral port, and its client's port is not
/// ephemeral, so that the ports of the connection do not show who opened it.
async fn streams_hold(scene: Scene) -> Result<()> {
    const GRPC: u16 = 50_051;
    let flags = ["--quiet", "300ms"];
    let spec = PodSpec::new("grpc").grace(60 * SECOND);
    let pod = scene.run(spec.container(server("app", GRPC))).await?;
    let mut peer = Peer::from_port(free_port(), pod.v4(GRPC)?).await?;
    let kubelet = scene.kubelet()?;
    let wait = |agent: &Agent| {
        let url = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
        dial(&kubelet, &pod.containers[0], url)
    };

    let agent = scene.agent_in("ebb", &flags).await?;
    let first = wait(&agent);
    agent.until_draining("grpc").await?;
    peer.ask("/close-listeners").await?;
    peer.answer("closed\n").await?;
    ensure!(Peer::connect(pod.v4(GRPC)?).await.is_err(), "it listens");
    agent.kill().await?;
    ensure!(first.await??.status != 0, "answered by a killed agent");

    let agent = scene.agent_in("ebb", &flags).await?;
    let second = wait(&agent);
    agent.until_draining("grpc").await?;
    sleep(3 * SECOND).await;
    ensure!(!second.is_finished(), "the stream is cut");
    let held = agent.drain("grpc").await?;
    ensure!(held.flows_now.is_some_and(|f| f.total() == 1), "{held:?}");
    drop(peer);
    ensure!(second.await??.status == 0);
    let report = agent.drain("grpc").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.ended == Some(1), "{report:?}");
    Ok(())
}

async fn nothing_left(scene: Scene, name: &str, graceful: bool) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve(name).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining(name).await?;
    let held = bpf_objects(agent.pid()?)?;
    ensure!(held.programs.len() >= 3 && held.links >= 1, "{held:?}");
    ensure!(held.programs.is_subset(&loaded()?), "{held:?}");

    let run = agent.run.clone();
    if graceful {
        agent.stop().await?;
    } else {
        agent.kill().await?;
    }
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    proxy.stop().await?;
    drop(peer);
    // The kernel frees programs some time after their last descriptor is closed.
    eventually("the programs are gone", async || {
        let left: Vec<u32> = loaded()?.intersection(&held.programs).copied().collect();
        Ok(left.is_empty().then_some(()))
    })
    .await?;
    // `ebb agent --cleanup` removes the files of a killed agent.
    let left = entries(&run)?;
    ensure!(
        !graceful || left == ["agent.lock", "agent.stopped", "history", "journal"],
        "{left:?}"
    );
    let pinned = pinned()?;
    ensure!(pinned.is_empty(), "pinned: {pinned:?}");
    let cgroups = entries(&scene.node.paths().cgroup(""))?;
    ensure!(
        cgroups == ["kubelet.service", "kubepods", "system"],
        "{cgroups:?}"
    );
    Ok(())
}

/// The BPF objects that a process has open.
#[derive(Debug)]
struct BpfObjects {
    programs: BTreeSet<u32>,
    links: usize,
}

fn bpf_objects(pid: u32) -> Result<BpfObjects> {
    let mut found = BpfObjects {
        programs: BTreeSet::new(),
        links: 0,
    };
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // Descriptors come and go.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        found.links += usize::from(text.contains("link_type:"));
        let program = text.lines().find_map(|l| l.strip_prefix("prog_id:"));
        if let Some(id) = program {
            found.programs.insert(id.trim().parse().context("prog_id")?);
        }
    }
    Ok(found)
}

/// The ids of all BPF programs of the machine.
fn loaded() -> Result<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    for program in aya::programs::loaded_programs() {
        // A program may be freed between reading its id and its info.
        ids.extend(program.ok().map(|p| p.id()));
    }
    Ok(ids)
}

/// What is pinned in the node's own BPF file system.
pub(crate) fn pinned() -> Result<Vec<String>> {
    let mut names = entries(Path::new("/sys/fs/bpf"))?;
    // The kernel's own (bpf_preload).
    names.retain(|name| name != "maps.debug" && name != "progs.debug");
    Ok(names)
}

/// The names in a directory, in order; none if it does not exist.
pub(crate) fn entries(directory: &Path) -> Result<Vec<String>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // Below cgroupfs only directories count, because the files are the kernel's.
        if !directory.starts_with("/sys/fs/cgroup") || entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

async fn cleaned_up(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let run = agent.run.clone();
    fs::write(run.join("cri.sock"), "another program's")?;
    let cleanup = async || {
        let mut command = tokio::process::Command::new(EBB);
        command.args(["agent", "--cleanup", "--run-dir"]).arg(&run);
        command.output().await
    };
    let refused = cleanup().await?;
    ensure!(refused.status.code() == Some(8), "{refused:?}");
    agent.kill().await?;
    let done = cleanup().await?;
    ensure!(done.status.success(), "{done:?}");
    let said = String::from_utf8(done.stdout)?;
    ensure!(
        said.contains("agent.sock") && said.contains("journal"),
        "{said}"
    );
    let left: Vec<_> = fs::read_dir(&run)?.collect::<Result<_, _>>()?;
    ensure!(
        left.len() == 1 && left[0].file_name() == "cri.sock",
        "{left:?}"
    );
    let again = cleanup().await?;
    ensure!(again.status.success(), "{again:?}");
    ensure!(!String::from_utf8(again.stdout)?.contains("removed"));
    Ok(())
}
