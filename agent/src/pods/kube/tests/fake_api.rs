//! A fake API server: list, watch and get of pod metadata over real HTTP. It stores nothing and checks nothing.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::StreamExt as _;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc};

use super::{super::with_limits, until};

#[derive(Default)]
pub(super) struct FakeApiState {
    pub(super) pods: Vec<Value>,
    pub(super) watchers: Vec<mpsc::UnboundedSender<Value>>,
    pub(super) lists: Vec<HashMap<String, String>>,
    pub(super) watches: Vec<HashMap<String, String>>,
    pub(super) gets: u32,
    /// Requests are answered with 503.
    pub(super) broken: bool,
    /// How long a second of `timeoutSeconds` lasts. `None`: a watch lasts an hour.
    pub(super) second: Option<Duration>,
}

pub(super) struct FakeApiServer {
    address: SocketAddr,
    state: Arc<Mutex<FakeApiState>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl FakeApiServer {
    pub(super) fn start() -> Self {
        let address = "127.0.0.1:0".parse().unwrap();
        let mut it = Self {
            address,
            state: Arc::default(),
            runtime: None,
        };
        it.restart();
        it
    }

    /// Serves from its own runtime, so that stopping it ends every connection.
    pub(super) fn restart(&mut self) {
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

    pub(super) fn stop(&mut self) {
        self.state().watchers.clear();
        self.runtime.take().unwrap().shutdown_background();
    }

    pub(super) fn state(&self) -> MutexGuard<'_, FakeApiState> {
        self.state.lock().unwrap()
    }

    pub(super) fn client(&self) -> Client {
        Client::try_from(self.config()).unwrap()
    }

    pub(super) fn config(&self) -> Config {
        let url = format!("http://{}", self.address);
        with_limits(Config::new(url.parse().unwrap()))
    }

    /// Sends an event of this kind to every watcher.
    pub(super) fn notify(&self, kind: &str, object: Value) {
        self.send(json!({"type": kind, "object": object}));
    }

    /// Sends this to every watcher.
    pub(super) fn send(&self, event: Value) {
        self.state()
            .watchers
            .retain(|w| w.send(event.clone()).is_ok());
    }

    pub(super) async fn watched(&self) {
        until(|| !self.state().watchers.is_empty()).await;
    }
}

impl Drop for FakeApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn list_or_watch(
    State(state): State<Arc<Mutex<FakeApiState>>>,
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
        // A string is sent as it is, for example half a line. Null breaks the connection.
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
    State(state): State<Arc<Mutex<FakeApiState>>>,
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
