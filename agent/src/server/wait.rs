//! `GET /v1/wait`: blocks until a pod has drained, and answers with the report of its drain.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    http::{HeaderMap, StatusCode, header::ACCEPT, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use ebb_core::{
    clock::BootTime,
    drain_report::{Phase, Report},
    ids::PodUid,
    policy::{DrainMode, Until},
};
use ebb_protocol::views::{Problem, SCHEMA, WaitOutcome, WaitReply};
use serde::Deserialize;
use tokio::time::timeout;

use super::{
    PodServices, drain_text, holds::FIRST_DUMP_WITHIN, keyed_semaphore::KeyedSemaphore,
    peer_identity::PeerResolver, pod_flows::PodFlows,
};
use crate::{
    drains::driver::{DrainHandle, HoldOrder},
    linux::logind::NodeShutdown,
    pods::{
        Pod,
        kube::{Deletion, LONGEST_WAIT},
        store::Pods,
        table::PodTable,
    },
};

/// How many requests may wait for a pod at a time.
const WAITS_PER_POD: usize = 16;

/// The shortest time between two dumps for a request with `until=idle`.
const DUMP_PACE: Duration = Duration::from_secs(1);

/// How long a wait lets the runtime list its pods. After that, it uses the last list.
const REFRESH_WITHIN: Duration = Duration::from_secs(2);

/// How old the list of a wait's containers may be. Any pod can send requests as often as it likes, and they share the
/// lists.
const LIST_AGE: Duration = Duration::from_millis(100);

/// The first pause before the API server is asked again whether the pod is being deleted, if it has not answered. Each
/// further one is twice as long, up to the longest.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(2);
const ASK_AGAIN_AT_MOST: Duration = Duration::from_secs(30);

/// Whether a pod is being deleted, as far as a wait knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeletionAnswer {
    /// The API server says so.
    Deleted,
    /// The API server says that it is not.
    NotDeleted,
    /// The API server does not answer.
    Unanswered,
    /// Nothing is to be learned from the API server: there is none, the pod is a static one, or the node is shutting
    /// down, which deletes no pod.
    Undecided,
}

/// The format of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Json,
    Text,
}

impl Form {
    /// JSON, unless the caller accepts text and not JSON.
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

    /// An error answer, on one line.
    pub(super) fn problem(self, status: StatusCode, error: String) -> Response {
        match self {
            Self::Json => (status, Json(Problem::new(error))).into_response(),
            Self::Text => (status, plain(format!("{error}\n"))).into_response(),
        }
    }

    fn reply(self, reply: WaitReply) -> Response {
        match self {
            Self::Text => plain(drain_text::report(&reply.report)).into_response(),
            Self::Json => Json(reply).into_response(),
        }
    }
}

fn plain(text: String) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; charset=utf-8")], text)
}

#[derive(Deserialize)]
struct QueryText {
    timeout: Option<String>,
    until: Option<String>,
}

/// When to answer the caller. Neither parameter can make a drain longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WaitQuery {
    /// Answer after this long at the latest, with the report so far.
    timeout: Option<Duration>,
    /// Answer as soon as the drain has reached this.
    until: Option<Until>,
}

