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
use ebb_node::api_server::{Answer, ApiServer, Faults, Verb};
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
    /// A second of the API lasts so long here: watches end when the client's `timeoutSeconds` are over.
    second: Option<Duration>,
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
        Client::try_from(self.config()).unwrap()
    }

    fn config(&self) -> Config {
        let url = format!("http://{}", self.address);
        impatient(Config::new(url.parse().unwrap()))
    }

    /// Says `kind` of `object` to every watcher.
    fn tell(&self, kind: &str, object: Value) {
        self.send(json!({"type": kind, "object": object}));
    }

    /// Sends this to every watcher.
    fn send(&self, event: Value) {
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
    let lists = query.get("watch").is_none_or(|w| w != "true");
    if lists {
        state.lists.push(query.clone());
    }
    if state.broken {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if lists {
        return Json(json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": "100"}, "items": state.pods,
        }))
        .into_response();
    }
    let lasts = match (state.second, query["timeoutSeconds"].parse::<u32>()) {
        (Some(second), Ok(seconds)) => second * seconds,
        _ => Duration::from_secs(3600),
    };
    state.watches.push(query);
    let (sender, receiver) = mpsc::unbounded_channel();
    state.watchers.push(sender);
    let lines = futures_util::stream::unfold(receiver, |mut receiver| async {
        let event: Value = receiver.recv().await?;
        // A text is sent as it is: half a line, say. Nothing breaks the connection.
        let line = match event {
            Value::String(text) => Ok(text),
            Value::Null => Err(std::io::Error::other("reset")),
            event => Ok(format!("{event}\n")),
        };
        Some((line, receiver))
    })
    .take_until(tokio::time::sleep(lasts));
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
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
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
    pods.wait_for(|p| p.pods.contains_key(&uid("u2")) && p.is_deleting(&uid("u1")))
        .await
        .unwrap();
    let deletion = pods.borrow().pods[&uid("u1")].deletion.unwrap();
    assert_eq!(deletion.grace, Some(Duration::from_secs(30)));
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
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
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
async fn while_the_runtime_tells_an_update_that_changes_nothing_kept_is_no_reason_to_look() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let changes = Arc::<Changes>::default();
    let _runtime = changes.source(Teller::Runtime);
    let kube = Kube::watch(server.client(), "node-1", &changes);
    synced(&kube).await;
    server.watched().await;
    let heard = async |limit| timeout(limit, changes.heard()).await.is_ok();
    assert!(heard(Duration::from_secs(10)).await, "the first list");
    let mut annotated = object("u1", "103");
    annotated["metadata"]["annotations"]["ebb.dev/until"] = "closed".into();
    for (kind, object, counts) in [
        ("MODIFIED", object("u1", "101"), false),
        ("ADDED", object("u2", "102"), true),
        ("MODIFIED", annotated, true),
        ("MODIFIED", deleted("u2", "104"), true),
        ("MODIFIED", deleted("u2", "105"), false),
        ("DELETED", deleted("u2", "106"), true),
    ] {
        let what = format!("{kind} {object}");
        server.tell(kind, object);
        let limit = Duration::from_secs(if counts { 10 } else { 1 });
        assert_eq!(heard(limit).await, counts, "{what}");
    }
}

#[tokio::test]
async fn a_watch_too_far_behind_lists_again_and_forgets_what_has_gone() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
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
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
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
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
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
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
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
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
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
    let kube = Kube::start(KubeMode::Off, None, &Arc::default())
        .await
        .unwrap();
    assert_eq!(kube.is_deleting(&on_node("u1"), LONGEST_WAIT).await, None);
    assert!(!kube.pods().borrow().synced);
}

