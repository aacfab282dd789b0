//! The watch against a stand-in for an API server: list, watch and get of pod metadata over real HTTP. It
//! stores nothing and checks nothing.

use std::{
    net::SocketAddr,
    sync::{Mutex, MutexGuard},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State as Extract},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, time::Instant};

use super::*;
use crate::{ids::SandboxId, pods::table::tests::pod};

#[derive(Default)]
struct State {
    pods: Vec<Value>,
    watchers: Vec<mpsc::UnboundedSender<Value>>,
    lists: Vec<HashMap<String, String>>,
    watches: Vec<HashMap<String, String>>,
    gets: u32,
    /// Requests are answered with 503.
    broken: bool,
}

struct StandInServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl StandInServer {
    fn start() -> Self {
        let address = "127.0.0.1:0".parse().unwrap();
        let mut it = Self {
            address,
            state: Arc::default(),
            runtime: None,
        };
        it.restart();
        it
    }

    /// A runtime of its own, so that stopping it ends every connection.
    fn restart(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let app = Router::new()
            .route("/api/v1/pods", get(list_or_watch))
            .route("/api/v1/namespaces/{namespace}/pods/{name}", get(one))
            .with_state(Arc::clone(&self.state));
        let (sender, bound) = std::sync::mpsc::channel();
        let address = self.address;
        runtime.spawn(async move {
            let listener = TcpListener::bind(address).await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            axum::serve(listener, app).await.unwrap();
        });
        self.address = bound.recv().unwrap();
        self.runtime = Some(runtime);
    }

    fn stop(&mut self) {
        self.state().watchers.clear();
        self.runtime.take().unwrap().shutdown_background();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn client(&self) -> Client {
        Client::try_from(Config::new(
            format!("http://{}", self.address).parse().unwrap(),
        ))
        .unwrap()
    }

    /// Says `kind` of `object` to every watcher.
    fn tell(&self, kind: &str, object: Value) {
        let event = json!({"type": kind, "object": object});
        self.state()
            .watchers
            .retain(|w| w.send(event.clone()).is_ok());
    }

    async fn watched(&self) {
        until(|| !self.state().watchers.is_empty()).await;
    }
}

impl Drop for StandInServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn list_or_watch(
    Extract(state): Extract<Arc<Mutex<State>>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let mut state = state.lock().unwrap();
    if state.broken {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if query.get("watch").is_none_or(|w| w != "true") {
        state.lists.push(query);
        return Json(json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": "100"}, "items": state.pods,
        }))
        .into_response();
    }
    state.watches.push(query);
    let (sender, receiver) = mpsc::unbounded_channel();
    state.watchers.push(sender);
    let lines = futures_util::stream::unfold(receiver, |mut receiver| async {
        let event: Value = receiver.recv().await?;
        Some((Ok::<_, std::io::Error>(format!("{event}\n")), receiver))
    });
    Body::from_stream(lines).into_response()
}

async fn one(
    Extract(state): Extract<Arc<Mutex<State>>>,
    Path((_, name)): Path<(String, String)>,
) -> Response {
    let mut state = state.lock().unwrap();
    state.gets += 1;
    if state.broken {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    match state
        .pods
        .iter()
        .find(|p| p["metadata"]["name"] == name.as_str())
    {
        Some(pod) => Json(pod).into_response(),
        None => {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "message": "pods not found", "reason": "NotFound", "code": 404});
            (StatusCode::NOT_FOUND, Json(status)).into_response()
        }
    }
}

fn object(uid: &str, version: &str) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": {
        "uid": uid, "namespace": "shop", "name": format!("web-{uid}"), "resourceVersion": version,
        "annotations": {"ebb.dev/until": "idle"},
        "managedFields": [{"manager": "kubelet", "operation": "Update", "apiVersion": "v1",
            "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": {"f:status": {}}}],
    }})
}

fn deleted(uid: &str, version: &str) -> Value {
    let mut object = object(uid, version);
    object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:30Z".into();
    object["metadata"]["deletionGracePeriodSeconds"] = 30.into();
    object
}

fn gone() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
        "message": "too old resource version", "reason": "Expired"})
}

fn uid(uid: &str) -> PodUid {
    PodUid::new(uid)
}

/// The pod that [`object`] is, as the runtime shows it.
fn on_node(uid: &str) -> Pod {
    let mut pod = pod(uid, &format!("web-{uid}"), &[]);
    pod.sandbox = SandboxId::new("s");
    pod.annotations.insert(CONFIG_SOURCE.into(), "api".into());
    pod
}

async fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "it did not come to pass within 20 s"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn synced(kube: &Kube) {
    kube.pods().wait_for(|p| p.synced).await.unwrap();
}

