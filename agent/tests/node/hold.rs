//! StopContainer through the proxy: held until the pod has drained, and then forwarded.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ebb_core::{
    drain_report::{Phase, ReleaseReason, Report},
    flow::FlowState,
};
use ebb_testkit::kubelet::{
    ContainerSpec, Kubelet, PodSpec, PodStop, StartedContainer, StartedPod,
};
use libtest_mimic::Trial;
use tokio::{task::JoinHandle, time::sleep};

use crate::{
    agent::timed,
    peer::Peer,
    scene::{SECOND, Scene, eventually, queue, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_stop_waits_for_the_last_flow_and_is_forwarded_with_the_remaining_timeout",
            drained,
        ),
        trial(
            "at_the_deadline_the_stop_is_forwarded_and_the_report_names_the_cut_flow",
            deadline,
        ),
        trial(
            "until_idle_waits_for_answers_and_not_for_idle_flows",
            until_idle,
        ),
        trial(
            "until_settled_waits_only_for_the_settle_phase",
            until_settled,
        ),
        trial(
            "with_idle_flows_close_ebb_closes_idle_flows_and_waits_for_answers",
            idle_flows_closed,
        ),
        trial(
            "with_extend_a_longer_max_hold_holds_a_pod_beyond_its_grace_period",
            extended,
        ),
        trial(
            "without_extend_a_max_hold_beyond_the_grace_period_changes_nothing",
            not_extended,
        ),
        trial(
            "the_stop_of_a_sandbox_that_never_drains_is_answered_before_its_rpc_deadline",
            sandbox_in_time,
        ),
        trial(
            "an_extended_hold_is_answered_before_its_rpc_deadline",
            extended_in_time,
        ),
        trial("ebb_release_ends_a_hold_at_once", manual),
        trial("flows_on_ignored_ports_do_not_hold", ignored_port),
        trial(
            "accepted_and_queued_connections_stop_holding_when_they_are_reset",
            resets,
        ),
        trial(
            "the_sandbox_is_not_stopped_while_its_pod_drains",
            sandbox_waits,
        ),
        trial(
            "a_pod_that_crashes_while_it_is_held_is_released_at_once",
            crashes_while_held,
        ),
        trial(
            "when_a_held_container_crashes_it_is_released_and_the_other_stays_held",
            one_crashes_while_held,
        ),
    ]
}

/// Stops a pod in the background, as a kubelet does.
pub(crate) fn stop(kubelet: Kubelet, pod: &StartedPod, grace: Duration) -> JoinHandle<PodStop> {
    let pod = pod.clone();
    tokio::spawn(async move { kubelet.stop(&pod, grace).await })
}

async fn drained(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "500ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    // Two containers that are stopped together show that the pod ends, without any flag.
    let spec = PodSpec::new("held")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = scene.run(spec).await?;
    let mut slow = Peer::asking(pod.v4(8080)?, "/slow?ms=4000").await?;
    let kept = Peer::served(pod.v4(8081)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);

    agent.until_draining("held").await?;
    let begun = agent.until_held_by("held", 2).await?;
    ensure!(begun.reason.is_none(), "{begun:?}");
    // 30 s less the reserve of 5 s.
    ensure!((24_000..=25_000).contains(&begun.deadline_ms), "{begun:?}");
    slow.answer("slow\n").await?;
    drop(slow);
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with a flow open");
    // The containers have not been stopped.
    let kubelet = scene.kubelet()?;
    for container in &pod.containers {
        let state = kubelet.status(container).await?.state();
        ensure!(
            state == k8s_cri::v1::ContainerState::ContainerRunning,
            "{state:?}"
        );
    }
    let closed = Instant::now();
    drop(kept);
    let stop = stopping.await?;
    ensure!(closed.elapsed() < 5 * SECOND, "{:?}", closed.elapsed());
    ensure!(stop.error().is_none(), "{stop:?}");

    let report = agent.drain("held").await?;
    ensure!(report.phase == Phase::Released, "{report:?}");
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.flows_at_start.is_some_and(|f| f.total() == 2),
        "{report:?}"
    );
    ensure!(
        report.flows_now.is_some_and(|f| f.total() == 0),
        "{report:?}"
    );
    ensure!(
        report.ended == Some(2) && report.arrived == Some(0),
        "{report:?}"
    );
    ensure!(
        report.cut_total == Some(0) && report.cut.is_empty(),
        "{report:?}"
    );
    ensure!(
        report.release_lag_us.is_some_and(|lag| lag < 1_000_000),
        "{report:?}"
    );
    ensure!(report.changes.len() >= 3, "{report:?}");
    let last = report.changes.last().map(|c| (c.phase, c.flows.total()));
    ensure!(last == Some((Phase::Released, 0)), "{report:?}");
    // The runtime gets the timeout that is left.
    let held = report.held_ms.div_ceil(1000);
    for container in &pod.containers {
        let timeouts = scene.stop_timeouts(&container.id)?;
        let [timeout] = timeouts[..] else {
            anyhow::bail!("{} was stopped with {timeouts:?}", container.name);
        };
        ensure!(
            (30 - held - 2..=30 - held + 1).contains(&timeout),
            "{timeout} s left after {held} s of 30"
        );
    }
    Ok(())
}