#[tokio::test]
async fn a_deletion_is_not_taken_back_by_old_news() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    let mut shorter = deleted("u1", "102");
    shorter["metadata"]["deletionGracePeriodSeconds"] = 5.into();
    for news in [
        deleted("u1", "101"),
        deleted("u1", "101"),
        shorter,
        // Out of order: what was so before the deletion, and before its grace was cut.
        object("u1", "90"),
        deleted("u1", "101"),
    ] {
        server.tell("MODIFIED", news);
    }
    server.tell("ADDED", object("u2", "103"));
    let mut pods = kube.pods();
    pods.wait_for(|p| p.pods.contains_key(&uid("u2")))
        .await
        .unwrap();
    let known = |pods: &KubePods| pods.pods[&uid("u1")].deletion.unwrap();
    let before = known(&pods.borrow());
    assert_eq!(before.grace, Some(Duration::from_secs(5)));

    // A list from a cache that is behind.
    server.state().pods = vec![object("u1", "90"), object("u3", "91")];
    server.tell("ERROR", gone());
    pods.wait_for(|p| p.pods.contains_key(&uid("u3")))
        .await
        .unwrap();
    assert_eq!(known(&pods.borrow()), before);
}

#[tokio::test]
async fn a_grace_that_was_running_when_the_agent_started_is_not_begun_anew() {
    let server = StandInServer::start();
    let ends = SystemTime::now() + Duration::from_secs(20);
    let mut half_over = deleted("u1", "90");
    let ends = humantime::format_rfc3339_seconds(ends).to_string();
    half_over["metadata"]["deletionTimestamp"] = ends.into();
    // By a server whose clock is ahead.
    let mut ahead = deleted("u2", "91");
    ahead["metadata"]["deletionTimestamp"] = "2999-01-01T00:00:00Z".into();
    server.state().pods = vec![half_over, ahead];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    let pods = kube.pods().borrow().clone();
    let left = |name| {
        let deletion = pods.pods[&uid(name)].deletion.unwrap();
        deletion.left(BootTime::now()).unwrap().as_secs()
    };
    assert!((15..=20).contains(&left("u1")), "{} s", left("u1"));
    assert!((25..=30).contains(&left("u2")), "{} s", left("u2"));
    // A deletion that is told is heard of as it happens, whatever clocks say.
    server.watched().await;
    server.tell("MODIFIED", deleted("u3", "101"));
    let mut told = kube.pods();
    told.wait_for(|p| p.is_deleting(&uid("u3"))).await.unwrap();
    let deletion = told.borrow().pods[&uid("u3")].deletion.unwrap();
    let left = deletion.left(BootTime::now()).unwrap().as_secs();
    assert!((25..=30).contains(&left), "{left} s");
}

#[test]
fn a_grace_runs_from_when_it_was_first_heard_of() {
    let at = |s: u64| BootTime::from_nanos(s * 1_000_000_000);
    let secs = Duration::from_secs;
    let deletion = |grace, seen| Deletion {
        grace: Some(secs(grace)),
        seen: at(seen),
    };
    assert_eq!(deletion(30, 100).left(at(110)), Some(secs(20)));
    assert_eq!(deletion(30, 100).left(at(200)), Some(secs(0)));
    let unknown = Deletion {
        grace: None,
        seen: at(100),
    };
    assert_eq!(unknown.left(at(110)), None);

    let pod = |deletion| {
        let meta = serde_json::from_value(object("u1", "1")).unwrap();
        KubePod {
            deletion,
            ..reduce(meta).unwrap()
        }
    };
    let known = |deletion| KubePods {
        synced: true,
        pods: HashMap::from([(uid("u1"), pod(Some(deletion)))]),
    };
    let (first, shorter) = (deletion(30, 100), deletion(9, 110));
    for (known_before, news, holds) in [
        (first, None, first),
        // The same again does not begin anew.
        (first, Some(deletion(30, 110)), first),
        (first, Some(shorter), shorter),
        (shorter, Some(deletion(30, 120)), shorter),
        (unknown, Some(first), first),
        (first, Some(unknown), first),
    ] {
        let mut news = pod(news);
        known(known_before).still_deleting(&mut news);
        assert_eq!(news.deletion, Some(holds));
    }
}

