//! One listener inside one pod, and those who call there.

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
    agent::Agent,
    hold::{
        caller::{self, Ends},
        door::{self, Door, Limits},
        wait::{self, Form, Patience},
    },
    kernel::PodListener,
    pods::{Pod, hook::WAIT_PATH},
};

/// Connections that have not asked for anything yet. The kubelet's asks at once.
const SILENT: Limits = Limits { each: 16, all: 32 };

#[derive(Clone)]
struct Shared {
    agent: Arc<Agent>,
    /// As it was when the listener was made.
    pod: Arc<Pod>,
}

/// Serves until `until`, `stop` or the end of the sandbox, and then until the last answer.
pub(super) async fn serve(
    listener: PodListener,
    agent: Arc<Agent>,
    pod: Arc<Pod>,
    until: CancellationToken,
    stop: CancellationToken,
) {
    let router = Router::new()
        .route(WAIT_PATH, get(wait))
        .route("/v1/wait", get(wait))
        .with_state(Shared { agent, pod });
    let door = Door::new(SILENT);
    let mut visits = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = visits.join_next() => continue,
            () = until.cancelled() => break,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok(Some((stream, remote, own))) => {
                let (door, router, stop) = (Arc::clone(&door), router.clone(), stop.clone());
                visits.spawn(async move {
                    door::serve(stream, remote, &door, router, &stop).await;
                    drop(own);
                });
            }
            Ok(None) => break,
            Err(_) => sleep(door::PAUSE).await,
        }
    }
    // The port is given back now; who is being answered keeps the connection.
    drop(listener);
    while visits.join_next().await.is_some() {}
}

/// Blocks the caller until this pod has drained, and answers with the report.
async fn wait(
    State(Shared { agent, pod }): State<Shared>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let form = Form::wanted(&headers);
    let patience = match Patience::read(query.as_deref()) {
        Ok(patience) => patience,
        Err(why) => return form.problem(StatusCode::BAD_REQUEST, why),
    };
    match caller::may_wait_for(&agent, &pod, ends).await {
        Ok(true) => {}
        Ok(false) => {
            let error = format!(
                "{} is neither the kubelet's node nor the pod itself: nobody else can wait for {}",
                ends.remote, pod.name
            );
            return form.problem(StatusCode::FORBIDDEN, error);
        }
        Err(e) => return form.problem(StatusCode::TOO_MANY_REQUESTS, e.to_string()),
    }
    // Its containers may have changed since.
    let table = agent.pods.latest();
    let newer = table
        .by_uid(&pod.name.uid)
        .filter(|p| p.sandbox == pod.sandbox);
    let pod = newer.cloned().unwrap_or(pod);
    wait::answer(&agent, pod, patience, form).await
}