#[tokio::test]
async fn the_list_and_every_change_after_it_are_known() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1");
    synced(&kube).await;
    let known = kube.pods().borrow().pods[&uid("u1")].clone();
    assert_eq!(
        (known.namespace.as_str(), known.name.as_str()),
        ("shop", "web-u1")
    );
    assert_eq!(known.deletion, None);
    assert_eq!(known.annotations["ebb.dev/until"], "idle");

    server.watched().await;
    server.tell("ADDED", object("u2", "101"));
    server.tell("MODIFIED", deleted("u1", "102"));
    server.tell(
        "BOOKMARK",
        json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": "103"}}),
    );
    let mut pods = kube.pods();
    let grace = Some(Duration::from_secs(30));
    pods.wait_for(|p| p.pods.contains_key(&uid("u2")) && p.is_deleting(&uid("u1")))
        .await
        .unwrap();
    assert_eq!(
        pods.borrow().pods[&uid("u1")].deletion,
        Some(Deletion { grace })
    );
    server.tell("DELETED", deleted("u1", "104"));
    pods.wait_for(|p| !p.pods.contains_key(&uid("u1")))
        .await
        .unwrap();

    let state = server.state();
    assert_eq!(
        (state.lists.len(), state.watches.len(), state.gets),
        (1, 1, 0)
    );
    for query in [&state.lists[0], &state.watches[0]] {
        assert_eq!(query["fieldSelector"], "spec.nodeName=node-1");
    }
    assert_eq!(state.lists[0]["resourceVersion"], "0");
    assert_eq!(state.watches[0]["allowWatchBookmarks"], "true");
}

#[tokio::test]
async fn an_update_that_changes_nothing_kept_wakes_nobody() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1");
    synced(&kube).await;
    server.watched().await;
    let mut pods = kube.pods();
    pods.mark_unchanged();
    server.tell("MODIFIED", object("u1", "101"));
    server.tell("ADDED", object("u2", "102"));
    pods.changed().await.unwrap();
    assert!(
        pods.borrow_and_update().pods.contains_key(&uid("u2")),
        "woken by the first already"
    );
}

#[tokio::test]
async fn a_watch_too_far_behind_lists_again_and_forgets_what_has_gone() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1");
    synced(&kube).await;
    server.watched().await;
    server.state().pods = vec![deleted("u2", "200")];
    server.tell("ERROR", gone());
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u2")))
        .await
        .unwrap();
    assert!(!kube.pods().borrow().pods.contains_key(&uid("u1")));
    assert_eq!(server.state().lists.len(), 2);
}

#[tokio::test]
async fn what_was_known_outlives_the_server_and_is_caught_up_when_it_is_back() {
    let mut server = StandInServer::start();
    server.state().pods = vec![object("u1", "90"), deleted("u2", "91")];
    let kube = Kube::watch(server.client(), "node-1");
    synced(&kube).await;
    server.watched().await;
    server.stop();
    let wait = Duration::from_millis(50);
    assert_eq!(kube.is_deleting(&on_node("u1"), wait).await, None);
    assert_eq!(kube.is_deleting(&on_node("u2"), wait).await, Some(true));
    assert!(kube.pods().borrow().synced);

    server.restart();
    server.watched().await;
    server.tell("MODIFIED", deleted("u1", "300"));
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u1")))
        .await
        .unwrap();
    assert_eq!(
        server.state().lists.len(),
        1,
        "the watch goes on from where it was"
    );
}

#[tokio::test]
async fn a_watch_a_little_late_is_waited_for() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1");
    synced(&kube).await;
    server.watched().await;
    let pod = on_node("u1");
    let (answer, ()) = tokio::join!(kube.is_deleting(&pod, LONGEST_WAIT), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        server.tell("MODIFIED", deleted("u1", "101"));
    });
    assert_eq!(answer, Some(true));
    assert_eq!(server.state().gets, 0);
}

#[tokio::test]
async fn a_silent_watch_is_followed_by_one_question() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1");
    synced(&kube).await;
    let ask = async |pod: &Pod| kube.is_deleting(pod, Duration::from_millis(20)).await;
    assert_eq!(ask(&on_node("u1")).await, Some(false));
    assert_eq!(server.state().gets, 1);

    // The watch has not said so yet.
    server.state().pods = vec![deleted("u1", "101")];
    assert_eq!(ask(&on_node("u1")).await, Some(true));
    // Re-created under its name, and gone altogether.
    let mut recreated = object("u9", "102");
    recreated["metadata"]["name"] = "web-u1".into();
    server.state().pods = vec![recreated];
    assert_eq!(ask(&on_node("u1")).await, Some(true));
    server.state().pods.clear();
    assert_eq!(ask(&on_node("u1")).await, Some(true));
    server.state().broken = true;
    assert_eq!(ask(&on_node("u1")).await, None);
}

#[tokio::test]
async fn a_static_pods_end_is_not_the_api_servers_to_tell() {
    let server = StandInServer::start();
    let mut mirror = deleted("api-uid", "90");
    mirror["metadata"]["annotations"][CONFIG_MIRROR] = "node-uid".into();
    server.state().pods = vec![mirror];
    let kube = Kube::watch(server.client(), "node-1");
    synced(&kube).await;
    assert_eq!(kube.pods().borrow().pods[&uid("node-uid")].deletion, None);
    let mut pod = on_node("node-uid");
    pod.annotations.insert(CONFIG_SOURCE.into(), "file".into());
    assert_eq!(
        kube.is_deleting(&pod, Duration::from_millis(10)).await,
        None
    );
    assert_eq!(server.state().gets, 0);
}

#[tokio::test]
async fn without_an_api_server_nothing_is_known() {
    let kube = Kube::start(KubeMode::Off, None).await.unwrap();
    assert_eq!(kube.is_deleting(&on_node("u1"), LONGEST_WAIT).await, None);
    assert!(!kube.pods().borrow().synced);
}
