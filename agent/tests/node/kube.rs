//! With an API server (a stand-in, [`ebb_testkit::api_server`]), whose state decides whether a stop ends a pod.

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::{DeadlineCause, ReleaseReason};
use ebb_protocol::views::{Explanation, StopView};
use ebb_testkit::{
    api_server::{AnswerMode, ApiServer, ApiVerb, Delivery, Faults},
    http,
    kubelet::{Kubelet, PodSpec, StartedContainer, StartedPod},
};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::{Agent, NODE_NAME, Proxy, timed},
    hold::stop,
    peer::Peer,
    scene::{NODE_V4, SECOND, SOON, Scene, eventually, free_port, server, trial},
    sidecar::in_turn,
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_stop_is_held_although_the_watch_shows_the_deletion_after_it",
            late_watch,
        ),
        trial(
            "while_the_watch_is_stalled_one_get_finds_the_deletion",
            stalled_watch,
        ),
        trial(
            "while_the_api_server_does_not_answer_the_only_container_is_not_held",
            silent_api_server,
        ),
        trial(
            "a_liveness_restart_is_not_held_and_the_deletion_after_it_is",
            restarted,
        ),
        trial(
            "one_of_two_containers_of_a_pod_that_is_not_deleted_is_not_held",
            one_restarted,
        ),
        trial("an_eviction_without_a_deletion_timestamp_is_held", evicted),
        trial(
            "a_main_container_is_held_and_its_sidecar_stops_with_the_remaining_grace",
            sidecar_after_main,
        ),
        trial(
            "a_wait_for_a_restart_ends_soon_and_closes_and_cuts_nothing",
            waits_for_a_restart,
        ),
        trial(
            "deleting_a_mirror_pod_does_not_end_its_static_pod",
            mirrored,
        ),
        trial(
            "a_forced_delete_ends_a_hold_at_once_and_a_new_pod_with_the_name_is_not_held",
            recreated,
        ),
        trial("a_completed_job_is_not_held_and_gets_no_event", completed),
        trial(
            "annotations_of_the_api_server_win_over_those_of_the_sandbox",
            annotated,
        ),
    ]
}

/// A node with an API server, an agent and a proxy.
pub(crate) struct Cluster {
    pub(crate) scene: Scene,
    pub(crate) api: ApiServer,
    pub(crate) agent: Agent,
    pub(crate) proxy: Proxy,
}

impl Cluster {
    /// Starts an API server, an agent that watches it, and a proxy.
    pub(crate) async fn start(scene: Scene, flags: &[&str]) -> Result<Self> {
        let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
        let cluster = Self::start_with(scene, api, flags).await?;
        cluster.until_watched().await?;
        Ok(cluster)
    }

    /// Requires that the pod's drain has ended because the pod lives on: ebb has closed no connection, and the client that
    /// was idle is served.
    pub(crate) async fn lives_on(&self, pod: &str, idle: &mut Peer) -> Result<()> {
        let report = self.agent.drain(pod).await?;
        ensure!(
            report.reason == Some(ReleaseReason::NotTerminating),
            "{report:?}"
        );
        ensure!(
            report.idle_closed == 0 && report.cut_total == Some(0),
            "{report:?}"
        );
        idle.ask("/").await?;
        idle.answer("ok\n").await?;
        Ok(())
    }

    /// Starts a proxy, and an agent that uses this API server, whatever state it is in.
    pub(crate) async fn start_with(scene: Scene, api: ApiServer, flags: &[&str]) -> Result<Self> {
        let flags = [&["--quiet", "300ms"], flags].concat();
        let agent = scene.agent_with_api(&api, &flags).await?;
        let proxy = scene.proxy(&agent).await?;
        Ok(Self {
            scene,
            api,
            agent,
            proxy,
        })
    }

    /// Waits until the agent has a watch open.
    pub(crate) async fn until_watched(&self) -> Result<()> {
        eventually("the agent watches", async || {
            Ok((self.api.watching() > 0).then_some(()))
        })
        .await
    }

    /// Creates a pod in the API server and then runs it, as happens with all but static pods.
    pub(crate) async fn run(&self, mut spec: PodSpec) -> Result<StartedPod> {
        self.api.create(&spec, NODE_NAME);
        // The kubelet sets this on the sandbox, not in the API server.
        spec = spec.annotation("kubernetes.io/config.source", "api");
        let pod = self.scene.run(spec).await?;
        // Listing many pods is slow, and the agent does not hold a container that it does not know.
        eventually("the agent has seen the pod", async || {
            let seen = self.agent.pods(&pod.spec.name).await?;
            let seen = seen.iter().any(|p| p.pod.uid.as_str() == pod.spec.uid);
            Ok(seen.then_some(()))
        })
        .await?;
        Ok(pod)
    }

