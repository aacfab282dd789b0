//! With an API server (a stand-in, [`ebb_node::api_server`]): what it says decides whether a stop is a pod's end.

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::report::ReleaseReason,
    report::view::{Explanation, StopView},
};
use ebb_node::{
    api_server::{Answer, ApiServer, Delivery, Faults, Verb},
    http,
    kubelet::{Container, Kubelet, Pod, PodSpec, PreStop},
};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::{Agent, NODE_NAME, Proxy, timed},
    hold::stop,
    peer::Peer,
    scene::{FIXTURE, NODE_V4, SECOND, SOON, Scene, eventually, free_port, server, trial},
    sidecar::in_turn,
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_deletion_that_the_watch_tells_after_the_stop_is_one_all_the_same",
            told_late,
        ),
        trial(
            "where_the_watch_is_stalled_one_question_tells_the_deletion",
            asked_for,
        ),
        trial(
            "where_the_api_server_says_nothing_at_all_the_only_container_is_not_held",
            never_told,
        ),
        trial(
            "a_liveness_restart_is_not_held_and_the_deletion_after_it_is",
            restarted,
        ),
        trial(
            "one_of_two_containers_of_a_pod_that_is_not_deleted_is_not_held",
            one_restarted,
        ),
        trial(
            "an_eviction_sets_no_deletion_timestamp_and_is_held",
            evicted,
        ),
        trial(
            "a_main_container_is_held_and_its_sidecar_after_it_stops_with_what_is_left",
            sidecar_after_main,
        ),
        trial(
            "an_evicted_pod_of_one_container_is_held_by_its_hook",
            evicted_with_a_hook,
        ),
        trial(
            "the_end_of_a_mirror_pod_is_not_the_end_of_its_static_pod",
            mirrored,
        ),
        trial(
            "a_pod_that_comes_again_under_its_name_is_not_affected_by_the_end_of_the_first",
            recreated,
        ),
        trial(
            "a_job_that_completes_is_not_held_and_not_told_of",
            completed,
        ),
        trial(
            "annotations_of_the_api_server_win_over_those_of_the_sandbox",
            annotated,
        ),
        trial(
            "a_second_delete_with_a_shorter_grace_shortens_the_hold",
            shortened,
        ),
        trial("a_wait_ends_before_the_grace_of_the_delete_does", waits),
        trial(
            "a_wait_that_is_there_before_the_news_of_the_delete_ends_in_time_all_the_same",
            waits_early,
        ),
        trial("what_has_passed_of_the_grace_is_not_waited_for", waits_late),
    ]
}

