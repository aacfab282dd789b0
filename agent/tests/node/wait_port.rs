//! The wait port inside pods: `preStop.httpGet` without a host.
//!
//! Every agent on the node listens inside every pod with a wait port, so these trials have the node to themselves.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use ebb::linux::netns::Netns;
use ebb_core::{
    drain_report::{ReleaseReason, ReleasedBy, Report},
    flow::Exempt,
};
use ebb_testkit::{
    api_server::ApiServer,
    http,
    kubelet::{PodSpec, PreStop, StartedPod},
};
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all, stream};
use libtest_mimic::Trial;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{
    agent::{Agent, NODE_NAME},
    hold::stop,
    off_node::{NODE_ADDRESS, OffNode},
    peer::Peer,
    scene::{
        ExclusiveScene, NODE_V4, SECOND, SOON, eventually, free_port, run, server, trial_alone,
    },
    track::dial,
};

pub(crate) const PORT: u16 = 9690;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial_alone(
            "a_pre_stop_get_waits_for_its_pod_however_its_port_is_declared",
            declared,
        ),
        trial_alone(
            "a_wait_port_serves_both_families_and_only_the_node_and_its_pod",
            who_may,
        ),
        trial_alone("a_caller_outside_the_node_may_not_wait", off_node),
        trial_alone(
            "a_wait_with_its_own_until_or_timeout_may_end_before_the_drain",
            until_and_text,
        ),
        trial_alone(
            "wait_ports_return_with_the_next_agent_or_sandbox_and_close_with_the_pod",
            restarts,
        ),
        trial_alone("an_application_keeps_its_port", taken),
        trial_alone(
            "an_event_reports_an_application_that_takes_the_wait_port",
            taken_back,
        ),
        trial_alone("a_wait_port_that_cannot_be_opened_is_tried_again", failing),
        trial_alone("wait_ports_need_no_threads", many),
    ]
}

/// A preStop hook that waits on the pod's wait port.
pub(crate) fn hook(port: u16) -> PreStop {
    PreStop::HttpGet {
        port,
        path: "/ebb/wait".into(),
    }
}

/// A pod that declares a wait port by annotation.
pub(crate) fn annotated(name: &str) -> PodSpec {
    PodSpec::new(name)
        .annotation("ebb.dev/wait-port", &PORT.to_string())
        .container(server("app", 8080))
}

/// Waits until ebb listens on the pod's wait port.
pub(crate) async fn until_listening(pod: &StartedPod) -> Result<SocketAddr> {
    let address = pod.v4(PORT)?;
    http::until_open(address, SOON).await?;
    Ok(address)
}

/// Waits from the host's network, as the kubelet does.
fn wait(address: SocketAddr) -> JoinHandle<Result<Report>> {
    tokio::spawn(async move {
        let reply = http::get(address, "/ebb/wait").await?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(serde_json::from_slice(&reply.body)?)
    })
}

/// Sends a GET with this header, and returns the raw answer.
pub(crate) async fn raw_get(address: SocketAddr, target: &str, header: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {target} HTTP/1.1\r\nHost: pod\r\n{header}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    timeout(SOON * 2, stream.read_to_string(&mut answer)).await??;
    Ok(answer)
}