    /// Runs a pod with one server, on port 8080.
    pub(crate) async fn serve(&self, name: &str) -> Result<StartedPod> {
        self.run(PodSpec::new(name).container(server("app", 8080)))
            .await
    }

    /// A kubelet whose calls go through the proxy.
    pub(crate) fn kubelet(&self) -> Result<Kubelet> {
        self.scene.kubelet_at(&self.proxy)
    }

    /// Waits until the agent knows that the pod is being deleted.
    pub(crate) async fn until_deleting(&self, pod: &str) -> Result<Explanation> {
        eventually("the agent knows of the deletion", async || {
            let e = self.agent.explain(pod).await?;
            Ok((e.deleting == Some(true)).then_some(e))
        })
        .await
    }

    /// Waits until the agent knows this grace period of the pod.
    pub(crate) async fn until_grace(&self, pod: &str, ms: u64) -> Result<()> {
        eventually("the agent knows of the grace period", async || {
            let now = self.agent.explain(pod).await?.now;
            let knows = now.is_some_and(|now| now.grace_ms == Some(ms));
            Ok(knows.then_some(()))
        })
        .await
    }

    /// Stops a pod that has one flow. Requires that it is held, with this evidence, until the flow is gone.
    pub(crate) async fn is_held(&self, pod: &StartedPod, peer: Peer, evidence: &str) -> Result<()> {
        let name = &pod.spec.name;
        let stopping = stop(self.kubelet()?, pod, 30 * SECOND);
        self.agent.until_draining(name).await?;
        sleep(SECOND).await;
        ensure!(!stopping.is_finished(), "released with a flow open");
        drop(peer);
        let stop = stopping.await?;
        ensure!(stop.error().is_none(), "{stop:?}");
        let report = self.agent.drain(name).await?;
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.cut_total == Some(0), "{report:?}");
        let stops = self.stops(pod).await?;
        let held = stops.iter().filter(|s| s.call == "StopContainer" && s.held);
        let held: Vec<_> = held.map(|s| s.evidence.as_deref()).collect();
        ensure!(
            held == vec![Some(evidence); pod.containers.len()],
            "{stops:?}"
        );
        Ok(())
    }

    /// Stops one container. Requires that its stop is forwarded at once, with this evidence.
    pub(crate) async fn is_not_held(
        &self,
        pod: &StartedPod,
        container: &str,
        evidence: &str,
    ) -> Result<()> {
        let container: &StartedContainer = pod.container(container)?;
        let kubelet = self.kubelet()?;
        let (result, took) = timed(kubelet.stop_container(container, 30 * SECOND)).await;
        result?;
        ensure!(took < 5 * SECOND, "held for {took:?}");
        let timeouts = self.scene.stop_timeouts(&container.id)?;
        // Less the time that the agent took to decide, if that was a second.
        let [timeout] = timeouts[..] else {
            anyhow::bail!("stopped with {timeouts:?}");
        };
        ensure!((27..=30).contains(&timeout), "{timeout} s");
        let stops = self.stops(pod).await?;
        let last = stops.first().context("the stop is not listed")?;
        ensure!(
            !last.held
                && last.reason.as_deref() == Some("not-terminating")
                && last.evidence.as_deref() == Some(evidence),
            "{last:?}"
        );
        let text = self.agent.query(&["explain", &pod.spec.uid]).await?;
        ensure!(text.contains("forwarded (not-terminating)"), "{text}");
        let drains = self.agent.drains(&pod.spec.name).await?;
        ensure!(drains.is_empty(), "{drains:?}");
        Ok(())
    }

    pub(crate) async fn stops(&self, pod: &StartedPod) -> Result<Vec<StopView>> {
        Ok(self.agent.explain(&pod.spec.uid).await?.stops)
    }
}

async fn late_watch(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("late").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.misbehave(Faults {
        delivery: Delivery::After(SECOND / 10),
        ..Faults::default()
    });
    c.api.delete(&pod.spec, 30 * SECOND);
    c.is_held(&pod, peer, "deleting").await
}

