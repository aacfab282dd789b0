//! Stop signals and requests on drain, which tell an application that its pod ends.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::{
    drain_report::{Phase, ReleaseReason, Report},
    notification::{SignalOutcome, SignalReport, StopSignal},
};
use ebb_protocol::views::PodView;
use ebb_testkit::{
    http,
    kubelet::{ContainerSpec, PodSpec, StartedPod},
    proc_net,
};
use libtest_mimic::Trial;
use tokio::time::{sleep, timeout};

use crate::{
    agent::Agent,
    hold::stop,
    peer::Peer,
    scene::{FIXTURE, SECOND, SOON, Scene, eventually, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "nginx_gets_the_stop_signal_after_settle_and_closes_its_own_connections",
            nginx_quits,
        ),
        trial(
            "the_children_of_a_shell_get_the_stop_signal",
            children_of_a_shell,
        ),
        trial(
            "a_main_process_that_does_not_handle_the_stop_signal_is_reported_and_held_on",
            unhandled,
        ),
        trial(
            "a_pod_that_asks_for_no_stop_signal_gets_none",
            not_asked_for,
        ),
        trial(
            "a_repeated_stop_and_a_new_agent_send_the_stop_signal_no_second_time",
            sent_once,
        ),
        trial(
            "the_request_on_drain_arrives_once_and_counts_as_no_connection",
            request_at_the_start,
        ),
        trial(
            "the_request_on_drain_arrives_after_settle_if_the_pod_wants_it_then",
            request_after_settle,
        ),
        trial(
            "a_request_on_drain_without_an_answer_is_reported_and_ends_no_hold",
            request_unanswered,
        ),
    ]
}

/// The test machine's shell, for images without one.
const SHELL: &str = "/usr/bin/dash";
const SHELL_INSIDE: &str = "/usr/bin/sh";