async fn declared(scene: ExclusiveScene) -> Result<()> {
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let by_annotation = annotated("by-annotation");
    let annotated = by_annotation.containers[0].clone().pre_stop(hook(PORT));
    let pods = [
        PodSpec {
            containers: vec![annotated],
            ..by_annotation
        },
        PodSpec::new("by-hook").container(server("app", 8080).pre_stop(hook(PORT))),
        PodSpec::new("by-name")
            .container(server("app", 8080).port("drain", PORT).pre_stop(hook(PORT))),
    ];
    let mut looked_up = 0;
    for spec in pods {
        let name = spec.name.clone();
        let pod = run(&scene.node, spec).await?;
        until_listening(&pod).await?;
        let peer = Peer::served(pod.v4(8080)?).await?;
        let stopping = stop(scene.node.kubelet()?, &pod, 30 * SECOND);
        let begun = agent.until_draining(&name).await?;
        ensure!(
            begun.flows_at_start.is_some_and(|f| f.total() == 1),
            "{begun:?}"
        );
        sleep(SECOND).await;
        ensure!(!stopping.is_finished(), "{name}: the hook has ended");
        // The kubelet's own connection does not hold the drain, and is not counted as arrived.
        let flows = agent.flows(&name).await?;
        let (own, others): (Vec<_>, Vec<_>) = flows.iter().partition(|f| f.local.port() == PORT);
        ensure!(
            own.len() == 1 && own[0].exempt == Some(Exempt::WaitPort),
            "{flows:?}"
        );
        ensure!(others.len() == 1 && others[0].holds, "{flows:?}");
        drop(peer);
        let stop = stopping.await?;
        ensure!(stop.error().is_none(), "{stop:?}");
        let (hook, result) = stop.containers[0].pre_stop.as_ref().context("no hook")?;
        ensure!(result.is_ok() && *hook < 20 * SECOND, "{stop:?}");
        let report = agent.drain(&name).await?;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(
            report.arrived == Some(0) && report.ended == Some(1),
            "{report:?}"
        );
        looked_up += u32::from(report.released_by == Some(ReleasedBy::Lookup));
    }
    // Sometimes an event is late, and then a dump releases. The kubelet's own connection causes no such event.
    ensure!(looked_up > 0, "no release was by lookups");
    // The kubelet does not cancel the hook: the answer has to come before the grace period is over.
    let pod = run(
        &scene.node,
        PodSpec::new("short")
            .grace(6 * SECOND)
            .container(server("app", 8080).pre_stop(hook(PORT))),
    )
    .await?;
    until_listening(&pod).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let stop = stop(scene.node.kubelet()?, &pod, 6 * SECOND).await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let (hook, result) = stop.containers[0].pre_stop.as_ref().context("no hook")?;
    ensure!(result.is_ok() && *hook < 6 * SECOND, "{stop:?}");
    let report = agent.drain("short").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    agent.stop().await
}

async fn who_may(scene: ExclusiveScene) -> Result<()> {
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let pod = run(&scene.node, annotated("both-families")).await?;
    let other = run(&scene.node, annotated("neighbour")).await?;
    let v4 = until_listening(&pod).await?;
    let kubelet = scene.node.kubelet()?;
    // Another pod may not wait here. On the host's network, only its cgroup distinguishes it from the kubelet.
    let on_host = PodSpec::new("on-the-host").host_network();
    let on_host = run(&scene.node, on_host.container(server("app", free_port()))).await?;
    for caller in [&other, &on_host] {
        let url = format!("http://{v4}/ebb/wait");
        let out = dial(&kubelet, &caller.containers[0], url).await??;
        ensure!(
            String::from_utf8_lossy(&out.stdout).contains("only the pod itself and its node"),
            "{out:?}"
        );
    }
    // Nor may a process in the cgroup of a pod that ebb does not know.
    let cgroup = scene.node.paths().cgroup("kubepods/pod-unknown");
    std::fs::create_dir_all(&cgroup)?;
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec 3<>/dev/tcp/{}/{PORT}; \
         printf 'GET /ebb/wait HTTP/1.1\\r\\nHost: pod\\r\\n\\r\\n' >&3; exec cat <&3",
        cgroup.display(),
        v4.ip()
    );
    let mut asking = tokio::process::Command::new("bash");
    let asking = asking.args(["-c", &script]).kill_on_drop(true).output();
    let out = timeout(SOON, asking).await??;
    ensure!(
        String::from_utf8_lossy(&out.stdout).contains("only the pod itself and its node"),
        "{out:?}"
    );
    std::fs::remove_dir(&cgroup)?;
    ensure!(
        agent.drains("both-families").await?.is_empty(),
        "begun by another pod"
    );
    ensure!(agent.drains("neighbour").await?.is_empty());

    let peer = Peer::served(pod.v4(8080)?).await?;
    let waits = [wait(v4), wait(pod.v6(PORT)?)];
    let within = [
        format!("{v4}"),
        format!("127.0.0.1:{PORT}"),
        format!("[::1]:{PORT}"),
    ];
    let within =
        within.map(|to| dial(&kubelet, &pod.containers[0], format!("http://{to}/v1/wait")));
    eventually("all five wait", async || {
        let drains = agent.drains("both-families").await?;
        Ok((drains.first().is_some_and(|d| d.holds == 5)).then_some(()))
    })
    .await?;
    drop(peer);
    for wait in waits {
        let report = wait.await??;
        ensure!(report.pod.uid.as_str() == pod.spec.uid, "{report:?}");
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    }
    for out in within {
        let out = out.await??;
        ensure!(out.status == 0, "{out:?}");
    }
    agent.stop().await
}