async fn deadline(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "500ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    // The container ignores the stop signal. The runtime must kill it no later than without a hold.
    let app = ContainerSpec::fixture("app", &["serve", "--port", "8080", "--no-signal-handlers"]);
    let grace = 6 * SECOND;
    let pod = scene
        .run(PodSpec::new("never").grace(grace).container(app))
        .await?;
    let peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, grace).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("never").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    // The reserve is a third of so short a grace period.
    ensure!((3000..4000).contains(&report.deadline_ms), "{report:?}");
    ensure!((3000..5000).contains(&report.held_ms), "{report:?}");
    ensure!(
        report.cut_total == Some(1) && report.cut.len() == 1,
        "{report:?}"
    );
    let cut = &report.cut[0];
    ensure!(cut.peer.as_deref() == Some("node"), "{cut:?}");
    ensure!(
        cut.remote == peer.address && cut.local == pod.v4(8080)?,
        "{report:?}"
    );
    ensure!(
        cut.state.is_live() && cut.bytes_in > 0 && cut.bytes_out == 0,
        "{report:?}"
    );
    ensure!(stop.took < grace + 2 * SECOND, "{stop:?}");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(timeouts == [2], "{timeouts:?}");
    let ended = scene.kubelet()?.status(&pod.containers[0]).await?;
    ensure!(ended.exit_code == 137, "{ended:?}");
    let metrics = [
        (
            "ebb_drains_total{namespace=\"default\",workload=\"none\",reason=\"deadline\"}",
            1,
        ),
        (
            "ebb_flows_cut_total{namespace=\"default\",workload=\"none\"}",
            1,
        ),
        ("ebb_drains_active", 0),
        ("ebb_kernel_losses_total{kind=\"event\"}", 0),
    ];
    for (metric, value) in metrics {
        let counted = agent.metric(metric).await?;
        ensure!(counted == value, "{metric} is {counted}");
    }
    Ok(())
}

/// Stops a pod in the middle of an answer that takes 12 s. Its grace period is 5 s and its `max-hold` 20 s; the RPC
/// deadline is 60 s.
async fn stopped_in_a_long_answer(
    scene: &Scene,
    name: &str,
    flags: &[&str],
) -> Result<(Report, usize, Vec<u64>)> {
    let flags = [&["--hold-unknown", "--quiet", "300ms"], flags].concat();
    let agent = scene.agent(&flags).await?;
    let proxy = scene.proxy(&agent).await?;
    let grace = 5 * SECOND;
    let spec = PodSpec::new(name)
        .grace(grace)
        .annotation("ebb.dev/max-hold", "20s")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let mut peer = Peer::connect(pod.v4(8080)?).await?;
    peer.ask_and_close("/slow?ms=12000").await?;
    let container = pod.container("app")?;
    let mut request = tonic::Request::new(k8s_cri::v1::StopContainerRequest {
        container_id: container.id.clone(),
        timeout: 5,
    });
    request.set_timeout(60 * SECOND);
    let mut runtime = scene.kubelet_at(&proxy)?.runtime();
    let stopping = tokio::spawn(async move { runtime.stop_container(request).await });
    // A reset ends an answer too.
    let answered = peer.read_to_end().await.unwrap_or(0);
    drop(peer);
    stopping.await??;
    let timeouts = scene.stop_timeouts(&container.id)?;
    Ok((agent.drain(name).await?, answered, timeouts))
}