async fn stalled_watch(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("stalled").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.misbehave(Faults {
        delivery: Delivery::Stalled,
        gets: AnswerMode::After(SECOND / 10),
        ..Faults::default()
    });
    c.api.delete(&pod.spec, 30 * SECOND);
    let stopping = stop(c.kubelet()?, &pod, 30 * SECOND);
    c.agent.until_draining("stalled").await?;
    // Checked before the kubelet stops the sandbox, which causes another GET.
    ensure!(c.api.count(ApiVerb::Get) == 1, "{:?}", c.api.requests());
    let asked = c.api.requests();
    // The agent requests only the metadata of pods.
    let of_pods = asked.iter().filter(|a| a.path.starts_with("/api/v1/"));
    ensure!(
        of_pods
            .clone()
            .all(|a| a.metadata || a.verb == ApiVerb::Get),
        "{asked:?}"
    );
    let get = of_pods.clone().find(|a| a.verb == ApiVerb::Get);
    let get = get.context("no GET")?;
    ensure!(
        get.path == "/api/v1/namespaces/default/pods/stalled",
        "{get:?}"
    );
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = c.agent.drain("stalled").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

async fn silent_api_server(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("silent").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    c.api.misbehave(Faults {
        delivery: Delivery::Stalled,
        gets: AnswerMode::Never,
        ..Faults::default()
    });
    c.api.delete(&pod.spec, 30 * SECOND);
    c.is_not_held(&pod, "app", "only-container").await
}

async fn restarted(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let mut pod = c.serve("unhealthy").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.is_not_held(&pod, "app", "not-deleting").await?;
    ensure!(c.api.count(ApiVerb::Get) == 1, "{:?}", c.api.requests());
    drop(peer);
    c.kubelet()?.restart(&mut pod, "app", 1).await?;
    http::until_open(pod.v4(8080)?, SOON).await?;
    ensure!(c.api.events().is_empty(), "{:?}", c.api.events());

    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.delete(&pod.spec, 30 * SECOND);
    c.is_held(&pod, peer, "deleting").await
}

async fn one_restarted(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--hold-unknown"]).await?;
    let spec = PodSpec::new("one-of-two")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = c.run(spec).await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    c.is_not_held(&pod, "app", "not-deleting").await
}

async fn evicted(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let spec = PodSpec::new("evicted")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = c.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.is_held(&pod, peer, "all-containers").await?;
    // The kubelet reports the eviction only when the pod has ended.
    c.api.set_phase(&pod.spec, "Failed");
    c.api.remove(&pod.spec);
    Ok(())
}

async fn sidecar_after_main(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let spec = PodSpec::new("main-first")
        .container(server("side", 8081).sidecar())
        .container(server("app", 8080));
    let pod = c.run(spec).await?;
    let _app = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let _side = Peer::served(pod.v4(8081)?).await?;
    let grace = 9 * SECOND;
    c.api.delete(&pod.spec, grace);
    let stop = stop(c.kubelet()?, &pod, grace).await?;
    in_turn(&stop)?;
    // The reserve is a third of so short a grace period. The sidecar gets what the hold and the main container have
    // left, and the kubelet's minimum timeout is too short to be held.
    let timeouts: Vec<_> = stop.containers.iter().map(|c| c.timeout).collect();
    ensure!(
        timeouts[0] == grace && (2 * SECOND..=3 * SECOND).contains(&timeouts[1]),
        "{timeouts:?}"
    );
    let app = c.scene.stop_timeouts(&pod.container("app")?.id)?;
    let side = c.scene.stop_timeouts(&pod.container("side")?.id)?;
    ensure!(app == [3], "{app:?}");
    ensure!(side.len() == 1 && side[0] <= 3, "{side:?}");
    ensure!(stop.took <= grace + SECOND, "{stop:?}");
    let report = c.agent.drain("main-first").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.cut_total == Some(2), "{report:?}");
    let stops = c.stops(&pod).await?;
    let of_app = stops.iter().find(|s| s.container.as_deref() == Some("app"));
    let of_app = of_app.context("the stop is not listed")?;
    ensure!(
        of_app.held && of_app.evidence.as_deref() == Some("deleting"),
        "{of_app:?}"
    );
    Ok(())
}

async fn waits_for_a_restart(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--idle-flows", "close", "--idle-after", "100ms"]).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let pod = c.serve("restarting").await?;
    let mut idle = Peer::served(pod.v4(8080)?).await?;
    let kubelet = c.scene.kubelet()?;
    let (out, took) = timed(dial(&kubelet, &pod.containers[0], url)).await;
    ensure!(out??.status == 0);
    ensure!(took < 20 * SECOND, "{took:?}");
    c.lives_on("restarting", &mut idle).await?;
    // No Event warns of a pod that lives on.
    let events = c.api.events();
    ensure!(events.iter().all(|e| e["type"] != "Warning"), "{events:?}");
    Ok(())
}

