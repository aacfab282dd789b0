//! The node port: the wait endpoint for those who call from inside a pod, health, readiness and metrics.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, RawQuery, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    caller::{self, Ends},
    door::{self, Door, Limits},
    shares::{Share, Shares},
    wait::{self, Form, Patience},
};
use crate::{
    agent::Agent,
    pods::hook::WAIT_PATH,
    report::{text::one_line, view::Problem},
};

/// Connections that have not asked for anything yet.
const SILENT: Limits = Limits {
    each: 64,
    all: 1024,
};

/// How many renderings of the metrics at a time.
const METRICS_AT_ONCE: usize = 2;

/// How many may be asked for or wait for that from one address.
const METRICS_EACH: usize = 4;

/// The same, from all.
const METRICS_ALL: usize = 64;

#[derive(Clone)]
struct Shared {
    agent: Arc<Agent>,
    metrics: Arc<Metrics>,
    /// The runtime's last answer was none.
    is_away: Arc<AtomicBool>,
}

/// Bounds what asking for metrics costs.
struct Metrics {
    turns: Semaphore,
    each: Arc<Shares<IpAddr>>,
    all: Arc<Shares<()>>,
}

impl Metrics {
    fn new() -> Self {
        Self {
            turns: Semaphore::new(METRICS_AT_ONCE),
            each: Arc::new(Shares::new(METRICS_EACH)),
            all: Arc::new(Shares::new(METRICS_ALL)),
        }
    }

    /// A place for one who asks; `None` if there are too many.
    fn place(&self, caller: IpAddr) -> Option<(Share<IpAddr>, Share<()>)> {
        self.each.take(caller).zip(self.all.take(()))
    }
}

/// Serves until `stop`; requests under way are ended by the release of their holds.
pub async fn serve(listener: TcpListener, agent: Arc<Agent>, stop: CancellationToken) {
    let router = Router::new()
        .route("/v1/wait", get(wait))
        .route(WAIT_PATH, get(wait))
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Shared {
            agent,
            metrics: Arc::new(Metrics::new()),
            is_away: Arc::default(),
        });
    let door = Door::new(SILENT);
    let mut visits = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = visits.join_next() => continue,
            () = stop.cancelled() => break,
        };
        let Ok((stream, remote)) = accepted else {
            sleep(door::PAUSE).await;
            continue;
        };
        let (door, router, stop) = (Arc::clone(&door), router.clone(), stop.clone());
        visits.spawn(async move { door::serve(stream, remote, &door, router, &stop).await });
    }
    drop(listener);
    while visits.join_next().await.is_some() {}
}

/// Blocks the caller until its pod has drained, and answers with the report.
async fn wait(
    State(Shared { agent, .. }): State<Shared>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let form = Form::wanted(&headers);
    let patience = match Patience::read(query.as_deref()) {
        Ok(patience) => patience,
        Err(why) => return form.problem(StatusCode::BAD_REQUEST, why),
    };
    match caller::pod_of(&agent, ends).await {
        Ok(Some(pod)) => wait::answer(&agent, pod, patience, form).await,
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

/// How old the runtime's last answer may be for it to count as there. Anybody on the node's network may ask for
/// readiness, and as often as he likes.
const ANSWERED_WITHIN: Duration = Duration::from_secs(2);

/// 503 where only a restart of the agent helps, which is what the kubelet does then.
async fn healthy(State(Shared { agent, .. }): State<Shared>) -> Response {
    match agent.drains.health() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => problem(StatusCode::SERVICE_UNAVAILABLE, why),
    }
}

/// Ready once the programs are attached, which is before this port is served; not if the runtime is gone. The cause is
/// for the log: whoever reaches the port may ask.
async fn ready(State(Shared { agent, is_away, .. }): State<Shared>) -> Response {
    let listed = tokio::time::timeout(ANSWERED_WITHIN, agent.pods.recent(ANSWERED_WITHIN)).await;
    let why = match listed {
        Ok(Ok(table)) => {
            is_away.store(false, Ordering::Relaxed);
            return format!("ready: {} pods\n", table.len()).into_response();
        }
        Ok(Err(e)) => one_line(&e.into()),
        Err(_) => format!("no answer within {ANSWERED_WITHIN:?}"),
    };
    if !is_away.swap(true, Ordering::Relaxed) {
        tracing::warn!("not ready while the container runtime does not answer: {why}");
    }
    let fixed = "waiting for the container runtime to answer";
    problem(StatusCode::SERVICE_UNAVAILABLE, fixed.into())
}

async fn metrics(
    State(Shared { agent, metrics, .. }): State<Shared>,
    ConnectInfo(ends): ConnectInfo<Ends>,
) -> Response {
    let Some(_place) = metrics.place(ends.remote.ip()) else {
        let error = "too many ask for metrics at a time";
        return problem(StatusCode::SERVICE_UNAVAILABLE, error.into());
    };
    let _turn = metrics.turns.acquire().await;
    // Some system calls for each workload of the node.
    let tracker = agent.tracker.clone();
    let read = tokio::task::spawn_blocking(move || {
        anyhow::Ok((tracker.counts(), tracker.losses()?, tracker.drift()))
    });
    let (counts, losses, drift) = match read.await.map_err(Into::into).flatten() {
        Ok(read) => read,
        Err(e) => return problem(StatusCode::INTERNAL_SERVER_ERROR, one_line(&e)),
    };
    match agent.metrics.render(&counts, losses, drift) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_metrics_all_the_time_leaves_a_place_to_the_scraper() {
        let metrics = Metrics::new();
        let of = |n: usize| IpAddr::from([10, 0, 0, u8::try_from(n).unwrap()]);
        let own: Vec<_> = (0..100).filter_map(|_| metrics.place(of(1))).collect();
        assert_eq!(own.len(), METRICS_EACH);
        assert!(metrics.place(of(2)).is_some());
        // And all together there are not more than can be borne.
        let many = (0..2 * METRICS_ALL).filter_map(|n| metrics.place(of(n)));
        assert_eq!(many.collect::<Vec<_>>().len(), METRICS_ALL - METRICS_EACH);
        drop(own);
        assert!(metrics.place(of(1)).is_some());
    }
}