async fn extended(scene: Scene) -> Result<()> {
    let (report, answered, timeouts) =
        stopped_in_a_long_answer(&scene, "patient", &["--extend"]).await?;
    ensure!(answered > 0, "cut off");
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.deadline_ms == 20_000, "{report:?}");
    ensure!(
        report.held_ms > 5_000 && report.cut_total == Some(0),
        "{report:?}"
    );
    // The reserve: a third of the grace period, rounded up.
    ensure!(timeouts == [2], "{timeouts:?}");
    Ok(())
}

async fn not_extended(scene: Scene) -> Result<()> {
    let (report, answered, timeouts) = stopped_in_a_long_answer(&scene, "impatient", &[]).await?;
    ensure!(answered == 0, "not cut");
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.cut_total == Some(1), "{report:?}");
    ensure!(timeouts == [2], "{timeouts:?}");
    Ok(())
}

/// Runs a pod whose flow never ends, and whose container ignores its stop signal.
async fn never_drained(scene: &Scene, spec: PodSpec) -> Result<(StartedPod, Peer)> {
    let app = ContainerSpec::fixture("app", &["serve", "--port", "8080", "--no-signal-handlers"]);
    let pod = scene.run(spec.container(app)).await?;
    let peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    Ok((pod, peer))
}

async fn sandbox_in_time(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    // The default reserve would leave nothing of so short an RPC deadline.
    let spec = PodSpec::new("sandbox-late").annotation("ebb.dev/reserve", "1s");
    let (pod, _peer) = never_drained(&scene, spec).await?;
    let rpc_deadline = 6 * SECOND;
    let mut request = tonic::Request::new(k8s_cri::v1::StopPodSandboxRequest {
        pod_sandbox_id: pod.sandbox_id.clone(),
    });
    request.set_timeout(rpc_deadline);
    let mut runtime = scene.kubelet_at(&proxy)?.runtime();
    let (stopped, took) = timed(runtime.stop_pod_sandbox(request)).await;
    stopped?;
    ensure!(took > 5 * SECOND / 2 && took < rpc_deadline, "{took:?}");
    let report = agent.drain("sandbox-late").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.cut_total == Some(1), "{report:?}");
    Ok(())
}

async fn extended_in_time(scene: Scene) -> Result<()> {
    let agent = scene
        .agent(&["--hold-unknown", "--quiet", "300ms", "--extend"])
        .await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("extended-late").annotation("ebb.dev/max-hold", "60s");
    let (pod, _peer) = never_drained(&scene, spec.grace(5 * SECOND)).await?;
    let rpc_deadline = 12 * SECOND;
    let mut request = tonic::Request::new(k8s_cri::v1::StopContainerRequest {
        container_id: pod.containers[0].id.clone(),
        timeout: 5,
    });
    request.set_timeout(rpc_deadline);
    let mut runtime = scene.kubelet_at(&proxy)?.runtime();
    let (stopped, took) = timed(runtime.stop_container(request)).await;
    stopped?;
    ensure!(took > 8 * SECOND && took < rpc_deadline, "{took:?}");
    let report = agent.drain("extended-late").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    // Longer than the grace period, and less than the RPC deadline by a margin and the reserve, a third of that period.
    ensure!((8_000..9_000).contains(&report.held_ms), "{report:?}");
    let timeouts = scene.stop_timeouts(&pod.containers[0].id)?;
    ensure!(timeouts == [2], "{timeouts:?}");
    Ok(())
}