/// An nginx in front of a slow application in the same pod. Idle connections stay open for ten minutes.
const SITE: &str = "
    server {
        listen 8080;
        keepalive_timeout 600s;
        location / { return 200 'ok\\n'; }
        location /slow { proxy_pass http://127.0.0.1:9000; }
        location /drain { access_log /out/drain.log; return 204; }
    }";

impl Scene {
    /// A container with nginx on port 8080, and the directory in which it logs requests to `/drain`.
    fn nginx(&self, name: &str) -> Result<(ContainerSpec, PathBuf)> {
        let (conf, out) = (self.directory("conf")?, self.directory("out")?);
        fs::write(conf.join("default.conf"), SITE)?;
        let container = ContainerSpec::nginx(name)
            .mount(&conf, "/etc/nginx/conf.d")
            .mount(&out, "/out");
        Ok((container, out))
    }

    /// Runs a pod whose container `web` is nginx, and waits until it listens and that check is over.
    async fn run_nginx(&self, spec: PodSpec) -> Result<StartedPod> {
        let pod = self.run(spec).await?;
        http::until_open(pod.v4(8080)?, SOON).await?;
        let pid = self.kubelet()?.pid(pod.container("web")?).await?;
        eventually("the check's connection is gone", async || {
            Ok(proc_net::is_quiet(pid, 8080)?.then_some(()))
        })
        .await?;
        Ok(pod)
    }
}

/// The site asks for a host.
async fn ask(peer: &mut Peer, path: &str) -> Result<()> {
    peer.send(&format!("GET {path} HTTP/1.1\r\nHost: site\r\n\r\n"))
        .await
}

async fn asking(pod: &StartedPod, path: &str) -> Result<Peer> {
    let mut peer = Peer::connect(pod.v4(8080)?).await?;
    ask(&mut peer, path).await?;
    Ok(peer)
}

async fn served(pod: &StartedPod) -> Result<Peer> {
    let mut peer = asking(pod, "/").await?;
    peer.answer("ok\n").await?;
    Ok(peer)
}

/// Waits until the report of the pod's drain is as wanted.
pub(crate) async fn until_report(
    agent: &Agent,
    pod: &str,
    what: &str,
    wanted: impl Fn(&Report) -> bool,
) -> Result<Report> {
    eventually(what, async || {
        let drains = agent.drains(pod).await?;
        Ok(drains.into_iter().next().filter(|r| wanted(r)))
    })
    .await
}

/// Waits until the agent has the pod in a list: it holds no container that it does not know.
pub(crate) async fn until_known(agent: &Agent, pod: &str) -> Result<()> {
    eventually("the agent knows the pod", async || {
        let pods = agent.pods(pod).await?;
        let runs = |pod: &PodView| pod.containers.iter().any(|c| c.running);
        Ok(pods.iter().any(runs).then_some(()))
    })
    .await
}

/// The signals of a report whose outcome is known.
fn signals(report: &Report) -> &[SignalReport] {
    report.notified.signals.as_deref().unwrap_or_default()
}

async fn until_signaled(agent: &Agent, pod: &str) -> Result<SignalReport> {
    let what = "the signal is sent";
    let report = until_report(agent, pod, what, |r| !signals(r).is_empty()).await?;
    ensure!(signals(&report).len() == 1, "{report:?}");
    Ok(signals(&report)[0].clone())
}

async fn nginx_quits(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "1s"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let (web, _) = scene.nginx("web")?;
    let spec = PodSpec::new("quits")
        // The fixture would end at once on SIGQUIT, and the slow answer would be cut.
        .annotation("ebb.dev/stop-signal", "web=SIGQUIT")
        .container(web)
        .container(server("app", 9000));
    let pod = scene.run_nginx(spec).await?;
    until_known(&agent, "quits").await?;
    let main = scene.kubelet()?.pid(pod.container("web")?).await?;
    let mut idle = served(&pod).await?;
    let mut slow = asking(&pod, "/slow?ms=8000").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 60 * SECOND);
    agent.until_draining("quits").await?;

    let sent = until_signaled(&agent, "quits").await?;
    let expected = SignalReport {
        container: "web".into(),
        signal: StopSignal::Quit,
        pid: Some(main),
        outcome: SignalOutcome::Sent,
        detail: None,
    };
    ensure!(sent == expected, "{sent:?}");
    // nginx itself closes what is idle, and finishes what it has begun.
    ensure!(idle.read_to_end().await? == 0);
    ensure!(!stopping.is_finished(), "released before the answer");
    ensure!(scene.stop_timeouts(&pod.container("web")?.id)?.is_empty());
    slow.answer("slow\n").await.context("cut off")?;
    ensure!(slow.read_to_end().await? == 0);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");

    let report = agent.drain("quits").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.cut_total == Some(0) && report.idle_closed == 0,
        "{report:?}"
    );
    ensure!(signals(&report) == [expected], "{report:?}");
    let line = format!("SIGQUIT to web (process {main})");
    let table = agent.verb(&["drains"]).await?;
    let notes = String::from_utf8_lossy(&table.stderr);
    ensure!(notes.contains(&line), "{table:?}");
    let log = fs::read_to_string(agent.log())?;
    let ended = log.lines().find(|l| l.contains("Drained:"));
    ensure!(ended.is_some_and(|l| l.contains(&line)), "{log}");
    Ok(())
}

/// nginx as the child of a shell that waits for it, and passes no signal on.
fn under_a_shell(web: ContainerSpec) -> ContainerSpec {
    web.mount(SHELL, SHELL_INSIDE)
        .command(&[SHELL_INSIDE, "-c", "nginx -g 'daemon off;'; true"])
}

async fn children_of_a_shell(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "500ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let (web, _) = scene.nginx("web")?;
    let spec = PodSpec::new("shell")
        .annotation("ebb.dev/stop-signal", "QUIT")
        .annotation("ebb.dev/stop-signal-to", "children")
        .container(under_a_shell(web));
    let pod = scene.run_nginx(spec).await?;
    until_known(&agent, "shell").await?;
    let shell = scene.kubelet()?.pid(pod.container("web")?).await?;
    let mut idle = served(&pod).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 60 * SECOND);
    agent.until_draining("shell").await?;
    let sent = until_signaled(&agent, "shell").await?;
    ensure!(sent.outcome == SignalOutcome::Sent, "{sent:?}");
    ensure!(sent.pid.is_some_and(|pid| pid != shell), "{sent:?}");
    ensure!(idle.read_to_end().await? == 0);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("shell").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