/// A node of a cluster.
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

    /// Starts an agent that finds this API server as it is, and a proxy.
    pub(crate) async fn start_with(scene: Scene, api: ApiServer, flags: &[&str]) -> Result<Self> {
        let flags = [&["--quiet", "300ms"], flags].concat();
        let agent = scene.agent_of(&api, &flags).await?;
        let proxy = scene.proxy(&agent).await?;
        Ok(Self {
            scene,
            api,
            agent,
            proxy,
        })
    }

    /// Waits until the agent watches.
    pub(crate) async fn until_watched(&self) -> Result<()> {
        eventually("the agent watches", async || {
            Ok((self.api.watching() > 0).then_some(()))
        })
        .await
    }

    /// Runs a pod that is known to the API server first, as every pod but a static one is.
    pub(crate) async fn run(&self, mut spec: PodSpec) -> Result<Pod> {
        self.api.create(&spec, NODE_NAME);
        // The kubelet's own, which the sandbox has and the API server does not.
        spec = spec.annotation("kubernetes.io/config.source", "api");
        let pod = self.scene.run(spec).await?;
        // A node with many pods is slow to list them, and a container that is not known is not held.
        eventually("the agent has seen the pod", async || {
            let seen = self.agent.pods(&pod.spec.name).await?;
            let seen = seen.iter().any(|p| p.pod.uid.as_str() == pod.spec.uid);
            Ok(seen.then_some(()))
        })
        .await?;
        Ok(pod)
    }

    /// Runs a pod with one server, on port 8080.
    pub(crate) async fn serve(&self, name: &str) -> Result<Pod> {
        self.run(PodSpec::new(name).container(server("app", 8080)))
            .await
    }

    /// The kubelet, through the proxy.
    pub(crate) fn kubelet(&self) -> Result<Kubelet> {
        self.scene.kubelet_at(&self.proxy)
    }

    /// Waits until the agent's watch has shown it a deletion.
    pub(crate) async fn until_deleting(&self, pod: &str) -> Result<Explanation> {
        eventually("the agent knows of the deletion", async || {
            let e = self.agent.explain(pod).await?;
            Ok((e.deleting == Some(true)).then_some(e))
        })
        .await
    }

    /// Waits until the agent knows of this grace period.
    async fn until_grace(&self, pod: &str, ms: u64) -> Result<()> {
        eventually("the agent knows of the grace period", async || {
            let now = self.agent.explain(pod).await?.now;
            let knows = now.is_some_and(|now| now.grace_ms == Some(ms));
            Ok(knows.then_some(()))
        })
        .await
    }

    /// Ends a pod that has one flow, and demands that it is held until that has gone, because of this.
    pub(crate) async fn is_held(&self, pod: &Pod, peer: Peer, evidence: &str) -> Result<()> {
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

    /// Stops one container, and demands that it is not held, because of this.
    pub(crate) async fn passes(&self, pod: &Pod, container: &str, evidence: &str) -> Result<()> {
        let container: &Container = pod.container(container)?;
        let kubelet = self.kubelet()?;
        let (result, took) = timed(kubelet.stop_container(container, 30 * SECOND)).await;
        result?;
        ensure!(took < 5 * SECOND, "held for {took:?}");
        let timeouts = self.scene.stop_timeouts(&container.id)?;
        // Less what the verdict took, if that was a second.
        let [timeout] = timeouts[..] else {
            anyhow::bail!("stopped with {timeouts:?}");
        };
        ensure!((27..=30).contains(&timeout), "{timeout} s");
        let stops = self.stops(pod).await?;
        let last = stops.first().context("it is not remembered")?;
        ensure!(
            !last.held
                && last.reason.as_deref() == Some("not-terminating")
                && last.evidence.as_deref() == Some(evidence),
            "{last:?}"
        );
        let text = self.agent.query(&["explain", &pod.spec.uid]).await?;
        ensure!(text.contains("passed (not-terminating)"), "{text}");
        let drains = self.agent.drains(&pod.spec.name).await?;
        ensure!(drains.is_empty(), "{drains:?}");
        Ok(())
    }

    async fn stops(&self, pod: &Pod) -> Result<Vec<StopView>> {
        Ok(self.agent.explain(&pod.spec.uid).await?.stops)
    }
}

