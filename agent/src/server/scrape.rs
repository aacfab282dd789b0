//! `GET /metrics`: renders the metrics, at bounded cost.

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Result;
use axum::{
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use ebb_core::{
    flow::{FlowCounts, FlowState},
    format::one_line,
};
use ebb_protocol::proxy_metrics::ProxyMetrics;
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};
use tracing::debug;

use super::{
    keyed_semaphore::{KeyedSemaphore, Permit},
    problem,
};
use crate::{
    drains::driver::{DrainHandle, DrainsView},
    host::{doctor::host_root, proxy},
    kernel::Tracker,
    pods::{policies::PodPolicies, store::Pods},
    telemetry::metrics::{Metrics, NodeMetrics, ProxyAway, exposition::Exposition},
};

/// How many requests are rendered at a time.
const AT_ONCE: usize = 2;

/// How many requests from one address may be rendered or wait for that.
const PER_ADDRESS: usize = 4;

/// How many requests from all addresses may be rendered or wait for that.
const ALL: usize = 64;

/// How old the runtime's last list of pods may be, and how long a scrape waits for a newer one.
const LISTED_WITHIN: Duration = Duration::from_secs(2);

/// What a scrape reads.
pub(crate) struct ScrapeSources {
    /// The kernel's counters.
    pub(crate) tracker: Tracker,
    pub(crate) pods: Arc<Pods>,
    pub(crate) policies: Arc<PodPolicies>,
    pub(crate) drains: DrainHandle,
    /// The agent's run directory, which may have the proxy's socket.
    pub(crate) run_dir: PathBuf,
}

pub(crate) struct Scraper {
    sources: ScrapeSources,
    metrics: Arc<Metrics>,
    limits: ScrapeLimits,
}

struct ScrapeLimits {
    turns: Semaphore,
    per_address: Arc<KeyedSemaphore<IpAddr>>,
    all: Arc<KeyedSemaphore<()>>,
}

impl ScrapeLimits {
    fn new() -> Self {
        Self {
            turns: Semaphore::new(AT_ONCE),
            per_address: Arc::new(KeyedSemaphore::new(PER_ADDRESS)),
            all: Arc::new(KeyedSemaphore::new(ALL)),
        }
    }

    fn try_acquire(&self, caller: IpAddr) -> Option<(Permit<IpAddr>, Permit<()>)> {
        self.per_address
            .try_acquire(caller)
            .zip(self.all.try_acquire(()))
    }
}

impl Scraper {
    pub(crate) fn new(sources: ScrapeSources, metrics: Arc<Metrics>) -> Self {
        Self {
            sources,
            metrics,
            limits: ScrapeLimits::new(),
        }
    }

    /// The metrics in the format that the request's headers accept.
    pub(super) async fn render(&self, caller: IpAddr, headers: &HeaderMap) -> Response {
        let Some(_permits) = self.limits.try_acquire(caller) else {
            let error = "too many requests for metrics at a time; try again later";
            return problem(StatusCode::SERVICE_UNAVAILABLE, error.into());
        };
        let _turn = self.limits.turns.acquire().await;
        let facts = match self.facts().await {
            Ok(facts) => facts,
            Err(e) => return problem(StatusCode::INTERNAL_SERVER_ERROR, one_line(e.as_ref())),
        };
        let pods = self.sources.pods.latest();
        self.metrics.workloads.learn(pods.iter().map(|pod| &**pod));
        let accept = headers.get_all(header::ACCEPT).iter();
        let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
        let exposition = Exposition::accepted(&accept.join(","));
        match self.metrics.render(facts, exposition) {
            Ok(text) => ([(header::CONTENT_TYPE, exposition.content_type())], text).into_response(),
            Err(e) => problem(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
        }
    }

    async fn facts(&self) -> Result<NodeMetrics> {
        let sources = &self.sources;
        let (tracker, run_dir) = (sources.tracker.clone(), sources.run_dir.clone());
        // Some system calls per workload of the node, and two files of each process to find the kubelet.
        let read = spawn_blocking(move || {
            let root = host_root();
            let facts = NodeMetrics {
                counts: tracker.counts(),
                losses: tracker.losses()?,
                missed_changes: tracker.missed_changes()?,
                does_kubelet_use_proxy: proxy::is_used_by_kubelet(&root, &run_dir),
                ..NodeMetrics::default()
            };
            anyhow::Ok((facts, proxy::find_socket(&root, &run_dir)))
        });
        // All scrapes share one list.
        let listed = timeout(LISTED_WITHIN, sources.pods.recent(LISTED_WITHIN));
        let (read, listed) = tokio::join!(read, listed);
        let (facts, socket) = read.map_err(anyhow::Error::from).flatten()?;
        let proxy = match socket {
            Some(socket) => Some(ask_proxy(socket).await),
            None => None,
        };
        Ok(NodeMetrics {
            draining: draining(&sources.drains.view().borrow()),
            is_runtime_up: listed.is_ok_and(|listed| listed.is_ok()),
            is_api_server_up: sources.policies.kube().is_up(),
            proxy,
            ..facts
        })
    }
}

async fn ask_proxy(socket: PathBuf) -> Result<ProxyMetrics, ProxyAway> {
    proxy::metrics(&socket).await.map_err(|e| {
        debug!(
            "no metrics from the proxy at {}: {}",
            socket.display(),
            one_line(e.as_ref())
        );
        ProxyAway
    })
}

/// The flows that hold the drains under way.
fn draining(view: &DrainsView) -> FlowCounts {
    let mut all = FlowCounts::default();
    for flows in view.active.iter().filter_map(|report| report.flows_now) {
        for state in FlowState::ALL {
            all.add_many(state, flows.of(state));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_many_requests_leaves_permits_to_others() {
        let limits = ScrapeLimits::new();
        let of = |n: usize| IpAddr::from([10, 0, 0, u8::try_from(n).unwrap()]);
        let own: Vec<_> = (0..100).filter_map(|_| limits.try_acquire(of(1))).collect();
        assert_eq!(own.len(), PER_ADDRESS);
        assert!(limits.try_acquire(of(2)).is_some());
        // All addresses together have a limit, too.
        let many = (0..2 * ALL).filter_map(|n| limits.try_acquire(of(n)));
        assert_eq!(many.collect::<Vec<_>>().len(), ALL - PER_ADDRESS);
        drop(own);
        assert!(limits.try_acquire(of(1)).is_some());
    }
}
