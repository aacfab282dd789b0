//! The node port: the wait endpoint, health, readiness and metrics.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, RawQuery, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use ebb_core::format::one_line;
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

pub(crate) use super::scrape::{ScrapeSources, Scraper};
use super::{
    health::TaskHealth,
    http_limits::{self, ConnectionLimiter, PendingLimits},
    peer_identity::Endpoints,
    problem,
    wait::{Form, WaitQuery, Waits},
};
use crate::{
    drains::driver::DrainHandle,
    pods::{hook::WAIT_PATH, store::Pods},
};

/// Limits of the connections whose request has not arrived.
const PENDING: PendingLimits = PendingLimits {
    each: 64,
    all: 1024,
};

/// How old the runtime's last answer may be for the node to be ready. Requests share one list of pods, because any host
/// can send them, as often as it likes.
const ANSWERED_WITHIN: Duration = Duration::from_secs(2);

pub(crate) struct NodePort {
    waits: Arc<Waits>,
    pods: Arc<Pods>,
    drains: DrainHandle,
    tasks: TaskHealth,
    scraper: Scraper,
    /// Whether the runtime failed to answer the last time.
    is_away: AtomicBool,
}

impl NodePort {
    pub(crate) const fn new(
        waits: Arc<Waits>,
        pods: Arc<Pods>,
        drains: DrainHandle,
        tasks: TaskHealth,
        scraper: Scraper,
    ) -> Self {
        Self {
            waits,
            pods,
            drains,
            tasks,
            scraper,
            is_away: AtomicBool::new(false),
        }
    }

    /// Serves until `stop`. Requests under way end when their holds are released.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let router = Router::new()
            .route("/v1/wait", get(wait))
            .route(WAIT_PATH, get(wait))
            .route("/healthz", get(healthy))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(self);
        let limiter = ConnectionLimiter::new(PENDING);
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = stop.cancelled() => break,
            };
            let Ok((stream, remote)) = accepted else {
                sleep(http_limits::PAUSE).await;
                continue;
            };
            let (limiter, router, stop) = (Arc::clone(&limiter), router.clone(), stop.clone());
            connections.spawn(async move {
                http_limits::serve(stream, remote, &limiter, router, &stop).await;
            });
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }
}

/// Blocks until the caller's pod has drained, and answers with the report.
async fn wait(
    State(port): State<Arc<NodePort>>,
    ConnectInfo(ends): ConnectInfo<Endpoints>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let form = Form::wanted(&headers);
    let query = match WaitQuery::read(query.as_deref()) {
        Ok(query) => query,
        Err(why) => return form.problem(StatusCode::BAD_REQUEST, why),
    };
    match port.waits.peers().pod_of(ends).await {
        Ok(Some(pod)) => port.waits.answer(pod, query, form).await,
        Ok(None) => form.problem(
            StatusCode::FORBIDDEN,
            format!(
                "no pod of this node made the connection from {}: only a pod can wait here, and only for itself",
                ends.remote
            ),
        ),
        Err(e) => form.problem(StatusCode::TOO_MANY_REQUESTS, e.to_string()),
    }
}

/// 503 if only a restart of the agent helps. The kubelet's liveness probe then restarts it.
async fn healthy(State(port): State<Arc<NodePort>>) -> Response {
    match port.drains.health().and_then(|()| port.tasks.check()) {
        Ok(()) => "ok\n".into_response(),
        Err(why) => problem(StatusCode::SERVICE_UNAVAILABLE, why),
    }
}

/// Ready while the runtime answers. The BPF programs are attached before this port is served. The answer has a fixed text,
/// because any host can request it; the log has the cause.
async fn ready(State(port): State<Arc<NodePort>>) -> Response {
    let listed = tokio::time::timeout(ANSWERED_WITHIN, port.pods.recent(ANSWERED_WITHIN)).await;
    let why = match listed {
        Ok(Ok(table)) => {
            port.is_away.store(false, Ordering::Relaxed);
            return format!("ready: {} pods\n", table.len()).into_response();
        }
        Ok(Err(e)) => one_line(&e),
        Err(_) => format!("no answer within {ANSWERED_WITHIN:?}"),
    };
    if !port.is_away.swap(true, Ordering::Relaxed) {
        tracing::warn!("not ready while the container runtime does not answer: {why}");
    }
    let fixed = "waiting for the container runtime to answer";
    problem(StatusCode::SERVICE_UNAVAILABLE, fixed.into())
}

async fn metrics(
    State(port): State<Arc<NodePort>>,
    ConnectInfo(ends): ConnectInfo<Endpoints>,
    headers: HeaderMap,
) -> Response {
    port.scraper.render(ends.remote.ip(), &headers).await
}