#[tokio::test]
async fn a_watch_that_breaks_in_the_middle_of_an_event_goes_on() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    let half = format!(r#"{{"type":"MODIFIED","object":{}"#, deleted("u1", "101"));
    server.send(half[..100].into());
    server.send(Value::Null);
    server.state().watchers.clear();
    server.watched().await;
    server.tell("MODIFIED", deleted("u1", "101"));
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u1")))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_watch_that_has_gone_silent_is_begun_anew() {
    let server = StandInServer::start();
    server.state().pods = vec![object("u1", "90")];
    let mut config = server.config();
    // kube-rs waits 295 s, which is longer than a watch lasts.
    config.read_timeout = Some(Duration::from_millis(300));
    let kube = Kube::watch(Client::try_from(config).unwrap(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    // The first connection stays as it is, and nothing ever comes through it.
    until(|| server.state().watches.len() >= 2).await;
    server.tell("MODIFIED", deleted("u1", "101"));
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u1")))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_list_that_is_never_answered_is_asked_for_again() {
    let address = "127.0.0.1:0".parse().unwrap();
    let server = ApiServer::start(address).await.unwrap();
    server.misbehave(Faults {
        lists: Answer::Never,
        ..Faults::default()
    });
    let url = format!("http://{}", server.address());
    let mut config = impatient(Config::new(url.parse().unwrap()));
    assert_eq!(config.read_timeout, Some(SILENT_FOR));
    // In place of minutes.
    config.read_timeout = Some(Duration::from_millis(300));
    let client = Client::try_from(config).unwrap();
    let kube = Kube::watch(client, "node-1", &Arc::default());
    until(|| server.count(Verb::List) >= 2).await;
    server.misbehave(Faults::default());
    synced(&kube).await;
}

#[tokio::test]
async fn a_server_that_is_overloaded_is_not_asked_again_and_again() {
    let server = StandInServer::start();
    server.state().broken = true;
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    until(|| !server.state().lists.is_empty()).await;
    let ask = async || kube.is_deleting(&on_node("u1"), Duration::ZERO).await;
    for _stop in 0..3 {
        assert_eq!(ask().await, None);
    }
    assert_eq!(server.state().gets, 3, "one for each stop");
    tokio::time::sleep(Duration::from_secs(2)).await;
    // Pauses of 0.8 s and more lie between them.
    let lists = server.state().lists.len();
    assert!(lists <= 5, "{lists} lists within 2 s");
    server.state().broken = false;
    synced(&kube).await;
}

#[tokio::test]
async fn what_others_write_into_annotations_is_neither_kept_nor_news() {
    let server = StandInServer::start();
    let annotated = |version: &str, others: &str| {
        let mut object = object("u1", version);
        object["metadata"]["annotations"]["example.com/leader"] = others.into();
        object["metadata"]["annotations"][CONFIG_SOURCE] = "api".into();
        object
    };
    server.state().pods = vec![annotated("90", "a")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    let known = kube.pods().borrow().pods[&uid("u1")].annotations.clone();
    let names: Vec<_> = known.keys().map(String::as_str).collect();
    assert_eq!(names, ["ebb.dev/until", CONFIG_SOURCE]);
    server.watched().await;
    let mut pods = kube.pods();
    pods.mark_unchanged();
    server.tell("MODIFIED", annotated("101", "b"));
    server.tell("ADDED", object("u2", "102"));
    pods.changed().await.unwrap();
    assert!(pods.borrow().pods.contains_key(&uid("u2")), "woken before");
}

/// ARCHITECTURE.md states these numbers.
#[tokio::test]
async fn a_node_makes_few_requests_an_hour() {
    let server = StandInServer::start();
    // A thousandth of the time: an hour takes 3.6 s.
    server.state().second = Some(Duration::from_millis(1));
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    tokio::time::sleep(Duration::from_millis(3600)).await;
    {
        let state = server.state();
        assert_eq!((state.lists.len(), state.gets), (1, 0));
        let watches = state.watches.len();
        assert!((2..=14).contains(&watches), "{watches} watches");
    }
    // While the server is away, the pauses between two tries add up to an hour after so many.
    let mut away = Duration::ZERO;
    let tries = watcher::DefaultBackoff::default()
        .take_while(|pause| {
            away += *pause;
            away < Duration::from_secs(3600)
        })
        .count();
    assert!((60..=130).contains(&tries), "{tries} tries");
}