async fn unhandled(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "500ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let (web, _) = scene.nginx("web")?;
    let spec = PodSpec::new("deaf-shell")
        .annotation("ebb.dev/stop-signal", "SIGQUIT")
        .container(under_a_shell(web));
    let pod = scene.run_nginx(spec).await?;
    until_known(&agent, "deaf-shell").await?;
    let shell = scene.kubelet()?.pid(pod.container("web")?).await?;
    let mut idle = served(&pod).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 20 * SECOND);
    agent.until_draining("deaf-shell").await?;
    let sent = until_signaled(&agent, "deaf-shell").await?;
    ensure!(sent.pid == Some(shell), "{sent:?}");
    ensure!(sent.outcome == SignalOutcome::Ignored, "{sent:?}");
    // Its connections hold on.
    stays_open(&mut idle).await?;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(idle);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    Ok(())
}

async fn stays_open(peer: &mut Peer) -> Result<()> {
    let closed = timeout(2 * SECOND, peer.read_to_end()).await;
    ensure!(closed.is_err(), "closed: {closed:?}");
    Ok(())
}

async fn not_asked_for(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "500ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let (web, _) = scene.nginx("web")?;
    // A signal that no application can act on is refused, and the pod is held without it.
    let spec = PodSpec::new("not-told")
        .annotation("ebb.dev/stop-signal", "SIGKILL")
        .container(web);
    let pod = scene.run_nginx(spec).await?;
    until_known(&agent, "not-told").await?;
    let mut idle = served(&pod).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 60 * SECOND);
    let what = "settle is over";
    until_report(&agent, "not-told", what, |r| r.phase == Phase::Drain).await?;
    stays_open(&mut idle).await?;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(idle);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("not-told").await?;
    ensure!(report.notified.is_nothing(), "{report:?}");
    ensure!(report.warnings.len() == 1, "{report:?}");
    ensure!(report.warnings[0].contains("SIGQUIT"), "{report:?}");
    Ok(())
}

fn lines(path: &Path) -> usize {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().count()
}

async fn sent_once(scene: Scene) -> Result<()> {
    let flags = ["--hold-unknown", "--quiet", "300ms"];
    let first = scene.agent(&flags).await?;
    let proxy = scene.proxy(&first).await?;
    let out = scene.directory("out")?;
    let counted = out.join("signals");
    // The shell counts its signals.
    let script = format!(
        "trap 'echo USR1 >> /out/signals' USR1; trap 'exit 0' TERM; {FIXTURE} serve --port 8080 & \
         while :; do wait; done"
    );
    let app = ContainerSpec::fixture("app", &[])
        .mount(SHELL, SHELL_INSIDE)
        .mount(&out, "/out")
        .command(&[SHELL_INSIDE, "-c", &script]);
    let spec = PodSpec::new("counts")
        .annotation("ebb.dev/stop-signal", "SIGUSR1")
        .container(app);
    let pod = scene.run(spec).await?;
    until_known(&first, "counts").await?;
    http::until_open(pod.v4(8080)?, SOON).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let call = || -> Result<_> {
        let (kubelet, container) = (scene.kubelet_at(&proxy)?, pod.containers[0].clone());
        Ok(tokio::spawn(async move {
            kubelet.stop_container(&container, 60 * SECOND).await
        }))
    };
    let one = call()?;
    let begun = first.until_draining("counts").await?;
    let sent = until_signaled(&first, "counts").await?;
    ensure!(sent.outcome == SignalOutcome::Sent, "{sent:?}");
    eventually("the signal arrives", async || {
        Ok((lines(&counted) == 1).then_some(()))
    })
    .await?;
    let two = call()?;
    first.until_held_by("counts", 2).await?;
    first.stop().await?;
    let second = scene.agent(&flags).await?;
    let what = "both stops are held again";
    let resumed = until_report(&second, "counts", what, |r| r.holds == 2).await?;
    ensure!(resumed.started_at == begun.started_at, "{resumed:?}");
    let what = "settle is over";
    until_report(&second, "counts", what, |r| r.phase == Phase::Drain).await?;
    sleep(2 * SECOND).await;
    ensure!(lines(&counted) == 1, "sent again");
    drop(peer);
    one.await??;
    two.await??;
    // The second agent knows what the first has sent.
    let report = second.drain("counts").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(signals(&report) == [sent], "{report:?}");
    ensure!(lines(&counted) == 1, "sent again");
    Ok(())
}

