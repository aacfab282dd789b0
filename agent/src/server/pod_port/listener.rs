//! Serves one listener inside a pod.

use std::sync::Arc;

use axum::{
    Router,
    extract::{ConnectInfo, RawQuery, State},
    http::{HeaderMap, StatusCode},
    response::Response,
    routing::get,
};
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    kernel::PodListener,
    pods::{Pod, hook::WAIT_PATH},
    server::{
        http_limits::{self, ConnectionLimiter, PendingLimits},
        peer_identity::Endpoints,
        wait::{Form, WaitQuery, Waits},
    },
};

/// Limits of the connections whose request has not arrived. The kubelet sends its request at once.
const PENDING: PendingLimits = PendingLimits { each: 16, all: 32 };

#[derive(Clone)]
struct ListenerState {
    waits: Arc<Waits>,
    /// As it was when the listener was opened.
    pod: Arc<Pod>,
}

/// Accepts until `until`, `stop` or the end of the sandbox, then serves until the last answer.
pub(super) async fn serve(
    listener: PodListener,
    waits: Arc<Waits>,
    pod: Arc<Pod>,
    until: CancellationToken,
    stop: CancellationToken,
) {
    let router = Router::new()
        .route(WAIT_PATH, get(wait))
        .route("/v1/wait", get(wait))
        .with_state(ListenerState { waits, pod });
    let limiter = ConnectionLimiter::new(PENDING);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = until.cancelled() => break,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok(Some((stream, remote, own))) => {
                let (limiter, router, stop) = (Arc::clone(&limiter), router.clone(), stop.clone());
                connections.spawn(async move {
                    http_limits::serve(stream, remote, &limiter, router, &stop).await;
                    drop(own);
                });
            }
            Ok(None) => break,
            Err(_) => sleep(http_limits::PAUSE).await,
        }
    }
    // Frees the port at once. Connections with a request under way stay open.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Blocks until this pod has drained, and answers with the report.
async fn wait(
    State(ListenerState { waits, pod }): State<ListenerState>,
    ConnectInfo(ends): ConnectInfo<Endpoints>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let form = Form::wanted(&headers);
    let query = match WaitQuery::read(query.as_deref()) {
        Ok(query) => query,
        Err(why) => return form.problem(StatusCode::BAD_REQUEST, why),
    };
    match waits.peers().may_wait_for(&pod, ends).await {
        Ok(true) => {}
        Ok(false) => {
            let error = format!(
                "{} may not wait for {}: only the pod itself and its node, where the kubelet is, may",
                ends.remote, pod.name
            );
            return form.problem(StatusCode::FORBIDDEN, error);
        }
        Err(e) => return form.problem(StatusCode::TOO_MANY_REQUESTS, e.to_string()),
    }
    // The pod's containers may have changed since the listener was opened.
    let pod = waits.latest(pod);
    waits.answer(pod, query, form).await
}
