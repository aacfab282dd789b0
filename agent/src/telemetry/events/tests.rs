//! Writes Events over HTTP to a stand-in for an API server.

use std::sync::{Arc, Mutex};

use axum::{Json, Router, extract::State, http::Method, http::Uri};
use ebb_core::ids::{PodName, PodUid};
use futures_util::FutureExt as _;
use kube::Config;
use serde_json::Value;
use tokio::net::TcpListener;

use super::*;
use crate::telemetry::metrics::{NodeMetrics, exposition::Exposition};
use crate::telemetry::pod_event::EventReason;

type Written = Arc<Mutex<Vec<(Method, String, Value)>>>;

/// A server that records and accepts all writes.
async fn server() -> (Client, Written) {
    let written = Written::default();
    let app = Router::new()
        .fallback(
            async |State(written): State<Written>, method: Method, uri: Uri, body: String| {
                let body: Value = serde_json::from_str(&body).unwrap();
                let path = uri.path().to_owned();
                written.lock().unwrap().push((method, path, body.clone()));
                Json(body)
            },
        )
        .with_state(written.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    (client(&address.to_string()), written)
}

fn client(address: &str) -> Client {
    Client::try_from(Config::new(format!("http://{address}").parse().unwrap())).unwrap()
}

fn event(note: &str) -> PodEvent {
    PodEvent {
        pod: PodName {
            uid: PodUid::new("u1"),
            namespace: "shop".into(),
            name: "web".into(),
        },
        reason: EventReason::DrainDeadline,
        warning: true,
        note: note.into(),
    }
}

async fn until(written: &Written, n: usize) -> Vec<(Method, String, Value)> {
    for _ in 0..2000 {
        let so_far = written.lock().unwrap().clone();
        if so_far.len() >= n {
            return so_far;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{n} Events were not written within 10 s");
}

/// How many Events were dropped, by the metrics.
fn dropped(metrics: &Metrics, why: DropReason) -> usize {
    let text = metrics
        .render(NodeMetrics::default(), Exposition::OpenMetrics)
        .unwrap();
    let name = format!("ebb_events_dropped_total{{reason=\"{}\"}} ", why.name());
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.map_or(0, |n| n.parse().unwrap())
}

#[tokio::test]
async fn an_event_is_about_its_pod_and_a_repeated_one_raises_the_count() {
    let (client, written) = server().await;
    let events = EventWriter::start(client, "node-1", Arc::default());
    events.send(event("2 cut"));
    events.send(event("2 cut"));
    let all = until(&written, 2).await;
    let (method, path, first) = &all[0];
    assert_eq!(
        (method.as_str(), path.as_str()),
        ("POST", "/apis/events.k8s.io/v1/namespaces/shop/events")
    );
    assert_eq!(first["regarding"]["kind"], "Pod");
    assert_eq!(first["regarding"]["name"], "web");
    assert_eq!(first["regarding"]["uid"], "u1");
    assert_eq!(first["reason"], "DrainDeadline");
    assert_eq!(first["type"], "Warning");
    assert_eq!(first["note"], "2 cut");
    assert_eq!(first["reportingInstance"], "node-1");
    let (method, _, second) = &all[1];
    assert_eq!(method.as_str(), "PATCH");
    assert_eq!(second["series"]["count"], 2);
    assert_eq!(second["metadata"]["name"], first["metadata"]["name"]);
}

#[tokio::test]
async fn another_note_with_the_same_reason_is_another_event() {
    let (client, written) = server().await;
    let events = EventWriter::start(client, "node-1", Arc::default());
    for note in ["2 cut", "3 cut", "2 cut"] {
        events.send(event(note));
    }
    let all = until(&written, 3).await;
    let writes = all.iter().map(|(method, _, event)| {
        let note = event["note"].as_str().unwrap();
        (method.as_str(), note, &event["series"]["count"])
    });
    let none = &Value::Null;
    let expected = [
        ("POST", "2 cut", none),
        ("POST", "3 cut", none),
        ("PATCH", "2 cut", &Value::from(2)),
    ];
    assert_eq!(writes.collect::<Vec<_>>(), expected);
    assert_eq!(all[2].2["metadata"]["name"], all[0].2["metadata"]["name"]);
}

#[tokio::test]
async fn no_more_are_written_than_the_budget_allows() {
    let (client, written) = server().await;
    let metrics = Arc::<Metrics>::default();
    let events = EventWriter::start(client, "node-1", Arc::clone(&metrics));
    for n in 0..QUEUE {
        let mut event = event("x");
        event.pod.uid = PodUid::new(format!("u{n}"));
        events.send(event);
    }
    assert!(events.flush(Duration::from_secs(60)).await);
    // Some tokens may have been added meanwhile.
    let n = written.lock().unwrap().len();
    let most = Budget::of_node(Instant::now()).most as usize;
    assert!(n < most + 50, "{n} were written");
    assert_eq!(dropped(&metrics, DropReason::Budget), QUEUE - n);
}

#[tokio::test]
async fn sending_does_not_wait_for_an_api_server_that_is_away() {
    let unserved = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = unserved.local_addr().unwrap().to_string();
    drop(unserved);
    let metrics = Arc::<Metrics>::default();
    let events = EventWriter::start(client(&address), "node-1", Arc::clone(&metrics));
    for _ in 0..10 * QUEUE {
        events.send(event("x"));
    }
    // The test has not yielded, so the writer could not take anything from the queue.
    assert_eq!(dropped(&metrics, DropReason::Queue), 9 * QUEUE);
    EventWriter::off().send(event("x"));
    assert!(EventWriter::off().flush(Duration::ZERO).await);
}

#[tokio::test]
async fn events_that_the_api_server_refuses_are_counted() {
    let app = Router::new().fallback(async || axum::http::StatusCode::FORBIDDEN);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let metrics = Arc::<Metrics>::default();
    let events = EventWriter::start(client(&address), "node-1", Arc::clone(&metrics));
    events.send(event("x"));
    events.send(event("y"));
    assert!(events.flush(Duration::from_secs(60)).await);
    assert_eq!(dropped(&metrics, DropReason::Failed), 2);
}

#[tokio::test]
async fn flush_waits_for_the_events_under_way_up_to_its_limit() {
    let (client, written) = server().await;
    let events = EventWriter::start(client, "node-1", Arc::default());
    for n in 0..10 {
        events.send(event(&n.to_string()));
    }
    assert!(events.flush(Duration::from_secs(60)).await);
    assert_eq!(written.lock().unwrap().len(), 10);
    // It accepts connections and does not answer.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let events = EventWriter::start(self::client(&address), "node-1", Arc::default());
    events.send(event("x"));
    assert!(!events.flush(Duration::from_millis(50)).await);
}

#[tokio::test]
async fn the_end_of_the_writer_is_noticed() {
    assert!(EventWriter::off().ended().now_or_never().is_none());
    let (queue, messages) = mpsc::channel(1);
    let ended = EventWriter(Some((queue, Arc::default()))).ended();
    let mut ended = Box::pin(ended);
    assert!(ended.as_mut().now_or_never().is_none());
    drop(messages);
    ended.await;
}

#[test]
fn a_note_is_cut_at_the_apis_limit() {
    let event = to_event(&event(&"ü".repeat(1000)));
    let note = event.note.unwrap();
    assert!(
        note.len() <= LONGEST_NOTE && note.ends_with("ü…"),
        "{}",
        note.len()
    );
}

#[test]
fn a_budget_fills_up_again_but_never_beyond_its_most() {
    let start = Instant::now();
    let mut budget = Budget::of_node(start);
    let taken = |budget: &mut Budget, at| (0..1000).filter(|_| budget.take(at)).count();
    assert_eq!(taken(&mut budget, start), 100);
    assert_eq!(taken(&mut budget, start + Duration::from_millis(1999)), 0);
    assert_eq!(taken(&mut budget, start + Duration::from_secs(7)), 3);
    assert_eq!(taken(&mut budget, start + Duration::from_secs(8)), 1);
    assert_eq!(taken(&mut budget, start + Duration::from_secs(9999)), 100);
}

#[test]
fn a_pod_with_many_events_does_not_use_up_the_nodes_budget() {
    let start = Instant::now();
    let mut budgets = Budgets::full(start);
    let (chatty, quiet) = (PodUid::new("u1"), PodUid::new("u2"));
    let taken = |budgets: &mut Budgets, pod: &PodUid, at| {
        (0..1000).filter(|_| budgets.take(pod, at)).count()
    };
    assert_eq!(taken(&mut budgets, &chatty, start), 10);
    assert_eq!(taken(&mut budgets, &quiet, start), 10);
    assert_eq!(
        budgets.node.left, 80,
        "an event over the pod's budget takes nothing from the node's"
    );
    let later = start + Duration::from_secs(150);
    assert_eq!(taken(&mut budgets, &chatty, later), 2);
}

#[test]
fn no_more_pods_are_remembered_than_the_node_may_write_events() {
    let start = Instant::now();
    let mut budgets = Budgets::full(start);
    for n in 0..10_000 {
        budgets.take(&PodUid::new(format!("u{n}")), start);
    }
    assert_eq!(budgets.pods.len(), 100);
    // All budgets are full again.
    let later = start + Duration::from_secs(60);
    assert!(budgets.take(&PodUid::new("u1"), later));
    assert_eq!(budgets.pods.len(), 1);
}