async fn told_late(scene: Scene) -> Result<()> {
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

async fn asked_for(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("stalled").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.misbehave(Faults {
        delivery: Delivery::Stalled,
        gets: Answer::After(SECOND / 10),
        ..Faults::default()
    });
    c.api.delete(&pod.spec, 30 * SECOND);
    let stopping = stop(c.kubelet()?, &pod, 30 * SECOND);
    c.agent.until_draining("stalled").await?;
    // Before the kubelet goes on to the sandbox, which is one more stop and one more question.
    ensure!(c.api.count(Verb::Get) == 1, "{:?}", c.api.asked());
    let asked = c.api.asked();
    // Of pods never more than the metadata.
    let of_pods = asked.iter().filter(|a| a.path.starts_with("/api/v1/"));
    ensure!(of_pods.clone().all(|a| a.metadata), "{asked:?}");
    let get = of_pods.clone().find(|a| a.verb == Verb::Get);
    let get = get.context("no question")?;
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

async fn never_told(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("silent").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    c.api.misbehave(Faults {
        delivery: Delivery::Stalled,
        gets: Answer::Never,
        ..Faults::default()
    });
    c.api.delete(&pod.spec, 30 * SECOND);
    c.passes(&pod, "app", "only-container").await
}

async fn restarted(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let mut pod = c.serve("unhealthy").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.passes(&pod, "app", "not-deleting").await?;
    ensure!(c.api.count(Verb::Get) == 1, "{:?}", c.api.asked());
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
    c.passes(&pod, "app", "not-deleting").await
}

async fn evicted(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let spec = PodSpec::new("evicted")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = c.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.is_held(&pod, peer, "all-containers").await?;
    // What the kubelet says of it comes when all is over.
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
    // A third of so short a grace period is the application's own. The sidecar gets what the hold and the main
    // container have left, and the kubelet's least is below what is ever held.
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
    let of_app = of_app.context("it is not remembered")?;
    ensure!(
        of_app.held && of_app.evidence.as_deref() == Some("deleting"),
        "{of_app:?}"
    );
    Ok(())
}

async fn evicted_with_a_hook(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let hook = PreStop::Exec(vec![FIXTURE.into(), "get".into(), url]);
    let spec = PodSpec::new("evicted-one").container(server("app", 8080).pre_stop(hook));
    let pod = c.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    // No deletion is told, so that the stop itself is passed as a restart's would be.
    let stopping = stop(c.kubelet()?, &pod, 30 * SECOND);
    c.agent.until_draining("evicted-one").await?;
    sleep(2 * SECOND).await;
    ensure!(!stopping.is_finished(), "stopped with a flow open");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = c.agent.drain("evicted-one").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.ended == Some(1), "{report:?}");
    let stops = c.stops(&pod).await?;
    let passed = stops.iter().find(|s| s.call == "StopContainer");
    let evidence = passed.and_then(|s| s.evidence.as_deref());
    ensure!(evidence == Some("not-deleting"), "{stops:?}");
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
    // What the API server has of it is the static pod's.
    let quiet = async || {
        let e = c.agent.explain("static-node-1").await?;
        let now = e.now.context("it is not known")?;
        let mut quiet = now.settings.into_iter().filter(|s| s.name == "quiet");
        Ok(quiet.next().filter(|q| q.value == "700ms").map(|_| ()))
    };
    eventually("the mirror's annotations are the pod's", quiet).await?;

    c.api.delete(&mirror, 30 * SECOND);
    // Another word of the watch, after which the deletion must have been heard.
    let after = PodSpec::new("after").annotation("ebb.dev/quiet", "soon");
    c.api.create(&after, NODE_NAME);
    eventually("the watch has gone on", async || {
        Ok((!c.api.events().is_empty()).then_some(()))
    })
    .await?;
    let e = c.agent.explain("static-node-1").await?;
    ensure!(e.deleting != Some(true), "{e:?}");
    c.passes(&pod, "app", "only-container").await?;
    drop(peer);
    ensure!(c.api.count(Verb::Get) == 0, "{:?}", c.api.asked());
    Ok(())
}

async fn recreated(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let old = c.serve("same").await?;
    let peer = Peer::served(old.v4(8080)?).await?;
    c.api.delete(&old.spec, 30 * SECOND);
    let stopping = stop(c.kubelet()?, &old, 30 * SECOND);
    c.agent.until_draining("same").await?;
    // Removed by force, and made again, while the first one still ends.
    c.api.remove(&old.spec);
    let new = c.serve("same").await?;
    let _other = Peer::served(new.v4(8080)?).await?;
    ensure!(c.agent.pods("same").await?.len() == 2);
    c.passes_beside(&new, &old).await?;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = c.agent.drain("same").await?;
    ensure!(report.pod.uid.as_str() == old.spec.uid, "{report:?}");
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let events = c.api.events();
    let about = |event: &serde_json::Value| event["regarding"]["uid"] == old.spec.uid.as_str();
    ensure!(!events.is_empty() && events.iter().all(about), "{events:?}");
    Ok(())
}

impl Cluster {
    /// A container of `pod` is restarted while another pod of its name is held.
    async fn passes_beside(&self, pod: &Pod, held: &Pod) -> Result<()> {
        let kubelet = self.kubelet()?;
        let (result, took) = timed(kubelet.stop_container(&pod.containers[0], 30 * SECOND)).await;
        result?;
        ensure!(took < 5 * SECOND, "held for {took:?}");
        let drain = self.agent.drain(&pod.spec.name).await?;
        ensure!(
            drain.pod.uid.as_str() == held.spec.uid && drain.reason.is_none(),
            "{drain:?}"
        );
        let stops = self.stops(pod).await?;
        let why = stops.first().and_then(|s| s.evidence.as_deref());
        ensure!(why == Some("not-deleting"), "{stops:?}");
        Ok(())
    }
}

async fn completed(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--hold-unknown"]).await?;
    let pod = c.serve("job").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = c.scene.kubelet()?;
    // It has done its work, and ends by itself.
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
    // The kubelet takes the sandbox of a pod whose containers have all ended.
    let (result, took) = timed(c.kubelet()?.stop_sandbox(&pod)).await;
    result?;
    ensure!(took < 5 * SECOND, "held for {took:?}");
    // The job's time to live is over.
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
    // Its flow is never over, and would hold it for 20 s.
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.annotate(&pod.spec, "ebb.dev/until", Some("settled"));
    c.api.annotate(&pod.spec, "ebb.dev/max-hold", None);
    c.api.delete(&pod.spec, 30 * SECOND);
    c.until_deleting("annotated").await?;
    let stop = c.kubelet()?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = c.agent.drain("annotated").await?;
    ensure!(
        report.until == ebb::drain::policy::Until::Settled,
        "{report:?}"
    );
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    // That of the whole grace, not the 20 s of the sandbox.
    ensure!(report.deadline_ms > 20_000, "{report:?}");
    Ok(())
}

async fn shortened(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("shortened").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 30 * SECOND);
    let first = stop(c.kubelet()?, &pod, 30 * SECOND);
    let begun = c.agent.until_draining("shortened").await?;
    ensure!(begun.deadline_ms > 20_000, "{begun:?}");
    // The kubelet gives up its first call, and stops again with what is left of the new grace.
    c.api.delete(&pod.spec, 9 * SECOND);
    first.abort();
    let (second, took) = timed(c.kubelet()?.stop(&pod, 9 * SECOND)).await;
    ensure!(second.error().is_none(), "{second:?}");
    ensure!(took < 20 * SECOND, "held for {took:?}");
    let report = c.agent.drain("shortened").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.deadline_ms < 15_000, "{report:?}");
    Ok(())
}

