//! `ebb drain --dry-run`, `ebb wait` and `--watch`.

use std::{
    io::{BufRead as _, Read},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::{ReleaseReason, Report};
use ebb_protocol::views::{DryRun, FlowView, PodView, WaitOutcome, WaitReply};
use ebb_testkit::kubelet::PodSpec;
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::{Agent, EBB, timed},
    hold::stop,
    kube::Cluster,
    peer::Peer,
    scene::{SECOND, SOON, Scene, eventually, server, trial},
    schema,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_dry_run_shows_what_would_hold_and_what_would_not_and_starts_no_drain",
            dry_run,
        ),
        trial(
            "a_wait_by_hand_prints_the_report_and_its_status_says_whether_the_pod_has_drained",
            wait,
        ),
        trial(
            "a_wait_by_hand_for_a_pod_that_is_not_deleted_ends_soon_with_status_13",
            wait_for_nothing,
        ),
        trial(
            "watched_lists_print_each_row_that_is_new_or_has_changed",
            watch,
        ),
        trial("lists_take_an_owner_for_a_pod", owners),
        trial("a_namespace_chooses_between_pods_of_one_name", namespaces),
    ]
}

async fn dry_run(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--idle-after", "1s"]).await?;
    let spec = PodSpec::new("dry")
        .annotation("ebb.dev/until", "idle")
        .annotation("ebb.dev/ignore-ports", "8081")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = scene.run(spec).await?;
    let busy = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let _idle = Peer::served(pod.v4(8080)?).await?;
    let _ignored = Peer::served(pod.v4(8081)?).await?;
    sleep(2 * SECOND).await;
    let dry: DryRun = agent.json(&["drain", "dry", "--dry-run"]).await?;
    ensure!(dry.pod.name == "dry" && !dry.is_draining, "{dry:?}");
    ensure!(dry.policy.deadline_ms == 25_000, "{dry:?}");
    ensure!(
        dry.holding.len() == 1 && dry.holding[0].remote == busy.address,
        "{dry:?}"
    );
    ensure!(
        dry.not_holding.get("idle") == Some(&1) && dry.not_holding.get("ignored-port") == Some(&1),
        "{dry:?}"
    );
    let text = agent.query(&["drain", "dry", "--dry-run"]).await?;
    for says in [
        "hold it for 25.0s at most",
        "until idle",
        "1 connection would hold it:",
        "1 idle, 1 ignored-port",
    ] {
        ensure!(text.contains(says), "no {says:?} in {text}");
    }
    ensure!(agent.drains("dry").await?.is_empty(), "a drain began");
    let out = agent.verb(&["drain", "dry"]).await?;
    let why = String::from_utf8(out.stderr)?;
    ensure!(
        out.status.code() == Some(2) && why.contains("ebb starts no drain"),
        "{why}"
    );
    agent.stop().await
}

/// Runs `ebb wait`. Returns its exit status and what it prints.
async fn waited(agent: &Agent, more: &[&str]) -> Result<(Option<i32>, WaitReply)> {
    let out = agent
        .verb(&[&["wait"], more, &["-o", "json"]].concat())
        .await?;
    let text = String::from_utf8(out.stdout)?;
    let stderr = String::from_utf8_lossy(&out.stderr);
    let reply = schema::parse(&text).with_context(|| stderr.into_owned())?;
    Ok((out.status.code(), reply))
}

async fn wait(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let pod = scene.serve("waited").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let (status, reply) = waited(&agent, &["waited", "--timeout", "1s"]).await?;
    ensure!(
        status == Some(13) && reply.outcome == WaitOutcome::Timeout,
        "{status:?} {reply:?}"
    );
    let settled = ["default/waited", "--until", "settled"];
    let (status, reply) = waited(&agent, &settled).await?;
    ensure!(
        status == Some(0) && reply.outcome == WaitOutcome::Reached,
        "{status:?} {reply:?}"
    );
    let (ended, waited) = tokio::join!(
        async {
            sleep(SECOND).await;
            drop(peer);
        },
        timed(waited(&agent, &["waited"])),
    );
    let () = ended;
    let (waited, took) = waited;
    let (status, reply) = waited?;
    ensure!(took >= SECOND, "{took:?}");
    ensure!(
        status == Some(0) && reply.report.reason == Some(ReleaseReason::Drained),
        "{status:?} {reply:?}"
    );
    ensure!(
        agent.drains("waited").await?.len() == 1,
        "one drain for all"
    );
    let out = agent.verb(&["wait", "wait"]).await?;
    ensure!(out.status.code() == Some(10), "a prefix: {out:?}");
    let out = agent.verb(&["wait", "waited", "--timeout", "soon"]).await?;
    ensure!(out.status.code() == Some(2), "{out:?}");
    agent.stop().await
}

