//! The agent's unix socket, for root: what the CLI shows, and the holds of the CRI proxy.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/pods` | [`PodList`] |
//! | `GET /v1/flows?pod=NAME&all=true` | [`FlowList`] |
//! | `GET /v1/flows/table?pod=NAME&all=true` | the same as the text that `ebb flows` prints |
//! | `GET /v1/drains` | [`DrainList`] |
//! | `POST /v1/audit` with [`AuditRequest`] | [`AuditView`], 404 (no such pod) or 409 (its flows can't be seen) |
//! | `POST /v1/release` with [`ReleaseRequest`] | 204, 404 (no such pod) or 409 (it is not draining) |
//! | `GET /v1/explain?pod=NAME` | [`Explanation`], or 404 (no such pod, and none that was stopped) |
//! | `GET /v1/version` | [`VersionView`] |
//! | `POST /v1/passed` with [`PassedNotice`] | 204 |
//! | `POST /v1/holds` | see [`crate::hold::wire`] |
//!
//! Errors are a [`Problem`].

use std::{collections::HashMap, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::explain;
use crate::{
    agent::Agent,
    clock::BootTime,
    flow::{Direction, Flow, FlowCounts, Snapshot},
    hold::{
        holding,
        wire::{HOLDS_PATH, HoldRequest, PASSED_PATH, PassedNotice},
    },
    ids::{PodName, PodUid},
    pods::{Pod, cgroup, table::PodTable},
    report::view::{
        AuditView, DrainList, Explanation, FlowList, FlowView, PodList, PodView, Problem, SCHEMA,
        UntrackedPod, VersionView,
    },
    report::{table, text::one_line},
};

/// How many pods are looked at side by side: each look keeps a thread and the kernel's tables busy.
const LOOKS_AT_ONCE: usize = 2;

/// How long who asks for the drains waits for looks at them: the client gives up after 10 s.
const LOOKS_WITHIN: Duration = Duration::from_secs(3);

/// How long who asks waits for the runtime's list of pods.
const FRESH_WITHIN: Duration = Duration::from_secs(5);

/// `POST /v1/release`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRequest {
    /// The pod: name, `namespace/name` or UID.
    pub pod: String,
}

/// `POST /v1/audit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRequest {
    /// The pod: name, `namespace/name` or UID. Without, the whole node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

/// Serves until `stop`; requests under way are ended by the release of their holds.
pub async fn serve(listener: UnixListener, agent: Arc<Agent>, stop: CancellationToken) {
    let router = Router::new()
        .route("/v1/pods", get(pods))
        .route("/v1/flows", get(flows))
        .route("/v1/flows/table", get(flow_table))
        .route("/v1/drains", get(drains))
        .route("/v1/audit", post(audit))
        .route("/v1/release", post(release))
        .route("/v1/explain", get(explain))
        .route("/v1/version", get(version))
        .route(PASSED_PATH, post(passed))
        .route(HOLDS_PATH, post(holds))
        .with_state(agent);
    // axum serves until the listener fails, which a bound one does not, or the stop.
    let _ = axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await;
}