async fn waits(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("short-wait").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 40 * SECOND);
    // More than its spec has.
    c.until_grace("short-wait", 40_000).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let kubelet = c.scene.kubelet()?;
    let first = dial(&kubelet, &pod.containers[0], url.clone());
    let begun = c.agent.until_draining("short-wait").await?;
    ensure!((31_000..=35_000).contains(&begun.deadline_ms), "{begun:?}");
    // The kubelet begins anew with the new grace, and with the hook.
    c.api.delete(&pod.spec, 9 * SECOND);
    c.until_grace("short-wait", 9_000).await?;
    let second = dial(&kubelet, &pod.containers[0], url);
    let (both, took) = timed(async { (first.await, second.await) }).await;
    let (first, second) = (both.0??, both.1??);
    ensure!(
        first.status == 0 && second.status == 0,
        "{first:?} {second:?}"
    );
    // Before the kubelet's patience ends: 9 s less the reserve of 3 s, with slack for a slow machine.
    ensure!(took < 9 * SECOND, "{took:?}");
    let report = c.agent.drain("short-wait").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.deadline_ms < 25_000, "{report:?}");
    Ok(())
}

async fn waits_early(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("early-wait").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.misbehave(Faults {
        delivery: Delivery::After(SECOND / 2),
        ..Faults::default()
    });
    // Its spec has 30 s.
    c.api.delete(&pod.spec, 6 * SECOND);
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let wait = dial(&c.scene.kubelet()?, &pod.containers[0], url);
    let begun = c.agent.until_draining("early-wait").await?;
    ensure!(begun.deadline_ms > 20_000, "told at once: {begun:?}");
    let (out, took) = timed(wait).await;
    ensure!(out??.status == 0);
    ensure!(took < 6 * SECOND, "{took:?}");
    let report = c.agent.drain("early-wait").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    Ok(())
}

async fn waits_late(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("late-wait").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 12 * SECOND);
    c.until_grace("late-wait", 12_000).await?;
    // The hook does something else first.
    sleep(6 * SECOND).await;
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let (out, took) = timed(dial(&c.scene.kubelet()?, &pod.containers[0], url)).await;
    ensure!(out??.status == 0);
    ensure!(took < 6 * SECOND, "{took:?}");
    let report = c.agent.drain("late-wait").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    // 6 s less the reserve of a third.
    ensure!(report.deadline_ms <= 4000, "{report:?}");
    Ok(())
}
