//! The API on the agent's unix socket, which only root can use: for the CLI, and for the holds of the CRI proxy.
//!
//! [`ebb_protocol`] lists the requests and their answers.

use std::{collections::HashMap, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, RawQuery, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use ebb_core::{
    clock::BootTime,
    drain_report::Report,
    flow::{Flow, FlowCounts},
    format::one_line,
    ids::{PodName, PodUid},
};
use ebb_protocol::{
    filter::{DrainQuery, FlowQuery, OwnerRef, PodQuery},
    hold::{BYPASS_PATH, BypassReport, HOLDS_PATH, HoldRequest},
    table::{self, TableStyle},
    views::{
        DrainList, Explanation, FlowList, FlowView, PodList, PodView, Problem, ReleaseRequest,
        Released, SCHEMA, UntrackedPod, VersionView,
    },
};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{
    PodServices,
    advise::{self, ConnectionLifetimes},
    convert, explain,
    filters::{FlowFilter, PodFilter, flow_key},
    holds::Holds,
    lifetimes,
    pod_flows::{PodFlows, PodSnapshot},
    pod_port::WaitPortWarnings,
    problem,
    rates::Rates,
    release::{self, ReleaseError},
    wait::{Form, WaitQuery, Waits},
};
use crate::{
    drains::driver::{DrainHandle, DrainsView},
    kernel::Tracker,
    pods::{
        Pod, cgroup, peer_names,
        store::Pods,
        table::{FindError, PodTable},
    },
};

/// How many pods are dumped at a time: each dump takes a thread and walks the kernel's table.
const DUMPS_AT_ONCE: usize = 2;

/// How long `/v1/drains` waits for dumps of draining pods: the client gives up after 10 s.
const DUMPS_WITHIN: Duration = Duration::from_secs(3);

/// How long a request waits for a newer snapshot of the drains: less than the client waits for an answer.
const NEWER_WITHIN: Duration = Duration::from_secs(8);

/// How long a request waits for the runtime's list of pods.
const REFRESH_WITHIN: Duration = Duration::from_secs(5);

pub(crate) struct Api {
    pub(super) pods: Arc<Pods>,
    pub(super) flows: PodFlows,
    pub(super) drains: DrainHandle,
    pub(super) holds: Arc<Holds>,
    waits: Arc<Waits>,
    pub(super) lifetimes: ConnectionLifetimes,
    tracker: Tracker,
    rates: Rates,
    wait_ports: Arc<WaitPortWarnings>,
    pub(super) started: BootTime,
}

impl Api {
    /// `wait_ports` has the warnings about wait ports.
    pub(crate) fn new(
        services: PodServices,
        holds: Arc<Holds>,
        waits: Arc<Waits>,
        wait_ports: Arc<WaitPortWarnings>,
        lifetimes: ConnectionLifetimes,
    ) -> Self {
        let PodServices {
            pods,
            flows,
            drains,
        } = services;
        let tracker = flows.tracker().clone();
        let rates = Rates::new(tracker.clone());
        Self {
            pods,
            flows,
            drains,
            holds,
            waits,
            lifetimes,
            rates,
            tracker,
            wait_ports,
            started: BootTime::now(),
        }
    }

    /// The warnings about a pod's annotations and wait ports.
    fn warnings(&self, pod: &Pod) -> Vec<String> {
        let (_, mut warnings) = self.flows.policies().policy_and_warnings(pod);
        warnings.extend(self.wait_ports.of(&pod.name.uid));
        warnings
    }
}

/// Serves until `stop`. Requests under way end when their holds are released.
pub(crate) async fn serve(listener: UnixListener, api: Arc<Api>, stop: CancellationToken) {
    let router = Router::new()
        .route("/v1/pods", get(pods))
        .route("/v1/flows", get(flows))
        .route("/v1/flows/table", get(flow_table))
        .route("/v1/drains", get(drains))
        .route("/v1/release", post(release))
        .route("/v1/explain", get(explain))
        .route("/v1/advice", get(advice))
        .route("/v1/wait", get(wait))
        .route("/v1/version", get(version))
        .route(BYPASS_PATH, post(forwarded))
        .route(HOLDS_PATH, post(holds))
        .with_state(api);
    // A bound listener does not fail, so this ends only at `stop`.
    let _ = axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await;
}

async fn pods(State(api): State<Arc<Api>>, Query(query): Query<PodQuery>) -> Response {
    let owner = match query
        .owner
        .as_deref()
        .map(|text| (text, OwnerRef::parse(text)))
    {
        Some((text, None)) => {
            let why = format!("{text:?} is no owner such as deploy/web");
            return problem(StatusCode::BAD_REQUEST, why);
        }
        owner => owner.and_then(|(_, owner)| owner),
    };
    let filter = match PodFilter::new(query.namespace.clone(), query.labels.as_deref(), owner) {
        Ok(filter) => filter,
        Err(why) => return problem(StatusCode::BAD_REQUEST, why),
    };
    let table = match listed(&api).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    let pods: Vec<&Arc<Pod>> = match &query.pod {
        None => table.iter().collect(),
        Some(name) => match table.find_in(name, query.namespace.as_deref()) {
            Ok(pod) => vec![pod],
            Err(e) => return not_found(e),
        },
    };
    let wanted = pods.into_iter().filter(|pod| filter.matches(pod));
    let dumped = dump_all(&api, wanted.cloned().collect());
    let (dumped, rate) = tokio::join!(dumped, api.rates.now());
    let mut pods: Vec<PodView> = dumped
        .iter()
        .map(|(pod, seen)| {
            let mut warnings = api.warnings(pod);
            let seen = seen.as_ref().map_err(Clone::clone);
            warnings.extend(seen.iter().flat_map(|seen| seen.warnings.clone()));
            let seen = seen.map(|seen| &seen.snapshot);
            convert::pod_view(pod, seen, rate.of(&pod.scope), warnings)
        })
        .collect();
    pods.sort_by(|a, b| (&a.pod.namespace, &a.pod.name).cmp(&(&b.pod.namespace, &b.pod.name)));
    Json(PodList {
        schema: SCHEMA.into(),
        pods,
    })
    .into_response()
}

async fn flows(State(api): State<Arc<Api>>, Query(query): Query<FlowQuery>) -> Response {
    let answer = flow_list(&api, query, true, |flows, untracked, _| {
        Json(FlowList {
            schema: SCHEMA.into(),
            flows: flows.collect(),
            untracked,
        })
        .into_response()
    });
    answer.await.unwrap_or_else(|problem| problem)
}

/// The text of `ebb flows`. JSON for 100,000 flows would take longer than the dump.
async fn flow_table(State(api): State<Arc<Api>>, Query(query): Query<FlowQuery>) -> Response {
    let by_container = query.wide;
    let answer = flow_list(&api, query, by_container, |flows, untracked, style| {
        Json(table::flows(flows, &untracked, style)).into_response()
    });
    answer.await.unwrap_or_else(|problem| problem)
}

/// Dumps the pods of the query, and answers with their flows, sorted, and the pods that ebb cannot see. With
/// `by_container`, each flow names its container.
async fn flow_list(
    api: &Arc<Api>,
    query: FlowQuery,
    by_container: bool,
    answer: fn(&mut dyn Iterator<Item = FlowView>, Vec<UntrackedPod>, TableStyle) -> Response,
) -> Result<Response, Response> {
    let bad_request = |why| problem(StatusCode::BAD_REQUEST, why);
    let owner = query.pod.as_deref().and_then(OwnerRef::parse);
    let pod = query.pod.as_ref().filter(|_| owner.is_none());
    let filter = PodFilter::new(query.namespace.clone(), query.labels.as_deref(), owner);
    let filter = filter.map_err(bad_request)?;
    let table = listed(api).await?;
    let flow_filter = FlowFilter::new(&query, &table).map_err(bad_request)?;
    let wanted: Vec<Arc<Pod>> = match pod {
        None => table
            .iter()
            .filter(|p| filter.matches(p))
            .cloned()
            .collect(),
        Some(name) => match table.find_in(name, query.namespace.as_deref()) {
            Ok(pod) => vec![Arc::clone(pod)],
            Err(e) => return Err(not_found(e)),
        },
    };
    let dumped = dump_all(api, wanted).await;
    let peers = peer_names::of(&table);
    let root = by_container.then(|| api.pods.cgroup_root().to_owned());
    let answer = off_the_async_threads(move || {
        let owners = root.map_or_else(HashMap::new, |root| {
            let containers = dumped.iter().flat_map(|(pod, _)| &pod.containers);
            let names = containers.map(|c| (c.id.as_str(), Arc::<str>::from(c.name.as_str())));
            cgroup::owners(&root, &names.collect())
        });
        let named: Vec<_> = dumped
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
            .filter(|(.., flow)| flow_filter.matches(flow))
            .collect();
        flows.sort_unstable_by(|(a, _, f), (b, _, g)| {
            (a, f.state)
                .cmp(&(b, g.state))
                .then_with(|| by_address(f.remote).cmp(&by_address(g.remote)))
                .then_with(|| by_address(f.local).cmp(&by_address(g.local)))
        });
        if let Some(sort) = query.sort {
            flows.sort_by_cached_key(|(.., flow)| flow_key(sort, flow));
        }
        let mut views = flows.iter().map(|(_, name, flow)| {
            let container = flow.cgroup.and_then(|id| owners.get(&id).cloned());
            let peer = peers.get(&flow.remote.ip().to_canonical()).cloned();
            convert::flow_view(name, flow, peer, container)
        });
        let untracked = named.iter().filter_map(|(name, seen)| {
            Some(UntrackedPod {
                pod: name.as_ref().clone(),
                why: seen.as_ref().err()?.clone(),
            })
        });
        let style = TableStyle {
            wide: query.wide,
            no_headers: query.no_headers,
        };
        answer(&mut views, untracked.collect(), style)
    });
    Ok(answer.await)
}

fn by_name(pod: &PodName) -> (&str, &str) {
    (&pod.namespace, &pod.name)
}

/// Orders as [`SocketAddr`] does, but compares integers, which is faster.
pub(super) const fn by_address(address: SocketAddr) -> (bool, u128, u16) {
    match address {
        SocketAddr::V4(v4) => (false, v4.ip().to_bits() as u128, v4.port()),
        SocketAddr::V6(v6) => (true, v6.ip().to_bits(), v6.port()),
    }
}

/// Runs `answer` on a blocking thread, because only two threads serve everything else, releases of holds included.
async fn off_the_async_threads(answer: impl FnOnce() -> Response + Send + 'static) -> Response {
    let answer = tokio::task::spawn_blocking(answer).await;
    answer.unwrap_or_else(|e| problem(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}

async fn drains(State(api): State<Arc<Api>>, Query(query): Query<DrainQuery>) -> Response {
    if let Some(after) = query.after {
        let mut view = api.drains.view();
        let newer = view.wait_for(|v| v.version != after);
        // Without a newer one, the last is the answer.
        let _ = tokio::time::timeout(NEWER_WITHIN, newer).await;
    }
    let view = api.drains.view().borrow().clone();
    let mut drains: Vec<_> = view.under_way(BootTime::now()).collect();
    if query.after.is_some() {
        return drain_list(&view, drains);
    }
    // A drain dumps only when it has to, so its own counts may be old.
    let table = api.pods.latest();
    let pods = drains
        .iter()
        .filter_map(|r| table.by_uid(&r.pod.uid).cloned());
    let dumps = dumps_of(&api, pods.collect());
    let dumps = dumps.take_until(tokio::time::sleep(DUMPS_WITHIN));
    let seen: HashMap<PodUid, FlowCounts> = dumps
        .filter_map(async |(pod, seen)| Some((pod.name.uid.clone(), seen.ok()?.counts())))
        .collect()
        .await;
    for report in &mut drains {
        report.flows_now = seen.get(&report.pod.uid).copied().or(report.flows_now);
    }
    drain_list(&view, drains)
}

/// The drains under way, and those that are over.
fn drain_list(view: &DrainsView, mut drains: Vec<Report>) -> Response {
    drains.extend(view.finished.iter().map(|r| r.as_ref().clone()));
    Json(DrainList {
        schema: SCHEMA.into(),
        version: view.version,
        drains,
    })
    .into_response()
}

async fn advice(State(api): State<Arc<Api>>) -> Response {
    // Without a list, the advice rests on the drains alone.
    let table = listed(&api).await.unwrap_or_default();
    Json(advise::list(&api, &table).await).into_response()
}

#[derive(Deserialize)]
struct WaitedPod {
    pod: String,
}

async fn wait(
    State(api): State<Arc<Api>>,
    Query(WaitedPod { pod }): Query<WaitedPod>,
    RawQuery(query): RawQuery,
) -> Response {
    let query = match WaitQuery::read(query.as_deref()) {
        Ok(query) => query,
        Err(why) => return problem(StatusCode::BAD_REQUEST, why),
    };
    let table = match listed(&api).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    let (name, _) = match release::find(&api, &table, &pod) {
        Ok(found) => found,
        Err(e) => return not_found(e),
    };
    match table.by_uid(&name.uid) {
        Some(pod) => api.waits.answer(Arc::clone(pod), query, Form::Json).await,
        None => problem(
            StatusCode::NOT_FOUND,
            format!("the runtime does not list {name} any more; `ebb drains` shows its drain"),
        ),
    }
}

async fn version() -> Json<VersionView> {
    Json(VersionView {
        schema: SCHEMA.into(),
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

async fn forwarded(State(api): State<Arc<Api>>, Json(report): Json<BypassReport>) -> StatusCode {
    api.holds.forwarded(report).await;
    StatusCode::NO_CONTENT
}

#[derive(Deserialize)]
struct ExplainQuery {
    pod: String,
}

async fn explain(State(api): State<Arc<Api>>, Query(query): Query<ExplainQuery>) -> Response {
    let table = match listed(&api).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    match explain::explain(&api, &table, &query.pod) {
        Ok(mut explanation) => {
            if let (Some(now), Ok(pod)) = (&mut explanation.now, table.find(&query.pod))
                && let Ok(seen) = api.flows.snapshot(pod).await
            {
                now.warnings.extend(seen.warnings);
            }
            if let Ok(pod) = table.find(&query.pod) {
                explanation.lifetimes = lifetimes::of_pod(&api.tracker, pod).await;
            }
            Json::<Explanation>(explanation).into_response()
        }
        Err(e) => not_found(e),
    }
}

async fn release(State(api): State<Arc<Api>>, Json(request): Json<ReleaseRequest>) -> Response {
    let table = match listed(&api).await {
        Ok(table) => table,
        Err(problem) => return problem,
    };
    match release::release(&api, &table, &request.pod).await {
        Ok(report) => Json(Released {
            schema: SCHEMA.into(),
            report: report.as_ref().clone(),
        })
        .into_response(),
        Err(ReleaseError::Find(e)) => not_found(e),
        Err(e) => problem(StatusCode::CONFLICT, e.to_string()),
    }
}

/// 404 with the pods of which the user may choose one.
fn not_found(e: FindError) -> Response {
    let problem = Problem {
        error: e.to_string(),
        candidates: e.candidates(),
    };
    (StatusCode::NOT_FOUND, Json(problem)).into_response()
}

async fn holds(State(api): State<Arc<Api>>, Json(request): Json<HoldRequest>) -> Response {
    let (to, messages) = mpsc::channel(4);
    tokio::spawn(Arc::clone(&api.holds).answer(request, to));
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

/// The flows of each pod, or why ebb cannot see them, in the order of `pods`.
async fn dump_all(
    api: &Arc<Api>,
    pods: Vec<Arc<Pod>>,
) -> Vec<(Arc<Pod>, Result<PodSnapshot, String>)> {
    dumps_of(api, pods).collect().await
}

/// The same as a stream.
fn dumps_of(
    api: &Arc<Api>,
    pods: Vec<Arc<Pod>>,
) -> impl Stream<Item = (Arc<Pod>, Result<PodSnapshot, String>)> + use<> {
    let api = Arc::clone(api);
    stream::iter(pods)
        .map(move |pod| {
            let api = Arc::clone(&api);
            async move {
                let seen = api.flows.snapshot(&pod).await;
                (pod, seen)
            }
        })
        .buffered(DUMPS_AT_ONCE)
}

/// The runtime's pods now, or the last list if the runtime does not answer.
async fn listed(api: &Api) -> Result<Arc<PodTable>, Response> {
    let table = api.pods.refresh_or_cached(REFRESH_WITHIN).await;
    table.map_err(|e| problem(StatusCode::BAD_GATEWAY, one_line(&e)))
}