async fn wait_for_nothing(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("lives-on").await?;
    let mut peer = Peer::served(pod.v4(8080)?).await?;
    let (waited, took) = timed(waited(&c.agent, &["lives-on"])).await;
    let (status, reply) = waited?;
    ensure!(took < 10 * SECOND, "{took:?}");
    ensure!(
        status == Some(13) && reply.report.reason == Some(ReleaseReason::NotTerminating),
        "{status:?} {reply:?}"
    );
    ensure!(reply.report.cut_total == Some(0), "{reply:?}");
    peer.ask("/").await?;
    peer.answer("ok\n").await?;
    Ok(())
}

/// A watch whose output is read line by line. Dropping it ends the process.
struct Watching {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
    notes: std::sync::mpsc::Receiver<String>,
}

/// The lines of a stream as they come.
fn lines(stream: impl Read + Send + 'static) -> std::sync::mpsc::Receiver<String> {
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::BufReader::new(stream)
            .lines()
            .map_while(Result::ok)
        {
            let _ = sender.send(line);
        }
    });
    lines
}

impl Watching {
    fn start(agent: &Agent, verb: &[&str]) -> Result<Self> {
        let mut command = std::process::Command::new(EBB);
        command.args(verb).arg("--agent").arg(agent.socket());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        Ok(Self {
            lines: lines(child.stdout.take().context("no output")?),
            notes: lines(child.stderr.take().context("no errors")?),
            child,
        })
    }

