//! The agent's rights in the cluster, and the requests that it makes.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::RawQuery,
    http::StatusCode,
    routing::{any, get},
};
use ebb::{
    pods::{Pod, kube::Kube},
    telemetry::{events::EventWriter, pod_event::PodEvent},
};
use ebb_core::{
    ids::{PodName, PodUid, SandboxId},
    scope::Scope,
};
use k8s_openapi::api::rbac::v1::ClusterRole;
use serde_json::json;

use crate::{
    manifest::{documents, yaml_files},
    strict::strictly,
};

/// An API server that answers with empty lists, and records which verbs were used on which resources.
async fn recording_server() -> (kube::Client, Arc<Mutex<BTreeSet<String>>>) {
    let used = Arc::new(Mutex::new(BTreeSet::new()));
    let (of_one, of_others) = (used.clone(), used.clone());
    let of_events = used.clone();
    let event = move |request: axum::extract::Request| {
        let verb = match request.method().as_str() {
            "POST" => "create",
            "PATCH" => "patch",
            other => panic!("unexpected {other} of an Event"),
        };
        let line = format!("{verb} events.events.k8s.io");
        of_events.lock().unwrap().insert(line);
        async move { request.into_body() }
    };
    let all = |resource: &'static str| {
        let used = used.clone();
        move |RawQuery(query): RawQuery| {
            let watch =
                query.is_some_and(|q| q.split('&').any(|p| p == "watch=true" || p == "watch=1"));
            let verb = if watch { "watch" } else { "list" };
            used.lock().unwrap().insert(format!("{verb} {resource}"));
            async move {
                if watch {
                    return Body::from_stream(futures_util::stream::pending::<
                        Result<Vec<u8>, String>,
                    >());
                }
                let list = json!({
                    "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList",
                    "metadata": {"resourceVersion": "1"}, "items": [],
                });
                Body::from(list.to_string())
            }
        }
    };
    let pod = move || {
        of_one.lock().unwrap().insert("get pods".into());
        let status = json!({
            "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound",
            "message": "", "code": 404,
        });
        async move { (StatusCode::NOT_FOUND, Json(status)) }
    };
    let other = move |request: axum::extract::Request| {
        let line = format!("{} {}", request.method(), request.uri());
        of_others.lock().unwrap().insert(line);
        async { StatusCode::NOT_FOUND }
    };
    let app = Router::new()
        .route("/api/v1/pods", get(all("pods")))
        .route("/api/v1/namespaces", get(all("namespaces")))
        .route("/api/v1/namespaces/{namespace}/pods/{name}", get(pod))
        .route(
            "/apis/events.k8s.io/v1/namespaces/{namespace}/events",
            any(event.clone()),
        )
        .route(
            "/apis/events.k8s.io/v1/namespaces/{namespace}/events/{name}",
            any(event),
        )
        .fallback(other);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    (kube::Client::try_from(config).unwrap(), used)
}

#[test]
fn one_role_and_one_binding_are_the_only_rights() {
    let kinds = |path: &str| -> Vec<String> {
        let documents = documents(path);
        let kinds = documents.iter().map(|d| d["kind"].as_str().unwrap());
        kinds.map(str::to_owned).collect()
    };
    assert_eq!(
        kinds("deploy/rbac.yaml"),
        ["ClusterRole", "ClusterRoleBinding"]
    );
    for file in yaml_files("deploy") {
        if file == "deploy/rbac.yaml" {
            continue;
        }
        for kind in kinds(&file) {
            let about_rights = kind.contains("Role") || kind.contains("Webhook");
            assert!(!about_rights, "{file} has a {kind}");
        }
    }
    let role: ClusterRole = strictly(&documents("deploy/rbac.yaml")[0]).unwrap();
    assert_eq!(role.aggregation_rule, None);
    for rule in role.rules.unwrap() {
        let resources = rule.resources.unwrap();
        let all = resources.iter().chain(&rule.verbs);
        assert!(!all.into_iter().any(|name| name.contains('*')));
        assert_eq!(rule.non_resource_urls, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_allows_exactly_the_requests_that_the_agent_makes() {
    let (client, used) = recording_server().await;
    let api = Kube::watch(client.clone(), "node", &Arc::default());
    let events = EventWriter::start(client, "node", std::sync::Arc::default());
    let pod = Pod {
        name: PodName {
            uid: PodUid::new("u"),
            namespace: "shop".into(),
            name: "web".into(),
        },
        sandbox: SandboxId::new("s"),
        scope: Scope::Untracked("not asked".into()),
        ips: vec![],
        workload: None,
        labels: std::collections::BTreeMap::new(),
        annotations: std::collections::BTreeMap::new(),
        containers: vec![],
    };
    assert_eq!(api.is_deleting(&pod, Duration::ZERO).await, Some(true));
    // Twice the same Event, so that the second raises the count of the first.
    for _ in 0..2 {
        events.send(PodEvent::policy(&pod.name, "no such until"));
    }
    tokio::time::timeout(Duration::from_secs(10), async {
        while used.lock().unwrap().len() < 7 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();

    let role: ClusterRole = strictly(&documents("deploy/rbac.yaml")[0]).unwrap();
    let mut allowed = BTreeSet::new();
    for rule in role.rules.unwrap() {
        let groups = rule.api_groups.unwrap();
        assert_eq!(groups.len(), 1);
        for resource in rule.resources.unwrap() {
            let resource = format!("{resource}.{}", groups[0]);
            let resource = resource.trim_end_matches('.');
            allowed.extend(rule.verbs.iter().map(|verb| format!("{verb} {resource}")));
        }
    }
    assert_eq!(*used.lock().unwrap(), allowed);
}