async fn off_node(scene: ExclusiveScene) -> Result<()> {
    let port = free_port();
    let all = format!("0.0.0.0:{port}");
    let agent = scene
        .agent_in("ebb", &["--quiet", "300ms", "--http", &all])
        .await?;
    let pod = run(&scene.node, annotated("far-away")).await?;
    let inside = until_listening(&pod).await?;
    let node = SocketAddr::new(NODE_ADDRESS.parse()?, port);
    for (at, says) in [
        (node, "no pod of this node made the connection"),
        (inside, "only the pod itself and its node"),
    ] {
        let answer = tokio::task::block_in_place(|| {
            let far = OffNode::new()?;
            far.get(at, "/ebb/wait")
        })?;
        ensure!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        ensure!(answer.contains(says), "{answer}");
    }
    ensure!(agent.drains("far-away").await?.is_empty());
    agent.stop().await
}

async fn until_and_text(scene: ExclusiveScene) -> Result<()> {
    let agent = scene
        .agent_in("ebb", &["--quiet", "300ms", "--idle-after", "1s"])
        .await?;
    let pod = run(&scene.node, annotated("less")).await?;
    let address = until_listening(&pod).await?;
    for (query, says) in [
        (
            "until=never",
            "until: \"never\" is not one of zero, idle, settled",
        ),
        ("timeout=30", "timeout is not a duration"),
    ] {
        let answer = raw_get(address, &format!("/ebb/wait?{query}"), "Accept: */*").await?;
        ensure!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        ensure!(answer.contains(&says.replace('"', "\\\"")), "{answer}");
    }
    ensure!(
        agent.drains("less").await?.is_empty(),
        "begun by a bad request"
    );

    let mut slow = Peer::asking(pod.v4(8080)?, "/slow?ms=5000").await?;
    let full = wait(address);
    agent.until_draining("less").await?;
    let settled = raw_get(address, "/ebb/wait?until=settled", "Accept: text/plain").await?;
    ensure!(settled.contains("text/plain"), "{settled}");
    ensure!(
        settled.contains("default/less: still draining after"),
        "{settled}"
    );
    let (_, body) = settled.split_once("\r\n\r\n").context("no body")?;
    ensure!(body.lines().count() == 1, "{body}");
    // Its only flow is live until it has its answer and has been quiet.
    let idle = tokio::spawn(raw_get(
        address,
        "/ebb/wait?until=idle",
        "Accept: text/plain",
    ));
    slow.answer("slow\n").await?;
    ensure!(!idle.is_finished(), "the flow was live");
    let idle = idle.await??;
    ensure!(
        idle.contains("still draining") && idle.contains("1 idle"),
        "{idle}"
    );
    let timed = raw_get(address, "/ebb/wait?timeout=100ms", "Accept: */*").await?;
    ensure!(timed.contains("\"phase\":\"drain\""), "{timed}");
    ensure!(
        !full.is_finished(),
        "the timeout of another wait ended this one"
    );
    drop(slow);
    let report = full.await??;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let late = raw_get(address, "/ebb/wait?until=settled", "Accept: text/plain").await?;
    ensure!(late.contains(": Drained: in "), "{late}");
    agent.stop().await
}

async fn restarts(scene: ExclusiveScene) -> Result<()> {
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let kubelet = scene.node.kubelet()?;
    let pod = run(&scene.node, annotated("comes-back")).await?;
    let address = until_listening(&pod).await?;
    agent.stop().await?;
    ensure!(TcpStream::connect(address).await.is_err(), "left behind");
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    until_listening(&pod).await?;
    let report = wait(address).await??;
    ensure!(report.pod.uid.as_str() == pod.spec.uid, "{report:?}");

    // An open listener would keep the namespace of a sandbox that is gone.
    let netns = kubelet.pid(&pod.containers[0]).await?;
    let netns = Netns::of_process(netns)?;
    let stop = stop(kubelet.clone(), &pod, 5 * SECOND).await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    eventually("the port is free", async || {
        Ok(netns.run(|| Ok(is_free()))?.then_some(()))
    })
    .await?;
    drop(netns);
    kubelet.remove(&pod).await?;
    let again = run(&scene.node, pod.spec.clone()).await?;
    ensure!(again.sandbox_id != pod.sandbox_id);
    let address = until_listening(&again).await?;
    // The answer is not that of the old pod's wait.
    let peer = Peer::served(again.v4(8080)?).await?;
    let out = raw_get(address, "/ebb/wait?timeout=500ms", "Accept: */*").await?;
    ensure!(
        out.starts_with("HTTP/1.1 200") && out.contains(&again.spec.uid),
        "{out}"
    );
    ensure!(!out.contains("\"reason\""), "{out}");
    drop(peer);
    let report = wait(address).await??;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let log = agent.log();
    agent.stop().await?;
    let log = std::fs::read_to_string(log)?;
    ensure!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    Ok(())
}