/// Runs nginx with this `on-drain`, and stops it. Returns the report as soon as the request is in it, and the final one.
async fn requested(
    scene: &Scene,
    name: &str,
    on_drain: &str,
    quiet: &str,
) -> Result<(Report, Report)> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let (web, out) = scene.nginx("web")?;
    let spec = PodSpec::new(name)
        .annotation("ebb.dev/on-drain", on_drain)
        .annotation("ebb.dev/quiet", quiet)
        .container(web);
    let pod = scene.run_nginx(spec).await?;
    until_known(&agent, name).await?;
    let peer = served(&pod).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 60 * SECOND);
    let answered = |r: &Report| {
        r.notified
            .request
            .as_ref()
            .is_some_and(|r| r.status.is_some())
    };
    let first = until_report(&agent, name, "the request is answered", answered).await?;
    let what = "settle is over";
    until_report(&agent, name, what, |r| r.phase == Phase::Drain).await?;
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let last = agent.drain(name).await?;
    let request = last.notified.request.as_ref().context("no request")?;
    ensure!(request.status == Some(204), "{last:?}");
    ensure!(request.request == "GET :8080/drain", "{last:?}");
    ensure!(last.reason == Some(ReleaseReason::Drained), "{last:?}");
    // Its own connection is no flow of the pod.
    ensure!(last.arrived == Some(0), "{last:?}");
    ensure!(
        last.flows_at_start.is_some_and(|f| f.total() == 1),
        "{last:?}"
    );
    let log = fs::read_to_string(out.join("drain.log"))?;
    ensure!(log.lines().count() == 1, "{log}");
    ensure!(log.contains("GET /drain HTTP/1.1"), "{log}");
    Ok((first, last))
}

async fn request_at_the_start(scene: Scene) -> Result<()> {
    let (first, last) = requested(&scene, "asked", "GET :8080/drain", "10s").await?;
    ensure!(first.phase == Phase::Settle, "{first:?}");
    ensure!(last.held_ms >= 10_000, "{last:?}");
    Ok(())
}

async fn request_after_settle(scene: Scene) -> Result<()> {
    let (first, _) = requested(&scene, "asked-late", "after-settle GET :8080/drain", "1s").await?;
    ensure!(first.phase == Phase::Drain, "{first:?}");
    Ok(())
}

async fn request_unanswered(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "500ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    for (name, on_drain, why) in [
        (
            "asked-slow",
            "POST :8080/slow?ms=600000",
            "no answer within 2s",
        ),
        ("asked-closed", "GET :9/", "can't connect to port 9"),
    ] {
        let spec = PodSpec::new(name)
            .annotation("ebb.dev/on-drain", on_drain)
            .container(server("app", 8080));
        let pod = scene.run(spec).await?;
        until_known(&agent, name).await?;
        let stopped = scene.kubelet_at(&proxy)?.stop(&pod, 60 * SECOND).await;
        ensure!(stopped.error().is_none(), "{stopped:?}");
        let report = agent.drain(name).await?;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.arrived == Some(0), "{report:?}");
        let request = report.notified.request.context("no request")?;
        let error = request.error.context("answered")?;
        ensure!(error.contains(why), "{error}");
        ensure!(Duration::from_millis(report.held_ms) < 20 * SECOND);
    }
    Ok(())
}
