//! The watch against a [fake API server](fake_api).

mod fake_api;

use ebb_core::ids::SandboxId;
use ebb_testkit::api_server::{AnswerMode, ApiServer, ApiVerb, Faults};
use futures_util::FutureExt as _;
use serde_json::{Value, json};
use tokio::time::Instant;

use self::fake_api::FakeApiServer;

use super::*;
use crate::pods::table::tests::pod;

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

/// The pod of [`object`], as the runtime lists it.
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
            "the condition was not met within 20 s"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn synced(kube: &Kube) {
    kube.pods().wait_for(|p| p.synced).await.unwrap();
}

#[tokio::test]
async fn the_list_and_every_later_change_are_applied() {
    let server = FakeApiServer::start();
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
    server.notify("ADDED", object("u2", "101"));
    server.notify("MODIFIED", deleted("u1", "102"));
    server.notify(
        "BOOKMARK",
        json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": "103"}}),
    );
    let mut pods = kube.pods();
    pods.wait_for(|p| p.pods.contains_key(&uid("u2")) && p.is_deleting(&uid("u1")))
        .await
        .unwrap();
    let deletion = pods.borrow().pods[&uid("u1")].deletion.unwrap();
    assert_eq!(deletion.grace, Some(Duration::from_secs(30)));
    server.notify("DELETED", deleted("u1", "104"));
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
async fn an_update_that_changes_no_kept_field_wakes_no_receiver() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    let mut pods = kube.pods();
    pods.mark_unchanged();
    server.notify("MODIFIED", object("u1", "101"));
    server.notify("ADDED", object("u2", "102"));
    pods.changed().await.unwrap();
    assert!(
        pods.borrow_and_update().pods.contains_key(&uid("u2")),
        "woken by the first update"
    );
}

#[tokio::test]
async fn with_runtime_events_an_update_that_changes_no_kept_field_does_not_notify() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let changes = Arc::<ChangeNotifier>::default();
    let _runtime = changes.add_source(ChangeSource::Runtime);
    let kube = Kube::watch(server.client(), "node-1", &changes);
    synced(&kube).await;
    server.watched().await;
    let notified = async |limit| timeout(limit, changes.changed()).await.is_ok();
    assert!(notified(Duration::from_secs(10)).await, "the first list");
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
        server.notify(kind, object);
        let limit = Duration::from_secs(if counts { 10 } else { 1 });
        assert_eq!(notified(limit).await, counts, "{what}");
    }
}

#[tokio::test]
async fn a_watch_too_far_behind_lists_again_and_drops_removed_pods() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    server.state().pods = vec![deleted("u2", "200")];
    server.notify("ERROR", gone());
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u2")))
        .await
        .unwrap();
    assert!(!kube.pods().borrow().pods.contains_key(&uid("u1")));
    assert_eq!(server.state().lists.len(), 2);
}

#[tokio::test]
async fn known_pods_outlive_the_server_and_the_watch_resumes_when_it_is_back() {
    let mut server = FakeApiServer::start();
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
    server.notify("MODIFIED", deleted("u1", "300"));
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u1")))
        .await
        .unwrap();
    assert_eq!(
        server.state().lists.len(),
        1,
        "the watch resumes from its last version"
    );
}

#[tokio::test]
async fn is_deleting_waits_for_a_watch_that_is_a_little_late() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    let pod = on_node("u1");
    let (answer, ()) = tokio::join!(kube.is_deleting(&pod, LONGEST_WAIT), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        server.notify("MODIFIED", deleted("u1", "101"));
    });
    assert_eq!(answer, Some(true));
    assert_eq!(server.state().gets, 0);
}

#[tokio::test]
async fn if_the_watch_stays_silent_one_get_decides() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    let ask = async |pod: &Pod| kube.is_deleting(pod, Duration::from_millis(20)).await;
    assert_eq!(ask(&on_node("u1")).await, Some(false));
    assert_eq!(server.state().gets, 1);

    // The watch has not reported the deletion.
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
async fn a_static_pods_deletion_is_unknown_to_the_api_server() {
    let server = FakeApiServer::start();
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
    assert!(kube.ended().now_or_never().is_none());
}

#[tokio::test]
async fn the_end_of_a_watch_is_noticed() {
    let server = FakeApiServer::start();
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    let ended = kube.ended();
    assert!(kube.ended().now_or_never().is_none());
    // As a panic would.
    drop(kube);
    ended.await;
}

