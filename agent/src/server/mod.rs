//! The agent's servers: the API and the holds of the CRI proxy on its unix socket, and the wait endpoint on the node port
//! and inside pods.

pub(crate) mod advise;
pub(crate) mod api;
mod convert;
pub(crate) mod deletions;
mod drain_text;
mod explain;
mod filters;
pub(crate) mod health;
pub(crate) mod holds;
mod http_limits;
mod keyed_semaphore;
mod lifetimes;
pub(crate) mod node_port;
pub(crate) mod observed_exits;
pub(crate) mod peer_identity;
pub(crate) mod pod_flows;
pub(crate) mod pod_port;
mod rates;
mod release;
pub(crate) mod saved_history;
mod scrape;
mod stop_history;
pub(crate) mod terminations;
pub(crate) mod wait;

use std::sync::Arc;

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use ebb_protocol::views::Problem;

use self::pod_flows::PodFlows;
use crate::{drains::driver::DrainHandle, pods::store::Pods};

/// What the API, the holds and the waits ask about pods.
#[derive(Clone)]
pub(crate) struct PodServices {
    pub(crate) pods: Arc<Pods>,
    pub(crate) flows: PodFlows,
    pub(crate) drains: DrainHandle,
}

fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(Problem::new(error))).into_response()
}