/// Whether the wait port can be bound in this thread's namespace.
fn is_free() -> bool {
    std::net::TcpListener::bind(("0.0.0.0", PORT)).is_ok()
}

async fn taken(scene: ExclusiveScene) -> Result<()> {
    let kubelet = scene.node.kubelet()?;
    // The application listens first, and ebb tries later.
    let spec = PodSpec::new("taken")
        .annotation("ebb.dev/wait-port", "8080")
        .container(server("app", 8080));
    let pod = run(&scene.node, spec).await?;
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let warned = eventually("the pod is warned", async || {
        let warnings = agent.pod("taken").await?.warnings;
        Ok((!warnings.is_empty()).then_some(warnings))
    })
    .await?;
    ensure!(
        warned.len() == 1 && warned[0].contains("wait port 8080"),
        "{warned:?}"
    );
    let reply = http::get(pod.v4(8080)?, "/").await?;
    ensure!(reply.body == "ok\n", "not the application: {reply:?}");
    // The application's flows are not exempt: they hold.
    let peer = Peer::served(pod.v4(8080)?).await?;
    let flows = agent.flows("taken").await?;
    ensure!(
        flows.iter().any(|f| f.remote == peer.address && f.holds),
        "{flows:?}"
    );
    let log = std::fs::read_to_string(agent.log())?;
    ensure!(log.matches("wait port 8080").count() == 1, "{log}");

    // ebb listens first: when the container restarts, it finds the port free.
    let spec = PodSpec::new("restarted")
        .annotation("ebb.dev/wait-port", &PORT.to_string())
        .container(server("app", 8080));
    let mut pod = run(&scene.node, spec).await?;
    let address = until_listening(&pod).await?;
    kubelet
        .stop_container(&pod.containers[0].clone(), SECOND)
        .await?;
    kubelet.restart(&mut pod, "app", 1).await?;
    eventually("the port is free", async || {
        Ok(TcpStream::connect(address).await.is_err().then_some(()))
    })
    .await?;
    ensure!(agent.pod("restarted").await?.warnings.is_empty());
    agent.stop().await
}

/// A new version of the application binds ebb's wait port: it fails once, and then succeeds.
async fn taken_back(scene: ExclusiveScene) -> Result<()> {
    let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
    let agent = scene.agent_with_api(&api, &["--quiet", "300ms"]).await?;
    let kubelet = scene.node.kubelet()?;
    let spec = annotated("wants-it");
    api.create(&spec, NODE_NAME);
    let mut pod = run(&scene.node, spec).await?;
    let address = until_listening(&pod).await?;
    pod.spec.containers[0] = server("app", PORT);
    let old = pod.containers[0].clone();
    kubelet.stop_container(&old, SECOND).await?;
    kubelet.restart(&mut pod, "app", 1).await?;
    // The agent frees the port once it knows the new container, which may be before the application starts.
    let has_port = eventually("the port is free, or the application's", async || {
        if TcpStream::connect(address).await.is_err() {
            return Ok(Some(false));
        }
        let reply = http::get(address, "/").await;
        Ok(reply.is_ok_and(|r| r.body == "ok\n").then_some(true))
    })
    .await?;
    if !has_port {
        kubelet.restart(&mut pod, "app", 2).await?;
    }
    http::until_open(address, SOON).await?;
    // The next agent finds the port in use at once; this one would in a minute.
    agent.stop().await?;
    let agent = scene.agent_with_api(&api, &["--quiet", "300ms"]).await?;
    let events = || {
        let mut events = api.events();
        events.retain(|e| e["regarding"]["uid"] == pod.spec.uid.as_str());
        events
    };
    let event = |reason: &'static str| {
        eventually("the Event is written", async move || {
            Ok(events().into_iter().find(|e| e["reason"] == reason))
        })
    };
    let taken = event("WaitPortTaken").await?;
    let note = taken["note"].as_str().unwrap_or_default();
    ensure!(
        note.starts_with("wait port 9690: another process"),
        "{taken}"
    );
    ensure!(
        http::get(address, "/").await?.body == "ok\n",
        "not the application"
    );
    // A drain does not repeat it as a warning about the policy.
    let wait = dial(
        &kubelet,
        &pod.containers[0],
        format!("http://{NODE_V4}:{}/v1/wait", agent.port),
    );
    ensure!(wait.await??.status == 0);
    ensure!(agent.drain("wants-it").await?.warnings.is_empty());
    event("Drained").await?;
    let reasons: Vec<_> = events().iter().map(|e| e["reason"].clone()).collect();
    ensure!(!reasons.iter().any(|r| r == "PolicyInvalid"), "{reasons:?}");
    agent.stop().await
}

