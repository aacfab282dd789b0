//! The Events on a pod, as an API server (a stand-in) has them.

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use ebb_testkit::{
    api_server::{AnswerMode, ApiVerb, Faults},
    kubelet::PodSpec,
};
use libtest_mimic::Trial;
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    agent::NODE_NAME,
    hold::stop,
    kube::Cluster,
    peer::Peer,
    scene::{NODE_V4, SECOND, Scene, eventually, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_deleted_pod_of_one_container_is_held_and_its_events_match_the_log",
            held,
        ),
        trial(
            "at_the_deadline_an_event_names_the_flow_that_was_cut",
            deadline,
        ),
        trial("an_event_names_a_peer_that_still_connects", blocked),
        trial("a_bad_annotation_causes_one_event_before_any_stop", invalid),
        trial(
            "a_rule_about_ports_that_matches_no_listener_causes_an_event_and_all_ports_hold",
            ports,
        ),
        trial(
            "events_that_are_forbidden_or_never_answered_delay_no_pod",
            harmless,
        ),
    ]
}

impl Cluster {
    /// Waits until there are `n` Events of a reason. Requires that there are no more.
    async fn events(&self, reason: &str, n: usize) -> Result<Vec<Value>> {
        let what = format!("{n} Events {reason}");
        let found = eventually(&what, async || {
            let mut events = self.api.events();
            events.retain(|e| e["reason"] == reason);
            Ok((events.len() >= n).then_some(events))
        });
        let events = found.await?;
        ensure!(events.len() == n, "{events:?}");
        Ok(events)
    }

    /// Waits for the only Event of a reason, which must be about this pod and be in the log too.
    async fn event(&self, reason: &str, pod: &PodSpec) -> Result<WrittenEvent> {
        let event = self.events(reason, 1).await?.remove(0);
        self.is_event_of(&event, pod)
    }

    fn is_event_of(&self, event: &Value, pod: &PodSpec) -> Result<WrittenEvent> {
        let about = &event["regarding"];
        for (field, value) in [
            ("apiVersion", "v1"),
            ("kind", "Pod"),
            ("namespace", &pod.namespace),
            ("name", &pod.name),
            ("uid", &pod.uid),
        ] {
            ensure!(about[field] == value, "{field}: {event}");
        }
        ensure!(event["reportingController"] == "ebb.dev/agent", "{event}");
        ensure!(event["reportingInstance"] == NODE_NAME, "{event}");
        let text = |field: &str| event[field].as_str().map(str::to_owned);
        let note = text("note").context("no note")?;
        let line = format!("{}: {note}", text("reason").unwrap_or_default());
        let log = std::fs::read_to_string(self.agent.log())?;
        ensure!(log.contains(&line), "{line:?} is not in the log");
        Ok(WrittenEvent {
            note,
            warning: event["type"] == "Warning",
        })
    }
}

struct WrittenEvent {
    note: String,
    warning: bool,
}

async fn held(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let mut spec = PodSpec::new("event-drained").container(server("app", 8080));
    spec.namespace = "shop".into();
    let pod = c.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.delete(&pod.spec, 30 * SECOND);
    c.until_deleting("event-drained").await?;
    let stopping = stop(c.kubelet()?, &pod, 30 * SECOND);
    c.agent.until_draining("event-drained").await?;
    let started = c.event("DrainStarted", &pod.spec).await?;
    ensure!(!started.warning, "{}", started.note);
    ensure!(
        started.note.starts_with("waiting until zero, 2"),
        "{}",
        started.note
    );
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with a flow open");
    ensure!(
        c.api.count(ApiVerb::CreateEvent) == 1,
        "{:?}",
        c.api.requests()
    );
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let drained = c.event("Drained", &pod.spec).await?;
    ensure!(!drained.warning, "{}", drained.note);
    ensure!(drained.note.ends_with("1 ended"), "{}", drained.note);
    let report = c.agent.drain("event-drained").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    // The watch showed the deletion, so the agent sent no GET; and it wrote no other Event.
    ensure!(c.api.count(ApiVerb::Get) == 0, "{:?}", c.api.requests());
    ensure!(c.api.events().len() == 2, "{:?}", c.api.events());
    ensure!(c.api.count(ApiVerb::Other) == 0, "{:?}", c.api.requests());
    Ok(())
}

async fn deadline(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("event-cut").await?;
    let peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 6 * SECOND);
    c.until_deleting("event-cut").await?;
    let stop = c.kubelet()?.stop(&pod, 6 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let event = c.event("DrainDeadline", &pod.spec).await?;
    let of_node = format!("1 cut: {} (node)", peer.address);
    let named = ["active", "awaiting"].map(|state| format!("{of_node} {state} "));
    ensure!(
        event.warning && named.iter().any(|named| event.note.starts_with(named)),
        "{}",
        event.note
    );
    Ok(())
}

