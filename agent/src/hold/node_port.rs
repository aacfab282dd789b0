//! The node port: the preStop wait endpoint, health, readiness and metrics.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{ConnectInfo, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::caller::{self, Ends};
use crate::{
    agent::Agent,
    clock::BootTime,
    drain::{driver::HoldOrder, report::Report},
    ids::PodUid,
    report::{
        text::one_line,
        view::{Problem, SCHEMA, WaitReply},
    },
};

/// Serves until `stop`; requests under way are ended by the release of their holds.
pub async fn serve(listener: TcpListener, agent: Arc<Agent>, stop: CancellationToken) {
    let router = Router::new()
        .route("/v1/wait", get(wait))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(agent)
        .into_make_service_with_connect_info::<Ends>();
    // axum serves until the listener fails, which a bound one does not, or the stop.
    let _ = axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await;
}

/// What the caller may ask for.
#[derive(Deserialize)]
struct WaitQuery {
    /// Answer after this long at the latest (`30s`), with the report as it is then.
    timeout: Option<String>,
}

/// Blocks the caller until its pod has drained, and answers with the report.
async fn wait(
    State(agent): State<Arc<Agent>>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    Query(query): Query<WaitQuery>,
) -> Response {
    let patience = match query.timeout.as_deref().map(humantime::parse_duration) {
        None => None,
        Some(Ok(timeout)) => Some(timeout),
        Some(Err(e)) => {
            return problem(
                StatusCode::BAD_REQUEST,
                format!("timeout is not a duration such as 30s: {e}"),
            );
        }
    };
    let Some(pod) = caller::pod_of(&agent, ends).await else {
        return problem(
            StatusCode::FORBIDDEN,
            format!(
                "no pod of this node made the connection from {}: only a pod can wait, and only for itself",
                ends.remote
            ),
        );
    };
    let (policy, warnings) = agent.policy_of(&pod);
    let grace = agent.grace_of(&pod);
    let uid = pod.name.uid.clone();
    let hold = agent
        .drains
        .hold(HoldOrder {
            pod,
            policy,
            warnings,
            grace,
            // The patience of one who waits is not a limit for the others.
            patience: None,
        })
        .await;
    let report = match patience {
        None => hold.released().await,
        Some(patience) => tokio::select! {
            report = hold.released() => report,
            () = tokio::time::sleep(patience) => match under_way(&agent, &uid) {
                Some(report) => report,
                // It has ended in this very moment.
                None => hold.released().await,
            },
        },
    };
    Json(WaitReply {
        schema: SCHEMA.into(),
        report: report.as_ref().clone(),
    })
    .into_response()
}

/// The report of a pod's drain that is under way.
fn under_way(agent: &Agent, pod: &PodUid) -> Option<Arc<Report>> {
    let view = agent.drains.view().borrow().clone();
    let mut drains = view.under_way(BootTime::now());
    drains.find(|r| r.pod.uid == *pod).map(Arc::new)
}

/// Ready once the programs are attached, which is before this port is served; not if the runtime is gone.
async fn ready(State(agent): State<Arc<Agent>>) -> Response {
    match tokio::time::timeout(Duration::from_secs(2), agent.pods.refresh()).await {
        Ok(Ok(table)) => format!("ready: {} pods\n", table.len()).into_response(),
        Ok(Err(e)) => problem(StatusCode::SERVICE_UNAVAILABLE, one_line(&e.into())),
        Err(_) => problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "waiting for the container runtime to answer".into(),
        ),
    }
}

async fn metrics(State(agent): State<Arc<Agent>>) -> Response {
    let losses = match agent.tracker.losses() {
        Ok(losses) => losses,
        Err(e) => return problem(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
    };
    match agent.metrics.render(&agent.tracker.counts(), losses) {
        Ok(text) => (
            [(
                "content-type",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        Err(e) => problem(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
    }
}

fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(Problem { error })).into_response()
}