async fn failing(scene: ExclusiveScene) -> Result<()> {
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let pid = Pid::from_raw(agent.pid()?.cast_signed());
    let descriptors = format!("/proc/{}/fd", agent.pid()?);
    // The agent has then counted the connections that are older than itself.
    let mut open = 0;
    eventually("it opens nothing more", async || {
        let before = std::mem::replace(&mut open, std::fs::read_dir(&descriptors)?.count());
        tokio::time::sleep(SECOND / 2).await;
        Ok((before == open).then_some(()))
    })
    .await?;
    // From here on, before the pod exists, the agent can open no file and the CLI can't connect.
    let none_left = Rlimit {
        current: Some(3),
        ..getrlimit(Resource::Nofile)
    };
    let before = prlimit(pid, Resource::Nofile, none_left)?;
    let pod = run(&scene.node, annotated("later")).await?;
    eventually("the agent logs what is wrong", async || {
        let log = std::fs::read_to_string(agent.log())?;
        let mut lines = log
            .lines()
            .filter(|line| line.ends_with("pod=default/later"));
        Ok(lines
            .find(|line| line.contains("can't listen on wait port 9690"))
            .map(|_| ()))
    })
    .await?;
    prlimit(pid, Resource::Nofile, before)?;
    let report = wait(until_listening(&pod).await?).await??;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    agent.stop().await
}

async fn many(scene: ExclusiveScene) -> Result<()> {
    // More than the callers of one address that the agent resolves at one pod.
    const PODS: usize = 70;
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let first = run(&scene.node, annotated("many")).await?;
    until_listening(&first).await?;
    let before = idle_threads(&agent).await?;
    let kubelet = scene.node.kubelet()?;
    // A wait port needs a sandbox and no container.
    let specs = (0..PODS).map(|n| {
        PodSpec::new(&format!("many-{n}")).annotation("ebb.dev/wait-port", &PORT.to_string())
    });
    let runs = specs.map(|spec| {
        let kubelet = kubelet.clone();
        async move { kubelet.run(&spec).await }
    });
    let pods: Vec<_> = stream::iter(runs).buffer_unordered(5).try_collect().await?;
    try_join_all(pods.iter().map(until_listening)).await?;
    let waits: Vec<_> = pods
        .iter()
        .map(|pod| Ok(wait(pod.v4(PORT)?)))
        .collect::<Result<_>>()?;
    for wait in waits {
        let report = wait.await??;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    }
    let after = idle_threads(&agent).await?;
    ensure!(
        after <= before + 2,
        "{before} threads before, {after} with {PODS} pods more"
    );
    let ends = pods.iter().map(async |pod| {
        kubelet.stop_sandbox(pod).await?;
        kubelet.remove(pod).await
    });
    stream::iter(ends)
        .buffer_unordered(5)
        .try_collect::<()>()
        .await?;
    agent.stop().await
}

/// The threads of an agent that has nothing to do: those of a dump end after a while.
async fn idle_threads(agent: &Agent) -> Result<usize> {
    let mut least = usize::MAX;
    for _ in 0..12 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()?))?;
        let line = status.lines().find_map(|l| l.strip_prefix("Threads:"));
        least = least.min(line.context("no thread count")?.trim().parse()?);
        sleep(Duration::from_secs(1)).await;
    }
    Ok(least)
}