async fn until_idle(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("idle")
        .annotation("ebb.dev/until", "idle")
        .annotation("ebb.dev/idle-after", "1s")
        .annotation("ebb.dev/quiet", "300ms")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let idle = Peer::served(pod.v4(8080)?).await?;
    let requested = Instant::now();
    let mut asking = Peer::asking(pod.v4(8080)?, "/slow?ms=5000").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("idle").await?;
    asking
        .answer("slow\n")
        .await
        .context("cut off before the answer")?;
    ensure!(requested.elapsed() >= 5 * SECOND);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    // The kernel's times are in jiffies, some milliseconds apart.
    let idle_from = Duration::from_millis(5_950);
    ensure!(requested.elapsed() >= idle_from, "not idle for long enough");
    let report = agent.drain("idle").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.held_ms < 12_000, "{report:?}");
    // Both flows are still open, and are cut while they are idle.
    ensure!(
        report.cut_total == Some(2) && report.ended == Some(0),
        "{report:?}"
    );
    ensure!(
        report.cut.iter().all(|c| c.state == FlowState::Idle),
        "{report:?}"
    );
    ensure!(
        report.cut.iter().any(|c| c.remote == idle.address),
        "{report:?}"
    );
    Ok(())
}

async fn until_settled(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("settled")
        .annotation("ebb.dev/until", "settled")
        .annotation("ebb.dev/quiet", "2s")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("settled").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!((2000..5000).contains(&report.held_ms), "{report:?}");
    ensure!(report.cut_total == Some(1), "{report:?}");
    Ok(())
}

async fn idle_flows_closed(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("closer")
        .annotation("ebb.dev/idle-flows", "close")
        .annotation("ebb.dev/idle-after", "1s")
        .annotation("ebb.dev/quiet", "300ms")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let mut idle = Peer::served(pod.v4(8080)?).await?;
    let mut asking = Peer::asking(pod.v4(8080)?, "/slow?ms=4000").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("closer").await?;
    // The idle flow is closed without a reset, and the other is not closed in the middle of its answer.
    ensure!(idle.read_to_end().await? == 0);
    ensure!(!stopping.is_finished(), "released before the answer");
    asking
        .answer("slow\n")
        .await
        .context("cut off before the answer")?;
    ensure!(asking.read_to_end().await? == 0);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("closer").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.cut_total == Some(0) && report.held_ms < 15_000,
        "{report:?}"
    );
    Ok(())
}

async fn manual(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("manual").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let out = agent.verb(&["release", "manual"]).await?;
    ensure!(out.status.code() == Some(10), "nothing to release: {out:?}");
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("manual").await?;
    let released = Instant::now();
    let said = agent.query(&["release", "default/manual"]).await?;
    ensure!(
        said.starts_with("default/manual: released after ")
            && said.contains("1 connection is still open"),
        "{said}"
    );
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(released.elapsed() < 5 * SECOND, "{:?}", released.elapsed());
    let report = agent.drain("manual").await?;
    ensure!(report.reason == Some(ReleaseReason::Manual), "{report:?}");
    ensure!(report.cut_total == Some(1), "{report:?}");
    Ok(())
}

async fn ignored_port(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("scraped")
        .annotation("ebb.dev/ignore-ports", "8081")
        .container(server("app", 8080))
        .container(server("metrics", 8081));
    let pod = scene.run(spec).await?;
    let _scrape = Peer::asking(pod.v4(8081)?, "/slow?ms=60000").await?;
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("scraped").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.held_ms < 5_000, "{report:?}");
    ensure!(
        report.flows_at_start.is_some_and(|f| f.total() == 0),
        "{report:?}"
    );
    Ok(())
}