impl WaitQuery {
    /// Reads the query of a request's URI.
    ///
    /// # Errors
    ///
    /// The first fault, on one line.
    pub(super) fn read(query: Option<&str>) -> Result<Self, String> {
        let query: QueryText = serde_urlencoded::from_str(query.unwrap_or_default())
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

/// The wait endpoint, which the node port and the ports inside pods share.
pub(crate) struct Waits {
    peers: PeerResolver,
    pods: Arc<Pods>,
    flows: PodFlows,
    drains: DrainHandle,
    shutdown: NodeShutdown,
    per_pod: Arc<KeyedSemaphore<PodUid>>,
}

impl Waits {
    pub(crate) fn new(peers: PeerResolver, services: PodServices, shutdown: NodeShutdown) -> Self {
        let PodServices {
            pods,
            flows,
            drains,
        } = services;
        Self {
            peers,
            pods,
            flows,
            drains,
            shutdown,
            per_pod: Arc::new(KeyedSemaphore::new(WAITS_PER_POD)),
        }
    }

    pub(super) const fn peers(&self) -> &PeerResolver {
        &self.peers
    }

    /// The pod from the last list, if it has the same sandbox; else the given one.
    pub(super) fn latest(&self, pod: Arc<Pod>) -> Arc<Pod> {
        same_sandbox(&self.pods.latest(), pod)
    }

    /// Blocks until the pod has drained or the query's `timeout` or `until` is reached, and answers with the report.
    pub(super) async fn answer(&self, pod: Arc<Pod>, query: WaitQuery, form: Form) -> Response {
        let Some(_permit) = self.per_pod.try_acquire(pod.name.uid.clone()) else {
            let error = format!("{WAITS_PER_POD} requests wait for {} already", pod.name);
            return form.problem(StatusCode::TOO_MANY_REQUESTS, error);
        };
        form.reply(self.wait(pod, query).await)
    }

    async fn wait(&self, pod: Arc<Pod>, query: WaitQuery) -> WaitReply {
        // The kubelet runs the hook after the API server has the deletion, or for the restart of a container.
        let ((pod, is_listed), answer) =
            tokio::join!(self.listed_now(Arc::clone(&pod)), self.ask_deletion(&pod));
        let may_be_restart = matches!(
            answer,
            DeletionAnswer::NotDeleted | DeletionAnswer::Unanswered
        );
        let policies = self.flows.policies();
        let (policy, warnings) = policies.policy_and_warnings(&pod);
        let quiet = policy.quiet;
        let is_observed = policy.drain == DrainMode::Observe;
        let deletion = policies.deletion(&pod.name.uid);
        let is_deleted = answer == DeletionAnswer::Deleted;
        let deletion = deletion.or_else(|| is_deleted.then(without_grace));
        let left = deletion.and_then(|d| d.left(BootTime::now()));
        let hold = self
            .drains
            .hold(HoldOrder {
                pod: Arc::clone(&pod),
                policy,
                warnings,
                grace: left.or_else(|| pod.grace()),
                // The timeout of one request does not limit the other holds.
                rpc_timeout: None,
                deletion,
                is_listed,
                is_stop: false,
                is_not_deleted: answer == DeletionAnswer::NotDeleted,
                is_unanswered: answer == DeletionAnswer::Unanswered,
                traceparent: None,
            })
            .await;
        let outcome = tokio::select! {
            _ = hold.released() => WaitOutcome::Released,
            () = self.first_dump(&pod.name.uid), if is_observed => WaitOutcome::Observed,
            () = elapsed(query.timeout) => WaitOutcome::Timeout,
            () = self.reached(&pod, query.until) => WaitOutcome::Reached,
            // It never returns.
            () = self.end_if_not_deleted(&pod, quiet), if may_be_restart => WaitOutcome::Released,
        };
        let active = match outcome {
            WaitOutcome::Released => None,
            _ => self.report_of_active(&pod.name.uid),
        };
        let report = match active {
            Some(report) => report,
            // The drain is over, or has just ended.
            None => hold.released().await,
        };
        WaitReply {
            schema: SCHEMA.into(),
            outcome,
            report: report.as_ref().clone(),
        }
    }

    /// The pod in a list that is at most [`LIST_AGE`] old, or as it is if the runtime does not list it in time; and
    /// whether the runtime did.
    ///
    /// Its containers show whether a later stop belongs to the same end of the pod. The cgroups of a pod on the host
    /// network identify its flows.
    async fn listed_now(&self, pod: Arc<Pod>) -> (Arc<Pod>, bool) {
        let listed = timeout(REFRESH_WITHIN, self.pods.recent(LIST_AGE)).await;
        match listed {
            Ok(Ok(table)) => {
                let found = table.by_uid(&pod.name.uid);
                let is_listed = found.is_some_and(|found| found.sandbox == pod.sandbox);
                (same_sandbox(&table, pod), is_listed)
            }
            Ok(Err(_)) | Err(_) => (self.latest(pod), false),
        }
    }

    async fn ask_deletion(&self, pod: &Pod) -> DeletionAnswer {
        let kube = self.flows.policies().kube();
        match kube.is_deleting(pod, LONGEST_WAIT).await {
            Some(true) => DeletionAnswer::Deleted,
            _ if !kube.decides_end_of(pod) || self.shutdown.is_under_way().await => {
                DeletionAnswer::Undecided
            }
            Some(false) => DeletionAnswer::NotDeleted,
            None => DeletionAnswer::Unanswered,
        }
    }

    /// Ends the pod's drain after `quiet` if the pod is not being deleted by then. Without an answer, it asks again.
    /// Never returns.
    async fn end_if_not_deleted(&self, pod: &Pod, quiet: Duration) {
        tokio::time::sleep(quiet).await;
        let mut pause = ASK_AGAIN_AFTER;
        loop {
            match self.ask_deletion(pod).await {
                DeletionAnswer::Unanswered => {}
                DeletionAnswer::NotDeleted => {
                    self.drains.not_terminating(&pod.name.uid);
                    break;
                }
                DeletionAnswer::Deleted => {
                    self.drains.deletion(&pod.name.uid, without_grace());
                    break;
                }
                DeletionAnswer::Undecided => break,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ASK_AGAIN_AT_MOST);
        }
        std::future::pending().await
    }

    /// Ends when the pod's drain has reached `until`; the drain itself may wait for more.
    ///
    /// The drain's report shows when that may be so. For `idle`, a new dump must confirm it.
    async fn reached(&self, pod: &Pod, until: Option<Until>) {
        // No drain waits for more than `zero`, so it is reached when the drain ends.
        let Some(until @ (Until::Settled | Until::Idle)) = until else {
            return std::future::pending().await;
        };
        let mut view = self.drains.view();
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
                let flows = self.flows.snapshot(pod).await;
                if flows.is_ok_and(|s| s.counts().live() == 0) {
                    return;
                }
                tokio::time::sleep(DUMP_PACE).await;
            }
            if view.changed().await.is_err() {
                // The driver has ended and released the hold.
                return std::future::pending().await;
            }
        }
    }