async fn mirrored(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let on_node = PodSpec::new("static-node-1")
        .annotation("kubernetes.io/config.source", "file")
        .container(server("app", 8080));
    // The mirror has a UID of its own.
    let mirror = PodSpec::new("static-node-1")
        .annotation("kubernetes.io/config.source", "file")
        .annotation("kubernetes.io/config.mirror", &on_node.uid)
        .annotation("ebb.dev/quiet", "700ms");
    c.api.create(&mirror, NODE_NAME);
    let pod = c.scene.run(on_node).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    // The mirror's annotations apply to the static pod.
    let quiet = async || {
        let e = c.agent.explain("static-node-1").await?;
        let now = e.now.context("the agent does not know the pod")?;
        let mut quiet = now.settings.into_iter().filter(|s| s.name == "quiet");
        Ok(quiet.next().filter(|q| q.value == "700ms").map(|_| ()))
    };
    eventually("the agent uses the mirror's annotations", quiet).await?;

    c.api.delete(&mirror, 30 * SECOND);
    // A later change on the same watch: once the agent has seen it, it has seen the deletion too.
    let after = PodSpec::new("after").annotation("ebb.dev/quiet", "soon");
    c.api.create(&after, NODE_NAME);
    eventually("the watch has gone on", async || {
        Ok((!c.api.events().is_empty()).then_some(()))
    })
    .await?;
    let e = c.agent.explain("static-node-1").await?;
    ensure!(e.deleting != Some(true), "{e:?}");
    c.is_not_held(&pod, "app", "only-container").await?;
    drop(peer);
    ensure!(c.api.count(ApiVerb::Get) == 0, "{:?}", c.api.requests());
    Ok(())
}

async fn recreated(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let old = c.serve("same").await?;
    let peer = Peer::served(old.v4(8080)?).await?;
    c.api.delete(&old.spec, 30 * SECOND);
    let stopping = stop(c.kubelet()?, &old, 30 * SECOND);
    c.agent.until_draining("same").await?;
    // Deleted by force while it is held, and created again.
    c.api.remove(&old.spec);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = c.agent.drain("same").await?;
    ensure!(report.pod.uid.as_str() == old.spec.uid, "{report:?}");
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(
        report.deadline_cause == DeadlineCause::Removed,
        "{report:?}"
    );
    drop(peer);
    let (new, kubelet) = (c.serve("same").await?, c.kubelet()?);
    let _other = Peer::served(new.v4(8080)?).await?;
    let (stopped, took) = timed(kubelet.stop_container(&new.containers[0], 30 * SECOND)).await;
    stopped?;
    ensure!(took < 15 * SECOND, "held for {took:?}");
    let stops = c.stops(&new).await?;
    let why = stops.first().and_then(|s| s.evidence.as_deref());
    ensure!(why == Some("not-deleting"), "{stops:?}");
    let events = c.api.events();
    let about = |event: &serde_json::Value| event["regarding"]["uid"] == old.spec.uid.as_str();
    ensure!(!events.is_empty() && events.iter().all(about), "{events:?}");
    Ok(())
}

async fn completed(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--hold-unknown"]).await?;
    let pod = c.serve("job").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = c.scene.kubelet()?;
    // The job finishes and exits by itself.
    let pid = kubelet.pid(&pod.containers[0]).await?;
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).context("no pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    eventually("the container has ended", async || {
        let state = kubelet.status(&pod.containers[0]).await?.state();
        Ok((state == k8s_cri::v1::ContainerState::ContainerExited).then_some(()))
    })
    .await?;
    drop(peer);
    c.api.set_phase(&pod.spec, "Succeeded");
    // The kubelet stops the sandbox of a pod whose containers have all exited.
    let (result, took) = timed(c.kubelet()?.stop_sandbox(&pod)).await;
    result?;
    ensure!(took < 5 * SECOND, "held for {took:?}");
    // The job's TTL is over.
    c.api.delete(&pod.spec, 30 * SECOND);
    let stop = c.kubelet()?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none() && stop.took < 5 * SECOND, "{stop:?}");
    c.api.remove(&pod.spec);
    let drains = c.agent.drains("job").await?;
    ensure!(drains.is_empty(), "{drains:?}");
    ensure!(c.api.events().is_empty(), "{:?}", c.api.events());
    Ok(())
}

async fn annotated(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let spec = PodSpec::new("annotated")
        .annotation("ebb.dev/until", "zero")
        .annotation("ebb.dev/max-hold", "20s")
        .container(server("app", 8080));
    let pod = c.run(spec).await?;
    // With the sandbox's annotations, this flow would hold the pod for 20 s, because it never ends.
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.annotate(&pod.spec, "ebb.dev/until", Some("settled"));
    c.api.annotate(&pod.spec, "ebb.dev/max-hold", None);
    c.api.delete(&pod.spec, 30 * SECOND);
    c.until_deleting("annotated").await?;
    let stop = c.kubelet()?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = c.agent.drain("annotated").await?;
    ensure!(
        report.until == ebb_core::policy::Until::Settled,
        "{report:?}"
    );
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    // The deadline comes from the whole grace period, not from the sandbox's 20 s.
    ensure!(report.deadline_ms > 20_000, "{report:?}");
    Ok(())
}