#[tokio::test]
async fn an_old_update_does_not_undo_a_deletion() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    let mut shorter = deleted("u1", "102");
    shorter["metadata"]["deletionGracePeriodSeconds"] = 5.into();
    for update in [
        deleted("u1", "101"),
        deleted("u1", "101"),
        shorter,
        // Out of order: from before the deletion, and from before its grace period was shortened.
        object("u1", "90"),
        deleted("u1", "101"),
    ] {
        server.notify("MODIFIED", update);
    }
    server.notify("ADDED", object("u2", "103"));
    let mut pods = kube.pods();
    pods.wait_for(|p| p.pods.contains_key(&uid("u2")))
        .await
        .unwrap();
    let known = |pods: &KubePods| pods.pods[&uid("u1")].deletion.unwrap();
    let before = known(&pods.borrow());
    assert_eq!(before.grace, Some(Duration::from_secs(5)));

    // A list from a cache that is behind.
    server.state().pods = vec![object("u1", "90"), object("u3", "91")];
    server.notify("ERROR", gone());
    pods.wait_for(|p| p.pods.contains_key(&uid("u3")))
        .await
        .unwrap();
    assert_eq!(known(&pods.borrow()), before);
}

#[tokio::test]
async fn a_grace_period_that_began_before_the_agent_started_does_not_restart() {
    let server = FakeApiServer::start();
    let ends = SystemTime::now() + Duration::from_secs(20);
    let mut half_over = deleted("u1", "90");
    let ends = humantime::format_rfc3339_seconds(ends).to_string();
    half_over["metadata"]["deletionTimestamp"] = ends.into();
    // From a server whose clock is ahead.
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
    // A deletion in a watch event begins when the event arrives. The clocks do not matter.
    server.watched().await;
    server.notify("MODIFIED", deleted("u3", "101"));
    let mut pods = kube.pods();
    pods.wait_for(|p| p.is_deleting(&uid("u3"))).await.unwrap();
    let deletion = pods.borrow().pods[&uid("u3")].deletion.unwrap();
    let left = deletion.left(BootTime::now()).unwrap().as_secs();
    assert!((25..=30).contains(&left), "{left} s");
}