async fn blocked(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--settle-max", "2s"]).await?;
    let pod = c.serve("event-late-peer").await?;
    let server = pod.v4(8080)?;
    let clients = tokio::spawn(async move {
        while Peer::served(server).await.is_ok() {
            sleep(SECOND / 10).await;
        }
    });
    c.api.delete(&pod.spec, 30 * SECOND);
    c.until_deleting("event-late-peer").await?;
    let stop = c.kubelet()?.stop(&pod, 30 * SECOND).await;
    clients.abort();
    ensure!(stop.error().is_none(), "{stop:?}");
    let event = c.event("DrainBlocked", &pod.spec).await?;
    let named = format!("from {NODE_V4} (");
    ensure!(
        event.warning && event.note.contains(&named),
        "{}",
        event.note
    );
    Ok(())
}

async fn invalid(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let spec = PodSpec::new("event-typo")
        .annotation("ebb.dev/quiet", "soon")
        .annotation("ebb.dev/untill", "idle")
        .annotation("example.com/quiet", "soon")
        .container(server("app", 8080));
    let pod = c.run(spec).await?;
    let notes = async || {
        let mut notes = Vec::new();
        for event in c.events("PolicyInvalid", 2).await? {
            let written = c.is_event_of(&event, &pod.spec)?;
            ensure!(written.warning, "{event}");
            notes.push(written.note);
        }
        notes.sort();
        anyhow::Ok(notes)
    };
    let first = notes().await?;
    ensure!(
        first[0].starts_with("annotation ebb.dev/quiet: ") && first[0].contains("\"soon\""),
        "{first:?}"
    );
    ensure!(
        first[1].starts_with("annotation ebb.dev/untill: ") && first[1].contains("ebb.dev/until"),
        "{first:?}"
    );
    // Every update of the pod, a new watch and a new list show the bad annotations again.
    c.api.set_phase(&pod.spec, "Pending");
    c.api.annotate(&pod.spec, "example.com/quiet", None);
    c.api.end_watches();
    c.api.forget();
    eventually("the agent has listed again", async || {
        let listed = c.api.count(ApiVerb::List) == 2 && c.api.watching() > 0;
        Ok(listed.then_some(()))
    })
    .await?;
    // Events are written in order: if another pod's is there, none of the above has caused one.
    let other = PodSpec::new("event-other").annotation("ebb.dev/port", "80");
    c.api.create(&other, NODE_NAME);
    let all = c.events("PolicyInvalid", 3).await?;
    ensure!(
        c.api.count(ApiVerb::CreateEvent) == 3,
        "{:?}",
        c.api.requests()
    );
    ensure!(
        c.api.count(ApiVerb::PatchEvent) == 0,
        "{:?}",
        c.api.requests()
    );
    let of_other = c.is_event_of(&all[2], &other)?;
    ensure!(of_other.note.contains("ebb.dev/ports"), "{}", of_other.note);

    // The pod is held as usual, and its drain adds no Event about the same annotations.
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.delete(&pod.spec, 30 * SECOND);
    c.is_held(&pod, peer, "deleting").await?;
    c.events("Drained", 1).await?;
    c.events("PolicyInvalid", 3).await?;
    Ok(())
}

async fn ports(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let spec = PodSpec::new("event-ports")
        .annotation("ebb.dev/ports", "80,8443")
        .container(server("app", 8080));
    let pod = c.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let warns = |warnings: &[String]| {
        let one = |w: &&String| w.contains("80,8443") && w.contains("8080");
        warnings.iter().filter(one).count() == 1
    };
    let view = c.agent.pod("event-ports").await?;
    ensure!(warns(&view.warnings), "{view:?}");
    ensure!(view.flows.is_some_and(|f| f.total() == 1), "{view:?}");
    let explained = c.agent.explain("event-ports").await?;
    let now = explained.now.context("no policy")?;
    ensure!(warns(&now.warnings), "{now:?}");
    c.api.delete(&pod.spec, 30 * SECOND);
    c.is_held(&pod, peer, "deleting").await?;
    let event = c.event("PolicyInvalid", &pod.spec).await?;
    ensure!(
        event.warning && warns(std::slice::from_ref(&event.note)),
        "{}",
        event.note
    );
    let report = c.agent.drain("event-ports").await?;
    ensure!(warns(&report.warnings), "{report:?}");
    Ok(())
}

async fn harmless(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    for (name, events) in [
        ("event-forbidden", AnswerMode::Status(403)),
        ("event-forbidden-2", AnswerMode::Status(403)),
        ("event-unanswered", AnswerMode::Never),
    ] {
        c.api.misbehave(Faults {
            events,
            ..Faults::default()
        });
        let pod = c.serve(name).await?;
        let peer = Peer::served(pod.v4(8080)?).await?;
        c.api.delete(&pod.spec, 30 * SECOND);
        c.is_held(&pod, peer, "deleting").await?;
        c.api.remove(&pod.spec);
    }
    // The log says once what is wrong and how to fix it.
    let log = std::fs::read_to_string(c.agent.log())?;
    let warnings = log.matches("can't write Events").count();
    ensure!(
        warnings == 1 && log.contains("create and patch of events"),
        "{log}"
    );
    // Once the API server accepts Events, the agent writes them again.
    c.api.misbehave(Faults::default());
    let typo = PodSpec::new("event-accepted").annotation("ebb.dev/quiet", "soon");
    c.api.create(&typo, NODE_NAME);
    c.event("PolicyInvalid", &typo).await?;
    Ok(())
}
