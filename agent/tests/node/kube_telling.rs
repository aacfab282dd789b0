//! The Events on a pod, as an API server (a stand-in) has them.

use anyhow::{Context as _, Result, ensure};
use ebb::drain::report::ReleaseReason;
use ebb_node::{
    api_server::{Answer, Faults, Verb},
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
            "a_deleted_pod_of_one_container_is_held_and_told_of_in_the_words_of_the_log",
            held,
        ),
        trial(
            "at_the_deadline_an_event_names_the_flow_that_was_cut",
            deadline,
        ),
        trial("who_still_connects_is_named_in_an_event", blocked),
        trial(
            "a_bad_annotation_is_an_event_before_any_stop_and_only_one",
            invalid,
        ),
        trial(
            "events_that_are_forbidden_or_never_answered_hold_nobody_up",
            harmless,
        ),
    ]
}

impl Cluster {
    /// Waits until there are so many Events of a reason.
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

    /// Waits for the one Event of a reason, which must be about this pod and stand in the log, too.
    async fn event(&self, reason: &str, pod: &PodSpec) -> Result<Event> {
        let event = self.events(reason, 1).await?.remove(0);
        self.is_event_of(&event, pod)
    }

    fn is_event_of(&self, event: &Value, pod: &PodSpec) -> Result<Event> {
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
        Ok(Event {
            note,
            warning: event["type"] == "Warning",
        })
    }
}

struct Event {
    note: String,
    warning: bool,
}

async fn held(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let mut spec = PodSpec::new("told").container(server("app", 8080));
    spec.namespace = "shop".into();
    let pod = c.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.delete(&pod.spec, 30 * SECOND);
    c.until_deleting("told").await?;
    let stopping = stop(c.kubelet()?, &pod, 30 * SECOND);
    c.agent.until_draining("told").await?;
    let started = c.event("DrainStarted", &pod.spec).await?;
    ensure!(!started.warning, "{}", started.note);
    ensure!(
        started.note.starts_with("waiting until zero, 2"),
        "{}",
        started.note
    );
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with a flow open");
    ensure!(c.api.count(Verb::CreateEvent) == 1, "{:?}", c.api.asked());
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let drained = c.event("Drained", &pod.spec).await?;
    ensure!(!drained.warning, "{}", drained.note);
    ensure!(drained.note.ends_with("1 ended"), "{}", drained.note);
    let report = c.agent.drain("told").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    // The watch knew, so nobody had to ask; and there was nothing else to tell.
    ensure!(c.api.count(Verb::Get) == 0, "{:?}", c.api.asked());
    ensure!(c.api.events().len() == 2, "{:?}", c.api.events());
    ensure!(c.api.count(Verb::Other) == 0, "{:?}", c.api.asked());
    Ok(())
}

async fn deadline(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("told-cut").await?;
    let peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 6 * SECOND);
    c.until_deleting("told-cut").await?;
    let stop = c.kubelet()?.stop(&pod, 6 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let told = c.event("DrainDeadline", &pod.spec).await?;
    let named = ["active", "awaiting"].map(|state| format!("1 cut: {} {state} ", peer.address));
    ensure!(
        told.warning && named.iter().any(|named| told.note.starts_with(named)),
        "{}",
        told.note
    );
    Ok(())
}

async fn blocked(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--settle-max", "2s"]).await?;
    let pod = c.serve("told-stale").await?;
    let server = pod.v4(8080)?;
    let clients = tokio::spawn(async move {
        while Peer::served(server).await.is_ok() {
            sleep(SECOND / 10).await;
        }
    });
    c.api.delete(&pod.spec, 30 * SECOND);
    c.until_deleting("told-stale").await?;
    let stop = c.kubelet()?.stop(&pod, 30 * SECOND).await;
    clients.abort();
    ensure!(stop.error().is_none(), "{stop:?}");
    let told = c.event("DrainBlocked", &pod.spec).await?;
    let named = format!("from {NODE_V4} (");
    ensure!(told.warning && told.note.contains(&named), "{}", told.note);
    Ok(())
}

async fn invalid(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let spec = PodSpec::new("told-typo")
        .annotation("ebb.dev/quiet", "soon")
        .annotation("ebb.dev/untill", "idle")
        .annotation("example.com/quiet", "soon")
        .container(server("app", 8080));
    let pod = c.run(spec).await?;
    let notes = async || {
        let mut notes = Vec::new();
        for event in c.events("PolicyInvalid", 2).await? {
            let told = c.is_event_of(&event, &pod.spec)?;
            ensure!(told.warning, "{event}");
            notes.push(told.note);
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
    // Said again by every update of the pod, by a new watch and by a new list.
    c.api.set_phase(&pod.spec, "Pending");
    c.api.annotate(&pod.spec, "example.com/quiet", None);
    c.api.end_watches();
    c.api.forget();
    eventually("the agent has listed again", async || {
        let listed = c.api.count(Verb::List) == 2 && c.api.watching() > 0;
        Ok(listed.then_some(()))
    })
    .await?;
    // A fault of another one is told after all that came before.
    let other = PodSpec::new("told-other").annotation("ebb.dev/port", "80");
    c.api.create(&other, NODE_NAME);
    let all = c.events("PolicyInvalid", 3).await?;
    ensure!(c.api.count(Verb::CreateEvent) == 3, "{:?}", c.api.asked());
    ensure!(c.api.count(Verb::PatchEvent) == 0, "{:?}", c.api.asked());
    let of_other = c.is_event_of(&all[2], &other)?;
    ensure!(of_other.note.contains("ebb.dev/ports"), "{}", of_other.note);

    // And nothing of it stands in the way of the pod's end, where it is the same Event once more.
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.delete(&pod.spec, 30 * SECOND);
    c.is_held(&pod, peer, "deleting").await?;
    c.events("Drained", 1).await?;
    c.events("PolicyInvalid", 3).await?;
    Ok(())
}

async fn harmless(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    for (name, events) in [
        ("told-nobody", Answer::Status(403)),
        ("told-nobody-2", Answer::Status(403)),
        ("told-never", Answer::Never),
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
    // What is in the way is said, once, and how to mend it.
    let log = std::fs::read_to_string(c.agent.log())?;
    let said = log.matches("can't write Events").count();
    ensure!(
        said == 1 && log.contains("create and patch of events"),
        "{log}"
    );
    // As soon as somebody listens, there are Events again.
    c.api.misbehave(Faults::default());
    let typo = PodSpec::new("told-again").annotation("ebb.dev/quiet", "soon");
    c.api.create(&typo, NODE_NAME);
    c.event("PolicyInvalid", &typo).await?;
    Ok(())
}