#[tokio::test]
async fn a_second_delete_that_only_a_list_shows_counts_from_that_list() {
    let server = FakeApiServer::start();
    let since = Duration::from_secs(3000);
    let with_grace = |grace: u64, version| {
        let mut object = deleted("u1", version);
        let ends = SystemTime::now() - since + Duration::from_secs(grace);
        object["metadata"]["deletionTimestamp"] =
            humantime::format_rfc3339_seconds(ends).to_string().into();
        object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
        object
    };
    server.state().pods = vec![with_grace(3600, "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    server.state().pods = vec![with_grace(60, "200")];
    server.notify("ERROR", gone());
    let grace = |pods: &KubePods| pods.pods[&uid("u1")].deletion.and_then(|d| d.grace);
    let mut pods = kube.pods();
    pods.wait_for(|p| grace(p) == Some(Duration::from_secs(60)))
        .await
        .unwrap();
    let deletion = pods.borrow().pods[&uid("u1")].deletion.unwrap();
    let left = deletion.left(BootTime::now()).unwrap().as_secs();
    assert!((50..=60).contains(&left), "{left} s");
}

#[test]
fn a_grace_period_runs_from_its_first_report() {
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
        let meta = serde_json::from_value(object("u1", "1")["metadata"].clone()).unwrap();
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
    for (known_before, update, expected) in [
        (first, None, first),
        // A repeated report does not restart it.
        (first, Some(deletion(30, 110)), first),
        (first, Some(shorter), shorter),
        // In a list, it counts from the first delete.
        (first, Some(deletion(9, 100)), shorter),
        (shorter, Some(deletion(30, 120)), shorter),
        (unknown, Some(first), first),
        (first, Some(unknown), first),
    ] {
        let mut update = pod(update);
        known(known_before).keep_deletion(&mut update, at(110));
        assert_eq!(update.deletion, Some(expected));
    }
}

#[tokio::test]
async fn a_watch_that_breaks_in_the_middle_of_an_event_resumes() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    let half = format!(r#"{{"type":"MODIFIED","object":{}"#, deleted("u1", "101"));
    server.send(half[..100].into());
    server.send(Value::Null);
    server.state().watchers.clear();
    server.watched().await;
    server.notify("MODIFIED", deleted("u1", "101"));
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u1")))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_silent_watch_is_restarted() {
    let server = FakeApiServer::start();
    server.state().pods = vec![object("u1", "90")];
    let mut config = server.config();
    // kube-rs waits 295 s, which is longer than a watch lasts.
    config.read_timeout = Some(Duration::from_millis(300));
    let kube = Kube::watch(Client::try_from(config).unwrap(), "node-1", &Arc::default());
    synced(&kube).await;
    server.watched().await;
    // The first connection stays open and silent.
    until(|| server.state().watches.len() >= 2).await;
    server.notify("MODIFIED", deleted("u1", "101"));
    kube.pods()
        .wait_for(|p| p.is_deleting(&uid("u1")))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_list_without_an_answer_is_requested_again() {
    let address = "127.0.0.1:0".parse().unwrap();
    let server = ApiServer::start(address).await.unwrap();
    server.misbehave(Faults {
        lists: AnswerMode::Never,
        ..Faults::default()
    });
    let url = format!("http://{}", server.address());
    let mut config = with_limits(Config::new(url.parse().unwrap()));
    assert_eq!(config.read_timeout, Some(READ_TIMEOUT));
    // Instead of minutes.
    config.read_timeout = Some(Duration::from_millis(300));
    let client = Client::try_from(config).unwrap();
    let kube = Kube::watch(client, "node-1", &Arc::default());
    until(|| server.count(ApiVerb::List) >= 2).await;
    server.misbehave(Faults::default());
    synced(&kube).await;
}

#[tokio::test]
async fn a_pod_that_the_server_does_not_have_is_removed_unless_the_server_is_away() {
    let server = FakeApiServer::start();
    let mut replaced = object("u3", "92");
    replaced["metadata"]["uid"] = "another".into();
    server.state().pods = vec![object("u1", "90"), deleted("u2", "91"), replaced];
    let kube = Kube::watch(server.client(), "node-1", &Arc::default());
    synced(&kube).await;
    for (uid, removed) in [("u1", false), ("u2", false), ("u3", true), ("u4", true)] {
        let answer = kube.is_removed(&on_node(uid).name).await;
        assert_eq!(answer, Some(removed), "{uid}");
    }
    server.state().broken = true;
    assert_eq!(kube.is_removed(&on_node("u4").name).await, None);
}

#[tokio::test]
async fn an_overloaded_server_gets_few_requests() {
    let server = FakeApiServer::start();
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
    assert_eq!(kube.is_up(), Some(false));
    server.state().broken = false;
    synced(&kube).await;
    assert_eq!((kube.is_up(), Kube::off().is_up()), (Some(true), None));
}

#[tokio::test]
async fn annotations_of_others_are_neither_kept_nor_reported() {
    let server = FakeApiServer::start();
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
    server.notify("MODIFIED", annotated("101", "b"));
    server.notify("ADDED", object("u2", "102"));
    pods.changed().await.unwrap();
    assert!(pods.borrow().pods.contains_key(&uid("u2")), "woken before");
}

/// docs/decisions/cluster-access.md states these numbers.
#[tokio::test]
async fn a_node_makes_few_requests_an_hour() {
    let server = FakeApiServer::start();
    // A thousand times faster: an hour takes 3.6 s.
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
    // How many retries with backoff fit into an hour while the server is unreachable.
    let mut away = Duration::ZERO;
    let tries = watcher::DefaultBackoff::default()
        .take_while(|pause| {
            away += *pause;
            away < Duration::from_secs(3600)
        })
        .count();
    assert!((60..=130).contains(&tries), "{tries} tries");
}

#[tokio::test]
async fn annotations_of_namespaces_follow_each_change_and_only_ebbs_are_kept() {
    let server = ApiServer::start("127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    server.annotate_namespace("shop", "ebb.dev/drain", Some("observe"));
    server.annotate_namespace("shop", "example.com/owner", Some("team-a"));
    server.annotate_namespace("other", "example.com/owner", Some("team-b"));
    let url = format!("http://{}", server.address());
    let client = Client::try_from(Config::new(url.parse().unwrap())).unwrap();
    let kube = Kube::watch(client, "node-1", &Arc::default());
    let mut namespaces = kube.namespaces();
    let drain = |value: &str| BTreeMap::from([("ebb.dev/drain".into(), value.into())]);
    let expected = NamespaceAnnotations::from([("shop".into(), drain("observe"))]);
    namespaces.wait_for(|n| **n == expected).await.unwrap();
    server.annotate_namespace("new", "ebb.dev/drain", Some("off"));
    server.annotate_namespace("shop", "ebb.dev/drain", None);
    let expected = NamespaceAnnotations::from([("new".into(), drain("off"))]);
    namespaces.wait_for(|n| **n == expected).await.unwrap();
}