async fn pods(State(agent): State<Arc<Agent>>) -> Response {
    let table = match listed(&agent).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    let looked = look_at(&agent, table.iter().cloned().collect()).await;
    let mut pods: Vec<PodView> = looked
        .iter()
        .map(|(pod, seen)| {
            let warnings = agent.warnings_of(pod);
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
    let answer = flow_list(&agent, query, true, |flows, untracked| {
        Json(FlowList {
            schema: SCHEMA.into(),
            flows: flows.collect(),
            untracked,
        })
        .into_response()
    });
    answer.await.unwrap_or_else(|problem| problem)
}

/// A node can have 100,000 flows, which are not worth being written and read as JSON only to become a table.
async fn flow_table(State(agent): State<Arc<Agent>>, Query(query): Query<FlowQuery>) -> Response {
    let answer = flow_list(&agent, query, false, |flows, untracked| {
        table::flows(flows, &untracked).into_response()
    });
    answer.await.unwrap_or_else(|problem| problem)
}

/// Looks at the wanted pods, and answers with their flows in order and those that can't be seen. Says whose container's
/// each flow is if that is wanted, too.
async fn flow_list(
    agent: &Arc<Agent>,
    query: FlowQuery,
    by_container: bool,
    answer: fn(&mut dyn Iterator<Item = FlowView>, Vec<UntrackedPod>) -> Response,
) -> Result<Response, Response> {
    let table = listed(agent).await?;
    let wanted: Vec<Arc<Pod>> = match &query.pod {
        None => table.iter().cloned().collect(),
        Some(name) => match table.find(name) {
            Ok(pod) => vec![Arc::clone(pod)],
            Err(e) => return Err(problem(StatusCode::NOT_FOUND, e.to_string())),
        },
    };
    let looked = look_at(agent, wanted).await;
    let root = by_container.then(|| agent.pods.cgroup_root().to_owned());
    let answer = off_the_async_threads(move || {
        let owners = root.map_or_else(HashMap::new, |root| {
            let containers = looked.iter().flat_map(|(pod, _)| &pod.containers);
            let names = containers.map(|c| (c.id.as_str(), Arc::<str>::from(c.name.as_str())));
            cgroup::owners(&root, &names.collect())
        });
        let named: Vec<_> = looked
            .iter()
            .map(|(pod, seen)| (Arc::new(pod.name.clone()), seen))
            .collect();
        let mut names: Vec<_> = named.iter().map(|(name, _)| by_name(name)).collect();
        names.sort_unstable();
        let mut flows: Vec<(usize, &Arc<PodName>, &Flow)> = named
            .iter()
            .filter_map(|(name, seen)| Some((name, seen.as_ref().ok()?)))
            .flat_map(|(name, snapshot)| {
                let place = names.partition_point(|n| *n < by_name(name));
                snapshot.flows.iter().map(move |flow| (place, name, flow))
            })
            .filter(|(.., flow)| query.all || flow.direction == Direction::Inbound)
            .collect();
        flows.sort_unstable_by(|(a, _, f), (b, _, g)| {
            (a, f.state)
                .cmp(&(b, g.state))
                .then_with(|| by_address(f.remote).cmp(&by_address(g.remote)))
                .then_with(|| by_address(f.local).cmp(&by_address(g.local)))
        });
        let mut views = flows.iter().map(|(_, name, flow)| {
            let container = flow.cgroup.and_then(|id| owners.get(&id).cloned());
            FlowView::new(name, flow, container)
        });
        let untracked = named.iter().filter_map(|(name, seen)| {
            Some(UntrackedPod {
                pod: name.as_ref().clone(),
                why: seen.as_ref().err()?.clone(),
            })
        });
        answer(&mut views, untracked.collect())
    });
    Ok(answer.await)
}

fn by_name(pod: &PodName) -> (&str, &str) {
    (&pod.namespace, &pod.name)
}

/// As [`SocketAddr`] is ordered, with numbers that compare at once.
const fn by_address(address: SocketAddr) -> (bool, u128, u16) {
    match address {
        SocketAddr::V4(v4) => (false, v4.ip().to_bits() as u128, v4.port()),
        SocketAddr::V6(v6) => (true, v6.ip().to_bits(), v6.port()),
    }
}

/// Two threads serve everything else, the releases of holds included.
async fn off_the_async_threads(answer: impl FnOnce() -> Response + Send + 'static) -> Response {
    let answer = tokio::task::spawn_blocking(answer).await;
    answer.unwrap_or_else(|e| problem(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}

async fn drains(State(agent): State<Arc<Agent>>) -> Response {
    let view = agent.drains.view().borrow().clone();
    let mut drains: Vec<_> = view.under_way(BootTime::now()).collect();
    // A drain looks only when it has to; who asks wants to know what is open now.
    let table = agent.pods.latest();
    let pods = drains
        .iter()
        .filter_map(|r| table.by_uid(&r.pod.uid).cloned());
    let looks = looks_at(&agent, pods.collect());
    let looks = looks.take_until(tokio::time::sleep(LOOKS_WITHIN));
    let seen: HashMap<PodUid, FlowCounts> = looks
        .filter_map(async |(pod, seen)| Some((pod.name.uid.clone(), seen.ok()?.counts())))
        .collect()
        .await;
    for report in &mut drains {
        report.flows_now = seen.get(&report.pod.uid).copied().or(report.flows_now);
    }
    drains.extend(view.finished.iter().map(|r| r.as_ref().clone()));
    Json(DrainList {
        schema: SCHEMA.into(),
        version: view.version,
        drains,
    })
    .into_response()
}

async fn version() -> Json<VersionView> {
    Json(VersionView {
        schema: SCHEMA.into(),
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

async fn passed(State(agent): State<Arc<Agent>>, Json(notice): Json<PassedNotice>) -> StatusCode {
    holding::passed(&agent, notice).await;
    StatusCode::NO_CONTENT
}

#[derive(Deserialize)]
struct ExplainQuery {
    pod: String,
}

async fn explain(State(agent): State<Arc<Agent>>, Query(query): Query<ExplainQuery>) -> Response {
    let table = match listed(&agent).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    match explain::explain(&agent, &table, &query.pod) {
        Ok(explanation) => Json::<Explanation>(explanation).into_response(),
        Err(e) => problem(StatusCode::NOT_FOUND, e.to_string()),
    }
}

async fn release(State(agent): State<Arc<Agent>>, Json(request): Json<ReleaseRequest>) -> Response {
    let table = match listed(&agent).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    let found = table.find(&request.pod);
    // The sandbox of a pod that ends may not be listed any more, or its name may be another pod's already.
    let under_way = || {
        let view = agent.drains.view().borrow().clone();
        let mut under_way = view.active.iter().map(|r| &r.pod);
        let pod = under_way.find(|pod| explain::is_called(pod, &request.pod));
        pod.map(|pod| pod.uid.clone())
    };
    let listed = found.as_ref().ok().map(|pod| pod.name.uid.clone());
    for uid in listed.into_iter().chain(under_way()) {
        if agent.drains.release(&uid).await {
            return StatusCode::NO_CONTENT.into_response();
        }
    }
    match found {
        Err(e) => problem(StatusCode::NOT_FOUND, e.to_string()),
        Ok(pod) => problem(
            StatusCode::CONFLICT,
            format!("{} is not draining; `ebb drains` shows who is", pod.name),
        ),
    }
}

async fn audit(State(agent): State<Arc<Agent>>, Json(request): Json<AuditRequest>) -> Response {
    let pod = match request.pod {
        None => None,
        Some(name) => match listed(&agent).await.map(|table| table.find(&name).cloned()) {
            Ok(Ok(pod)) => Some(pod),
            Ok(Err(e)) => return problem(StatusCode::NOT_FOUND, e.to_string()),
            Err(problem) => return problem,
        },
    };
    match agent.tracker.audit(pod.as_ref().map(|p| &p.scope)).await {
        Ok(audit) => Json(AuditView {
            schema: SCHEMA.into(),
            audit,
        })
        .into_response(),
        Err(e) => problem(StatusCode::CONFLICT, e.to_string()),
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
    looks_at(agent, pods).collect().await
}

/// The same, one by one.
fn looks_at(
    agent: &Arc<Agent>,
    pods: Vec<Arc<Pod>>,
) -> impl Stream<Item = (Arc<Pod>, Result<Snapshot, String>)> + use<> {
    let agent = Arc::clone(agent);
    stream::iter(pods)
        .map(move |pod| {
            let agent = Arc::clone(&agent);
            async move {
                let seen = agent.snapshot(&pod).await;
                (pod, seen)
            }
        })
        .buffered(LOOKS_AT_ONCE)
}

/// The pods as the runtime has them now, or as they were last known if it does not answer.
async fn listed(agent: &Agent) -> Result<Arc<PodTable>, Response> {
    let table = agent.pods.fresh(FRESH_WITHIN).await;
    table.map_err(|e| problem(StatusCode::BAD_GATEWAY, one_line(&e.into())))
}

fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(Problem { error })).into_response()
}
