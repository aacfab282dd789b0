//! `GET /v1/wait`: answering who waits for a pod, with the report of its drain.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    http::{HeaderMap, StatusCode, header::ACCEPT, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use serde::Deserialize;

use crate::{
    agent::Agent,
    clock::BootTime,
    drain::{
        driver::HoldOrder,
        policy::{CallLimits, Policy, Until},
        report::{Phase, Report},
    },
    ids::PodUid,
    pods::{Pod, Scope, kube::Deletion},
    report::{
        text,
        view::{Problem, SCHEMA, WaitReply},
    },
};

/// How many requests may wait for one pod.
pub const WAITS_PER_POD: usize = 16;

/// The shortest time between two looks of one who waits for less than the drain does.
const LOOK_PACE: Duration = Duration::from_secs(1);

/// How long a wait lets the runtime list its pods before it begins with what was known.
const REFRESH_WITHIN: Duration = Duration::from_secs(2);

/// How the caller wants to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Json,
    Text,
}

impl Form {
    /// JSON, unless the caller wants text and says so.
    pub(super) fn wanted(headers: &HeaderMap) -> Self {
        let accepts = |what| {
            let accept = headers.get_all(ACCEPT).iter();
            accept
                .filter_map(|a| a.to_str().ok())
                .any(|a| a.contains(what))
        };
        if accepts("text/plain") && !accepts("application/json") {
            Self::Text
        } else {
            Self::Json
        }
    }

    /// A refusal, on one line.
    pub(super) fn problem(self, status: StatusCode, error: String) -> Response {
        match self {
            Self::Json => (status, Json(Problem { error })).into_response(),
            Self::Text => (status, plain(format!("{error}\n"))).into_response(),
        }
    }

    fn report(self, report: &Report) -> Response {
        match self {
            Self::Text => plain(text::report(report)).into_response(),
            Self::Json => Json(WaitReply {
                schema: SCHEMA.into(),
                report: report.clone(),
            })
            .into_response(),
        }
    }
}

fn plain(text: String) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; charset=utf-8")], text)
}

#[derive(Deserialize)]
struct Query {
    timeout: Option<String>,
    until: Option<String>,
}

/// What the caller asks for, for itself alone: neither can make a drain last longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Patience {
    /// Answer after this long at the latest, with the report as it is then.
    timeout: Option<Duration>,
    /// Answer as soon as this is reached.
    until: Option<Until>,
}

impl Patience {
    /// Reads the query of a request's URI.
    ///
    /// # Errors
    ///
    /// What is wrong with it, on one line.
    pub(super) fn read(query: Option<&str>) -> Result<Self, String> {
        let query: Query = serde_urlencoded::from_str(query.unwrap_or_default())
            .map_err(|e| format!("the query can't be read: {e}"))?;
        let timeout = query.timeout.map(|timeout| {
            humantime::parse_duration(&timeout)
                .map_err(|e| format!("timeout is not a duration such as 30s: {e}"))
        });
        let until = query
            .until
            .map(|until| until.parse().map_err(|e| format!("until: {e}")));
        Ok(Self {
            timeout: timeout.transpose()?,
            until: until.transpose()?,
        })
    }
}

/// Blocks the caller until the pod has drained or its patience is over, and answers with the report.
pub(super) async fn answer(
    agent: &Agent,
    pod: Arc<Pod>,
    patience: Patience,
    form: Form,
) -> Response {
    let Some(_share) = agent.waits.take(pod.name.uid.clone()) else {
        let error = format!("{WAITS_PER_POD} requests wait for {} already", pod.name);
        return form.problem(StatusCode::TOO_MANY_REQUESTS, error);
    };
    let pod = as_it_is_now(agent, pod).await;
    let (policy, warnings) = agent.policy_of(&pod);
    let deletion = agent.deletion_of(&pod.name.uid);
    let left = deletion.and_then(|d| d.left(BootTime::now()));
    let hold = agent
        .drains
        .hold(HoldOrder {
            pod: Arc::clone(&pod),
            policy: policy.clone(),
            warnings,
            grace: left.or_else(|| pod.grace()),
            // The patience of one who waits is not a limit for the others.
            patience: None,
            deleted: deletion.map(|d| d.seen),
        })
        .await;
    let ended = tokio::select! {
        report = hold.released() => Some(report),
        () = over(patience.timeout) => None,
        () = reached(agent, &pod, patience.until) => None,
        () = keep_to_the_grace(agent, &pod.name.uid, &policy, deletion) => None,
    };
    let report = match ended.or_else(|| under_way(agent, &pod.name.uid)) {
        Some(report) => report,
        // It has ended in this very moment.
        None => hold.released().await,
    };
    form.report(&report)
}

