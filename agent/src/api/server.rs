//! The agent's unix socket, for root: what the CLI shows, and the holds of the CRI proxy.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/pods` | [`PodList`] |
//! | `GET /v1/flows?pod=NAME&all=true` | [`FlowList`] |
//! | `GET /v1/drains` | [`DrainList`] |
//! | `POST /v1/release` with [`ReleaseRequest`] | 204, 404 (no such pod) or 409 (it is not draining) |
//! | `POST /v1/holds` | see [`crate::hold::wire`] |
//!
//! Errors are a [`Problem`].

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    clock::BootTime,
    flow::{Direction, Snapshot},
    hold::{
        holding,
        wire::{HOLDS_PATH, HoldRequest},
    },
    pods::{Pod, table::PodTable},
    report::text::one_line,
    report::view::{
        DrainList, FlowList, FlowView, PodList, PodView, Problem, SCHEMA, UntrackedPod,
    },
};

/// How many pods are looked at side by side: each look keeps a thread and the kernel's tables busy.
const LOOKS_AT_ONCE: usize = 2;

/// `POST /v1/release`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRequest {
    /// The pod: name, `namespace/name` or UID.
    pub pod: String,
}

/// Serves until `stop`; requests under way are ended by the release of their holds.
pub async fn serve(listener: UnixListener, agent: Arc<Agent>, stop: CancellationToken) {
    let router = Router::new()
        .route("/v1/pods", get(pods))
        .route("/v1/flows", get(flows))
        .route("/v1/drains", get(drains))
        .route("/v1/release", post(release))
        .route(HOLDS_PATH, post(holds))
        .with_state(agent);
    // axum serves until the listener fails, which a bound one does not, or the stop.
    let _ = axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await;
}

async fn pods(State(agent): State<Arc<Agent>>) -> Response {
    let table = match fresh(&agent).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    let looked = look_at(&agent, table.iter().cloned().collect()).await;
    let mut pods: Vec<PodView> = looked
        .iter()
        .map(|(pod, seen)| {
            let (_, warnings) = agent.policy_of(pod);
            PodView::new(pod, seen.as_ref().map_err(Clone::clone), warnings)
        })
        .collect();
    pods.sort_by(|a, b| (&a.pod.namespace, &a.pod.name).cmp(&(&b.pod.namespace, &b.pod.name)));
    Json(PodList {
        schema: SCHEMA.into(),
        pods,
    })
    .into_response()
}

#[derive(Deserialize)]
struct FlowQuery {
    pod: Option<String>,
    #[serde(default)]
    all: bool,
}

async fn flows(State(agent): State<Arc<Agent>>, Query(query): Query<FlowQuery>) -> Response {
    let table = match fresh(&agent).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    let wanted: Vec<Arc<Pod>> = match &query.pod {
        None => table.iter().cloned().collect(),
        Some(name) => match table.find(name) {
            Ok(pod) => vec![Arc::clone(pod)],
            Err(e) => return problem(StatusCode::NOT_FOUND, e.to_string()),
        },
    };
    let mut list = FlowList {
        schema: SCHEMA.into(),
        flows: Vec::new(),
        untracked: Vec::new(),
    };
    for (pod, seen) in look_at(&agent, wanted).await {
        match seen {
            Ok(snapshot) => list.flows.extend(
                snapshot
                    .flows
                    .iter()
                    .filter(|f| query.all || f.direction == Direction::Inbound)
                    .map(|f| FlowView::new(&pod.name, f)),
            ),
            Err(why) => list.untracked.push(UntrackedPod {
                pod: pod.name.clone(),
                why,
            }),
        }
    }
    list.flows
        .sort_by(|a, b| (&a.pod, a.state, a.remote).cmp(&(&b.pod, b.state, b.remote)));
    Json(list).into_response()
}

async fn drains(State(agent): State<Arc<Agent>>) -> Response {
    let view = agent.drains.view().borrow().clone();
    let table = agent.pods.latest();
    let mut drains: Vec<_> = view.under_way(BootTime::now()).collect();
    for report in &mut drains {
        // A drain looks only when it has to; who asks wants to know what is open now.
        if let Some(pod) = table.by_uid(&report.pod.uid)
            && let Ok(snapshot) = agent.snapshot(pod).await
        {
            report.flows_now = Some(snapshot.counts());
        }
    }
    drains.extend(view.finished.iter().map(|r| r.as_ref().clone()));
    Json(DrainList {
        schema: SCHEMA.into(),
        version: view.version,
        drains,
    })
    .into_response()
}

async fn release(State(agent): State<Arc<Agent>>, Json(request): Json<ReleaseRequest>) -> Response {
    let table = match fresh(&agent).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    match table.find(&request.pod) {
        Err(e) => problem(StatusCode::NOT_FOUND, e.to_string()),
        Ok(pod) if agent.drains.release(&pod.name.uid).await => {
            StatusCode::NO_CONTENT.into_response()
        }
        Ok(pod) => problem(
            StatusCode::CONFLICT,
            format!("{} is not draining; `ebb drains` shows who is", pod.name),
        ),
    }
}

async fn holds(State(agent): State<Arc<Agent>>, Json(request): Json<HoldRequest>) -> Response {
    let (to, messages) = mpsc::channel(4);
    tokio::spawn(holding::answer(agent, request, to));
    let lines = ReceiverStream::new(messages)
        .map(|message| serde_json::to_vec(&message))
        .map_ok(|mut line| {
            line.push(b'\n');
            Bytes::from(line)
        });
    let lines = lines.take_while(|line| std::future::ready(line.is_ok()));
    Body::from_stream(lines.map(|line| Ok::<_, Infallible>(line.unwrap_or_default())))
        .into_response()
}

/// The flows of each pod, or why they can't be seen, in the order of `pods`.
async fn look_at(
    agent: &Arc<Agent>,
    pods: Vec<Arc<Pod>>,
) -> Vec<(Arc<Pod>, Result<Snapshot, String>)> {
    stream::iter(pods)
        .map(|pod| {
            let agent = Arc::clone(agent);
            async move {
                let seen = agent.snapshot(&pod).await;
                (pod, seen)
            }
        })
        .buffered(LOOKS_AT_ONCE)
        .collect()
        .await
}

/// The pods as the runtime has them now, or as they were last known if it does not answer.
async fn fresh(agent: &Agent) -> Result<Arc<PodTable>, Response> {
    match agent.pods.refresh().await {
        Ok(table) => Ok(table),
        Err(e) => {
            let known = agent.pods.latest();
            if known.is_empty() {
                let e = one_line(&e.into());
                return Err(problem(StatusCode::BAD_GATEWAY, e));
            }
            tracing::warn!("{}; showing the pods known before", one_line(&e.into()));
            Ok(known)
        }
    }
}

fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(Problem { error })).into_response()
}