    /// The next line for which `find` returns something.
    async fn find<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        eventually(what, async || {
            Ok(self.lines.try_iter().find_map(|line| find(&line)))
        })
        .await
    }

    /// Whether nothing is printed for this long.
    async fn is_silent(&self, time: Duration) -> bool {
        sleep(time).await;
        self.lines.try_recv().is_err()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn watch(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("watched")
        .label("watch", "ed")
        .annotation("ebb.dev/untill", "idle")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let verb = ["pods", "-l", "watch=ed", "-w", "--interval", "500ms"];
    let pods = Watching::start(&agent, &[&verb[..], &["-o", "jsonl"]].concat())?;
    let flows = Watching::start(
        &agent,
        &[
            "flows",
            "watched",
            "-w",
            "--interval",
            "500ms",
            "-o",
            "jsonl",
        ],
    )?;
    let drains = Watching::start(&agent, &["drains", "watched", "-w", "-o", "jsonl"])?;
    let table = Watching::start(&agent, &["drains", "watched", "--watch"])?;
    let heading = |line: &str| line.starts_with("NAMESPACE").then_some(());
    table.find("the heading", heading).await?;
    let of_pod = |line: &str| serde_json::from_str::<PodView>(line).ok();
    let first = pods.find("the list", of_pod).await?;
    ensure!(first.flows.is_some_and(|f| f.total() == 0), "{first:?}");
    ensure!(pods.is_silent(2 * SECOND).await, "nothing has changed");

    let peer = Peer::served(pod.v4(8080)?).await?;
    let one = |line: &str| of_pod(line).filter(|p| p.flows.is_some_and(|f| f.total() == 1));
    pods.find("the pod with its flow", one).await?;
    let of_flow = |line: &str| serde_json::from_str::<FlowView>(line).ok();
    let flow = flows.find("the flow", of_flow).await?;
    ensure!(flow.remote == peer.address, "{flow:?}");

    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    let of_drain = |line: &str| serde_json::from_str::<Report>(line).ok();
    let active = |line: &str| of_drain(line).filter(|r| r.reason.is_none());
    drains.find("the drain", active).await?;
    drop(peer);
    ensure!(stopping.await?.error().is_none());
    let (over, took) = timed(drains.find("its end", |line| {
        of_drain(line).filter(|r| r.reason == Some(ReleaseReason::Drained))
    }))
    .await;
    over?;
    ensure!(took < SOON, "{took:?}");
    let ended = |line: &str| line.ends_with("drained").then(|| line.to_owned());
    let row = table.find("its row", ended).await?;
    ensure!(row.starts_with("default"), "{row}");
    // The annotation's warning is in the report.
    eventually("its note", async || {
        Ok(table.notes.try_iter().find(|note| note.contains("untill")))
    })
    .await?;
    Ok(())
}

async fn owners(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    for name in ["owned-7f9c-aaaaa", "owned-7f9c-bbbbb"] {
        let spec = PodSpec::new(name)
            .label("pod-template-hash", "7f9c")
            .container(server("app", 8080));
        let pod = scene.run(spec).await?;
        drop(Peer::served(pod.v4(8080)?).await?);
    }
    scene.serve("owned").await?;
    let names = async |verb: &[&str]| {
        let text = agent.query(&[verb, &["-o", "name"]].concat()).await?;
        Ok::<_, anyhow::Error>(text.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    let both = ["default/owned-7f9c-aaaaa", "default/owned-7f9c-bbbbb"];
    ensure!(names(&["pods", "deploy/owned"]).await? == both);
    ensure!(names(&["pods", "sts/owned"]).await?.is_empty());
    ensure!(
        names(&["pods", "deploy/owned", "-n", "elsewhere"])
            .await?
            .is_empty()
    );
    agent.query(&["flows", "deploy/owned"]).await?;
    let out = agent.verb(&["pods", "shop/owned"]).await?;
    ensure!(out.status.code() == Some(10), "a pod: {out:?}");
    waited(&agent, &[both[0]]).await?;
    ensure!(names(&["drains", "deploy/owned"]).await? == both[..1]);
    agent.stop().await
}

async fn namespaces(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "300ms"]).await?;
    let spec = || PodSpec::new("twin").container(server("app", 8080));
    scene.run(spec()).await?;
    let mut other = spec();
    other.namespace = "twins".into();
    let uid = other.uid.clone();
    scene.run(other).await?;
    for verb in [
        &["explain", "twin"][..],
        &["drain", "twin", "--dry-run"],
        &["doctor", "twin"],
        &["flows", "twin"],
        &["wait", "twin"],
        &["release", "twin"],
    ] {
        let out = agent.verb(verb).await?;
        let why = String::from_utf8(out.stderr)?;
        ensure!(
            out.status.code() == Some(10) && why.contains("twins/twin"),
            "{verb:?}: {why}"
        );
        let out = agent
            .verb(&[verb, &["-n", "twins", "-o", "name"]].concat())
            .await?;
        let (text, why) = (
            String::from_utf8(out.stdout)?,
            String::from_utf8(out.stderr)?,
        );
        match verb[0] {
            // It found the pod, which is not held.
            "release" => ensure!(why.contains("twins/twin is not draining"), "{why}"),
            // Without connections there are no rows.
            "flows" => ensure!(out.status.success() && text.is_empty(), "{text}{why}"),
            _ => ensure!(text == "twins/twin\n", "{verb:?}: {text}{why}"),
        }
        let out = agent.verb(&[verb, &["-n", "elsewhere"]].concat()).await?;
        ensure!(out.status.code() == Some(10), "{verb:?}: {out:?}");
    }
    let explanation = agent
        .query(&["explain", &uid, "-n", "twins", "-o", "name"])
        .await?;
    ensure!(explanation == "twins/twin\n", "{explanation}");
    let out = agent
        .verb(&["explain", "default/twin", "-n", "twins"])
        .await?;
    ensure!(out.status.code() == Some(2), "{out:?}");
    let top = agent.query(&["top", "--times", "1", "-n", "twins"]).await?;
    let names: Vec<_> = top
        .lines()
        .skip(2)
        .filter_map(|row| row.split_whitespace().next())
        .collect();
    ensure!(names == ["twins"], "{top}");
    agent.stop().await
}