/// The pod with the cgroups that it has by now, where these tell which flows are its: edges of others are not
/// watched. Of a pod with a network namespace nothing that counts here changes while its sandbox lives.
async fn as_it_is_now(agent: &Agent, pod: Arc<Pod>) -> Arc<Pod> {
    if matches!(pod.scope, Scope::Netns { .. }) {
        return pod;
    }
    let table = agent.pods.fresh(REFRESH_WITHIN).await.unwrap_or_default();
    let newer = table.by_uid(&pod.name.uid);
    newer
        .filter(|p| p.sandbox == pod.sandbox)
        .cloned()
        .unwrap_or(pod)
}

/// Has the pod's drain end earlier whenever its deletion turns out to leave less time than is `known`. The kubelet asks
/// as soon as it hears of a deletion, which may be before the watch tells of it, and a second delete may shorten the
/// grace. Does not end.
async fn keep_to_the_grace(
    agent: &Agent,
    pod: &PodUid,
    policy: &Policy,
    mut known: Option<Deletion>,
) {
    let mut pods = agent.kube.pods();
    loop {
        let deletion = pods
            .borrow_and_update()
            .pods
            .get(pod)
            .and_then(|p| p.deletion);
        let now = BootTime::now();
        if deletion != known
            && let Some(left) = deletion.and_then(|d| d.left(now))
        {
            let limits = CallLimits {
                grace: Some(left),
                patience: None,
            };
            agent.drains.limit(pod, now + policy.deadline(limits));
        }
        known = deletion;
        if pods.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

async fn over(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

/// Ends when the pod's drain, which may be for more, has come so far.
///
/// The drain's own looks say when that may be; then a look of the caller's own has to agree.
async fn reached(agent: &Agent, pod: &Pod, until: Option<Until>) {
    // Nothing is more than `zero`: that is the drain's own end.
    let Some(until @ (Until::Settled | Until::Idle)) = until else {
        return std::future::pending().await;
    };
    let mut view = agent.drains.view();
    loop {
        let report = {
            let view = view.borrow_and_update();
            let mut active = view.active.iter();
            active.find(|r| r.pod.uid == pod.name.uid).cloned()
        };
        if report.is_some_and(|r| may_be_reached(&r, until)) {
            if until == Until::Settled {
                return;
            }
            if agent
                .snapshot(pod)
                .await
                .is_ok_and(|s| s.counts().live() == 0)
            {
                return;
            }
            tokio::time::sleep(LOOK_PACE).await;
        }
        if view.changed().await.is_err() {
            // The driver is gone, and has released the hold.
            return std::future::pending().await;
        }
    }
}

fn may_be_reached(report: &Report, until: Until) -> bool {
    let settled = report.phase != Phase::Settle;
    match until {
        Until::Settled => settled,
        Until::Idle => settled && report.flows_now.is_some_and(|f| f.live() == 0),
        Until::Zero => false,
    }
}

/// The report of a pod's drain that is under way.
fn under_way(agent: &Agent, pod: &PodUid) -> Option<Arc<Report>> {
    let view = agent.drains.view().borrow().clone();
    let mut drains = view.under_way(BootTime::now());
    drains.find(|r| r.pod.uid == *pod).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_read_and_what_is_wrong_with_it_is_said_on_one_line() {
        assert_eq!(Patience::read(None), Ok(Patience::default()));
        assert_eq!(
            Patience::read(Some("timeout=1m%2030s&until=idle&else=x")),
            Ok(Patience {
                timeout: Some(Duration::from_secs(90)),
                until: Some(Until::Idle),
            })
        );
        for (query, says) in [
            ("timeout=soon", "timeout is not a duration such as 30s"),
            ("timeout=30", "timeout is not a duration such as 30s"),
            (
                "until=never",
                "until: \"never\" is not one of zero, idle, settled",
            ),
            ("timeout=1s&timeout=2s", "the query can't be read"),
        ] {
            let error = Patience::read(Some(query)).unwrap_err();
            assert!(error.contains(says) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn text_is_for_those_who_ask_for_it() {
        let wanted = |accept: &str| {
            let headers = HeaderMap::from_iter([(ACCEPT, accept.parse().unwrap())]);
            Form::wanted(&headers)
        };
        assert_eq!(wanted("text/plain"), Form::Text);
        assert_eq!(wanted("*/*"), Form::Json);
        assert_eq!(wanted("application/json, text/plain;q=0.5"), Form::Json);
        assert_eq!(Form::wanted(&HeaderMap::new()), Form::Json);
    }
}