async fn resets(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("reset").container(queue("app", 8080));
    let pod = scene.run(spec).await?;
    let accepted = Peer::connect(pod.v4(8080)?).await?;
    let queued = Peer::asking(pod.v4(8080)?, "/").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    let begun = agent.until_draining("reset").await?;
    ensure!(
        begun.flows_at_start.is_some_and(|f| f.total() == 2),
        "{begun:?}"
    );
    queued.reset()?;
    eventually("the queued one is gone", async || {
        Ok((agent.flows("reset").await?.len() == 1).then_some(()))
    })
    .await?;
    ensure!(!stopping.is_finished(), "released with a flow open");
    accepted.reset()?;
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("reset").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.ended == Some(2) && report.cut_total == Some(0),
        "{report:?}"
    );
    Ok(())
}

async fn sandbox_waits(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("sandbox").await?;
    let mut peer = Peer::asking(pod.v4(8080)?, "/slow?ms=4000").await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let first = tokio::spawn({
        let (kubelet, app) = (kubelet.clone(), pod.containers[0].clone());
        async move { kubelet.stop_container(&app, 30 * SECOND).await }
    });
    agent.until_draining("sandbox").await?;
    // As if StopContainer had failed for the kubelet: StopPodSandbox would kill the pod, so it has to wait too.
    let sandbox = tokio::spawn({
        let pod = pod.clone();
        async move { kubelet.stop_sandbox(&pod).await }
    });
    peer.answer("slow\n").await.context("cut off")?;
    ensure!(!sandbox.is_finished() && !first.is_finished(), "not held");
    drop(peer);
    sandbox.await??;
    first.await??;
    let report = agent.drain("sandbox").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

/// Kills the first process of a container, as a crash would.
pub(crate) async fn crash(scene: &Scene, container: &StartedContainer) -> Result<()> {
    let pid = scene.kubelet()?.pid(container).await?;
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).context("no pid")?;
    Ok(rustix::process::kill_process(
        pid,
        rustix::process::Signal::KILL,
    )?)
}

async fn crashes_while_held(scene: Scene) -> Result<()> {
    // The settle phase alone would take longer than the release may take.
    let agent = scene.agent(&["--hold-unknown", "--quiet", "10s"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("crash").await?;
    let mut peer = Peer::served(pod.v4(8080)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("crash").await?;
    let crashed = Instant::now();
    crash(&scene, &pod.containers[0]).await?;
    ensure!(peer.read_to_end().await? == 0);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(crashed.elapsed() < 6 * SECOND, "{:?}", crashed.elapsed());
    let stops = agent.explain("crash").await?.stops;
    let why: Vec<_> = stops.iter().map(|s| s.reason.as_deref()).collect();
    // StopPodSandbox is not held, because no container runs and no flow is open.
    ensure!(why == [Some("nothing-runs"), Some("exited")], "{stops:?}");
    Ok(())
}

async fn one_crashes_while_held(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "10s"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("one-dies")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = scene.run(spec).await?;
    let peer = Peer::served(pod.v4(8081)?).await?;
    let kubelet = scene.kubelet_at(&proxy)?;
    let call = |container: &StartedContainer| {
        let (kubelet, container) = (kubelet.clone(), container.clone());
        tokio::spawn(async move { kubelet.stop_container(&container, 60 * SECOND).await })
    };
    let (app, side) = (pod.container("app")?, pod.container("side")?);
    let (of_app, of_side) = (call(app), call(side));
    agent.until_draining("one-dies").await?;
    agent.until_held_by("one-dies", 2).await?;
    let crashed = Instant::now();
    crash(&scene, app).await?;
    of_app.await??;
    ensure!(crashed.elapsed() < 3 * SECOND, "{:?}", crashed.elapsed());
    sleep(SECOND).await;
    let report = agent.until_held_by("one-dies", 1).await?;
    ensure!(report.reason.is_none(), "{report:?}");
    ensure!(!of_side.is_finished(), "released with its container");
    drop(peer);
    of_side.await??;
    let report = agent.drain("one-dies").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let stops = agent.explain("one-dies").await?.stops;
    let app = stops.iter().find(|s| s.container.as_deref() == Some("app"));
    let app = app.context("the stop is not listed")?;
    ensure!(
        app.held && app.reason.as_deref() == Some("exited"),
        "{app:?}"
    );
    Ok(())
}