    /// Ends when the report of the pod's drain has its first dump. A wait for a pod that is only observed waits for no more.
    async fn first_dump(&self, pod: &PodUid) {
        let mut view = self.drains.view();
        let has_dump = |r: &Report| r.pod.uid == *pod && r.flows_at_start.is_some();
        let dumped = view.wait_for(|v| v.active.iter().any(has_dump));
        let _ = timeout(FIRST_DUMP_WITHIN, dumped).await;
    }

    /// The report of the pod's drain under way.
    fn report_of_active(&self, pod: &PodUid) -> Option<Arc<Report>> {
        let view = self.drains.view().borrow().clone();
        let mut drains = view.under_way(BootTime::now());
        drains.find(|r| r.pod.uid == *pod).map(Arc::new)
    }
}

/// A deletion that the API server has just told in answer to a request. The watch may be behind, and shows the grace
/// period later.
fn without_grace() -> Deletion {
    Deletion {
        grace: None,
        seen: BootTime::now(),
    }
}

fn same_sandbox(table: &PodTable, pod: Arc<Pod>) -> Arc<Pod> {
    let newer = table.by_uid(&pod.name.uid);
    newer
        .filter(|p| p.sandbox == pod.sandbox)
        .cloned()
        .unwrap_or(pod)
}

async fn elapsed(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_parsed_and_a_fault_is_named_on_one_line() {
        assert_eq!(WaitQuery::read(None), Ok(WaitQuery::default()));
        assert_eq!(
            WaitQuery::read(Some("timeout=1m%2030s&until=idle&else=x")),
            Ok(WaitQuery {
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
            let error = WaitQuery::read(Some(query)).unwrap_err();
            assert!(error.contains(says) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn text_is_sent_only_if_the_caller_accepts_it_and_not_json() {
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
