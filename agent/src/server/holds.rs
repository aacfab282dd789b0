//! Holds of the CRI proxy (`POST /v1/holds`): whether a stop is held, and until when.
//!
//! 1. [`Holds::answer`] records that the stop has arrived.
//! 2. `admit` finds the pod, checks whether the stop is part of the pod's termination, and returns the order for a hold
//!    or the reason to forward the stop.
//! 3. `hold` joins the pod's drain, and waits for its release or until the container or sandbox has exited.
//!
//! If ebb cannot tell, it forwards the stop.
//!
//! If the pod's policy is to observe, `observe` begins a drain that holds nothing, and the stop is forwarded at once.

mod observe;

pub(super) use self::observe::FIRST_DUMP_WITHIN;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use ebb_core::{
    clock::{BootTime, millis},
    drain_report::{DeadlineCause, ReleaseReason},
    flow::Flow,
    ids::{ContainerId, PodUid},
    machine::Deadline,
    policy::{DrainMode, Policy},
    termination::{NotEnding, TerminationEvidence, classify_sandbox_stop, is_recreated},
};
use ebb_protocol::{
    hold::{BypassReport, HeldCall, HeldNames, HoldMessage, HoldRequest},
    views::StopView,
};
use tokio::sync::mpsc;

use super::{
    PodServices, pod_flows::PodFlows, stop_history::StopHistory, terminations::Terminations,
};
use crate::{
    drains::driver::{DrainHandle, HoldOrder},
    linux::logind::NodeShutdown,
    pods::{Pod, kube::LONGEST_WAIT, store::Pods, table::PodTable},
    telemetry::metrics::Metrics,
};

/// How long a stop waits for the runtime's list of pods, if the last list has what it stops. The rest of the decision needs
/// its part of [`FIRST_MESSAGE_WITHIN`]: up to 0.8 s for the API server, and 0.3 s for logind.
///
/// [`FIRST_MESSAGE_WITHIN`]: ebb_protocol::hold::FIRST_MESSAGE_WITHIN
const REFRESH_WITHIN: Duration = Duration::from_millis(500);

/// How long a stop waits for the list if the last one does not have what it stops: a container that has just started, on a
/// busy node, or any at the start of an agent. Without a list, such a stop is forwarded.
const FIRST_LISTED_WITHIN: Duration = Duration::from_millis(1300);

/// A report that a call was forwarded limits the pod's holds if it is no older than this. A drain that comes later may be
/// for another end of the pod.
const LIMITS_WITHIN: Duration = Duration::from_secs(10);

/// The reason of a stop that is forwarded because its container or sandbox has exited by itself.
const EXITED: &str = "exited";

/// The evidence that the node is shutting down.
const NODE_SHUTDOWN: &str = "node-shutdown";

/// The only answer to a request that an agent has not decided when it stops.
const NOT_HELD_SHUTDOWN: HoldMessage = HoldMessage::Release {
    reason: ReleaseReason::Shutdown,
    held_ms: 0,
};

pub(crate) struct Holds {
    pods: Arc<Pods>,
    flows: PodFlows,
    drains: DrainHandle,
    terminations: Terminations,
    shutdown: NodeShutdown,
    metrics: Arc<Metrics>,
    stops: StopHistory,
    /// Pods whose observed drain a stop has begun that is not yet known to be part of a termination.
    unclassified: Mutex<HashSet<PodUid>>,
}

/// A stop that is held: the hold to order, and what is recorded of the stop.
struct Admission {
    order: HoldOrder,
    record: StopView,
}

/// A stop that is forwarded at once.
struct HoldRefusal {
    why: Bypass,
    /// What is recorded of the stop, if its pod is known.
    record: Option<StopView>,
}

/// Why a stop is forwarded at once.
struct Bypass {
    reason: &'static str,
    /// Why the stop is not taken for part of a termination, if that is the reason.
    evidence: Option<&'static str>,
}

impl Bypass {
    const fn because(reason: &'static str) -> Self {
        Self {
            reason,
            evidence: None,
        }
    }

    const fn not_terminating(evidence: &'static str) -> Self {
        Self {
            reason: ReleaseReason::NotTerminating.name(),
            evidence: Some(evidence),
        }
    }
}

impl std::fmt::Display for Bypass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.reason)?;
        self.evidence.map_or(Ok(()), |e| write!(f, " ({e})"))
    }
}

/// Why a stop is not taken for part of its pod's termination.
#[derive(Clone, Copy)]
struct NotTerminating {
    why: &'static str,
    deleting: Option<bool>,
}

impl Holds {
    /// `terminations` and `shutdown` tell terminations from container restarts.
    pub(crate) fn new(
        services: PodServices,
        terminations: Terminations,
        shutdown: NodeShutdown,
        metrics: Arc<Metrics>,
    ) -> Self {
        let PodServices {
            pods,
            flows,
            drains,
        } = services;
        Self {
            pods,
            flows,
            drains,
            terminations,
            shutdown,
            metrics,
            stops: StopHistory::default(),
            unclassified: Mutex::default(),
        }
    }

    /// The last stops and what was decided about them.
    pub(super) const fn stops(&self) -> &StopHistory {
        &self.stops
    }

    /// Sends the messages that answer one request. When the receiver is gone, it ends and drops the hold.
    pub(super) async fn answer(
        self: Arc<Self>,
        request: HoldRequest,
        to: mpsc::Sender<HoldMessage>,
    ) {
        tokio::select! {
            () = to.closed() => {}
            () = self.decide(request, &to) => {}
        }
    }

    async fn decide(self: &Arc<Self>, request: HoldRequest, to: &mpsc::Sender<HoldMessage>) {
        let now = BootTime::now();
        let arrived = request.arrived.map_or(now, |arrived| arrived.min(now));
        match &request.call {
            HeldCall::StopContainer { container, .. } => {
                self.terminations.record_stop(container, arrived);
            }
            HeldCall::StopPodSandbox { sandbox } => {
                self.terminations.record_sandbox_stop(sandbox, arrived);
            }
        }
        let admitted = tokio::select! {
            admitted = self.admit(&request) => admitted,
            // The next agent decides.
            () = self.drains.stopping() => {
                let _ = to.send(NOT_HELD_SHUTDOWN).await;
                return;
            }
        };
        let message = match admitted {
            Ok(mut admission) => {
                let order = &mut admission.order;
                // Before the time waited is subtracted: by the grace period when the call arrived.
                order.policy.extend = order.policy.extends(order.grace);
                let waited = BootTime::now().since(arrived);
                order.grace = order.grace.map(|grace| grace.saturating_sub(waited));
                order.rpc_timeout = order.rpc_timeout.map(|p| p.saturating_sub(waited));
                self.hold(&request.call, admission, to).await
            }
            Err(HoldRefusal { why, record }) => {
                self.metrics.bypassed(why.reason, why.evidence);
                let pod = record.as_ref().map(|stop| stop.pod.to_string());
                tracing::info!(pod, call = ?request.call, "not held: {why}");
                if let Some(stop) = record {
                    self.stops.remember(StopView {
                        reason: Some(why.reason.into()),
                        evidence: why.evidence.map(Into::into).or(stop.evidence),
                        ..stop
                    });
                }
                HoldMessage::Forward {
                    why: why.to_string(),
                }
            }
        };
        // If the receiver is gone, the call is, too.
        let _ = to.send(message).await;
    }

    /// Records a call that the proxy forwarded without an answer from the agent. For an unknown pod, it is only counted.
    pub(super) async fn forwarded(&self, report: BypassReport) {
        let reason = report.why.name();
        self.metrics.bypassed(reason, None);
        let is_late = BootTime::now().since(report.at) > LIMITS_WITHIN;
        let table = self.listed(&report.call).await;
        let pod = pod_of(&table, &report.call);
        let Some(pod) = pod else { return };
        if let HeldCall::StopContainer { timeout_ms, .. } = report.call
            && !is_late
        {
            // By then the runtime has killed the container, so the pod's other holds must end, too.
            let killed = Deadline {
                at: report.at + Duration::from_millis(timeout_ms),
                cause: DeadlineCause::Grace,
            };
            self.drains.limit(&pod.name.uid, killed);
        }
        self.stops.remember(StopView {
            at: report.at.rfc3339(),
            reason: Some(reason.into()),
            ..stop_of(pod, &report.call)
        });
    }

    /// A new list of pods, because it matters which containers run; the last one if the runtime does not answer in time.
    async fn listed(&self, call: &HeldCall) -> Arc<PodTable> {
        let within = match pod_of(&self.pods.latest(), call) {
            Some(_) => REFRESH_WITHIN,
            None => FIRST_LISTED_WITHIN,
        };
        let table = self.pods.refresh_or_cached(within).await;
        table.unwrap_or_default()
    }

    /// The hold to order, or why the stop is forwarded at once.
    async fn admit(self: &Arc<Self>, request: &HoldRequest) -> Result<Admission, HoldRefusal> {
        let table = self.listed(&request.call).await;
        let pod = pod_of(&table, &request.call).cloned().ok_or_else(|| {
            let unknown = match request.call {
                HeldCall::StopContainer { .. } => "unknown-container",
                HeldCall::StopPodSandbox { .. } => "unknown-sandbox",
            };
            HoldRefusal {
                why: Bypass::because(unknown),
                record: None,
            }
        })?;
        let mut record = StopView {
            rpc_timeout_ms: request.rpc_timeout_ms,
            ..stop_of(&pod, &request.call)
        };
        let policies = self.flows.policies();
        let (policy, warnings) = policies.policy_and_warnings(&pod);
        let order = |grace| HoldOrder {
            deletion: policies.deletion(&pod.name.uid),
            is_listed: true,
            is_stop: true,
            is_not_deleted: false,
            is_unanswered: false,
            traceparent: request.traceparent.clone(),
            pod: Arc::clone(&pod),
            policy: policy.clone(),
            warnings,
            grace,
            rpc_timeout: request.rpc_timeout_ms.map(Duration::from_millis),
        };
        if policy.drain == DrainMode::Observe {
            return Err(self
                .observe(order(policies.grace(&pod)), request, record)
                .await);
        }
        let grace = match self.grace(&pod, &policy, request, &mut record).await {
            Ok(grace) => grace,
            Err(why) => {
                return Err(HoldRefusal {
                    why,
                    record: Some(record),
                });
            }
        };
        Ok(Admission {
            order: order(grace),
            record,
        })
    }

    /// The grace period of the stop, if it is known, or why the stop is not held. Writes the evidence to `record`.
    async fn grace(
        &self,
        pod: &Pod,
        policy: &Policy,
        request: &HoldRequest,
        record: &mut StopView,
    ) -> Result<Option<Duration>, Bypass> {
        if policy.drain == DrainMode::Off {
            return Err(Bypass::because("drain-off"));
        }
        match &request.call {
            HeldCall::StopContainer {
                container,
                timeout_ms,
            } => {
                let waits = || self.is_draining(pod);
                let verdict = self.classify_stop(pod, container, request, waits).await;
                record.ending = verdict.map_or_else(|no| no.deleting, |_| Some(true));
                let why = verdict.map_err(|no| Bypass::not_terminating(no.why))?;
                record.evidence = Some(why.into());
                tracing::debug!(pod = %pod.name, "terminating: {why}");
                if !runs(pod, container) {
                    return Err(Bypass::because(EXITED));
                }
                Ok(Some(Duration::from_millis(*timeout_ms)))
            }
            HeldCall::StopPodSandbox { .. } => {
                let drains_flows = self.is_draining(pod) && self.has_flows(pod).await;
                let why = classify_sandbox_stop(&pod.to_containers(), drains_flows)
                    .ok_or(Bypass::because("nothing-runs"))?;
                record.ending = Some(true);
                record.evidence = Some(why.name().into());
                // A deletion decides the grace period, too, and the API server's watch may not show it yet.
                let policies = self.flows.policies();
                let deleting = policies.kube().is_deleting(pod, LONGEST_WAIT).await;
                if is_recreated(self.evidence(pod, deleting)) {
                    record.ending = deleting;
                    record.evidence = None;
                    return Err(Bypass::not_terminating(NotEnding::SandboxGone.name()));
                }
                Ok(policies.grace(pod))
            }
        }
    }

    /// The evidence that the stop of a container is part of its pod's termination, or why it is not.
    async fn classify_stop(
        &self,
        pod: &Pod,
        container: &ContainerId,
        request: &HoldRequest,
        waits: impl Fn() -> bool,
    ) -> Result<&'static str, NotTerminating> {
        // An earlier agent held this stop. Its evidence (other stops, a preStop wait) may be gone.
        if request.resumed {
            return Ok("resumed");
        }
        let kube = self.flows.policies().kube();
        let deleting = kube.is_deleting(pod, LONGEST_WAIT).await;
        let evidence = || TerminationEvidence {
            prestop_wait: waits(),
            ..self.evidence(pod, deleting)
        };
        let verdict = self
            .terminations
            .classify_stop(pod, container, evidence)
            .await;
        match verdict {
            // A node's shutdown deletes no pod.
            Err(_) if self.shutdown.is_under_way().await => Ok(NODE_SHUTDOWN),
            Err(why) => Err(NotTerminating { why, deleting }),
            Ok(why) => Ok(why),
        }
    }

    fn evidence(&self, pod: &Pod, deleting: Option<bool>) -> TerminationEvidence {
        TerminationEvidence {
            deleting,
            prestop_wait: self.is_draining(pod),
            sandbox_gone: pod.is_sandbox_gone(),
        }
    }

    fn is_draining(&self, pod: &Pod) -> bool {
        let view = self.drains.view();
        let view = view.borrow();
        view.active.iter().any(|r| r.pod.uid == pod.name.uid)
    }

    /// Whether a flow holds the pod's drain. False if ebb cannot see the flows, because a sandbox without a running
    /// container is held only for flows that ebb sees.
    async fn has_flows(&self, pod: &Pod) -> bool {
        let flows = self.flows.snapshot(pod).await;
        flows.is_ok_and(|flows| flows.not_exempt().any(Flow::holds))
    }

    /// Ends when what the call stops has exited: the container does not run any more, the pod is gone, or the sandbox
    /// has neither a running container nor a flow that holds. Follows the store's lists of pods, which the runtime's
    /// events refresh.
    async fn container_exited(&self, call: &HeldCall) {
        let mut tables = self.pods.subscribe();
        loop {
            let table = Arc::clone(&tables.borrow_and_update());
            let still_runs = match call {
                HeldCall::StopContainer { container, .. } => table
                    .by_container(container)
                    .is_some_and(|pod| runs(pod, container)),
                HeldCall::StopPodSandbox { sandbox } => match table.by_sandbox(sandbox) {
                    Some(pod) => {
                        pod.containers.iter().any(|c| c.running) || self.has_flows(pod).await
                    }
                    None => false,
                },
            };
            if !still_runs {
                return;
            }
            if tables.changed().await.is_err() {
                // The agent is stopping, which releases all holds.
                std::future::pending().await
            }
        }
    }

    async fn hold(
        &self,
        call: &HeldCall,
        Admission { order, record }: Admission,
        to: &mpsc::Sender<HoldMessage>,
    ) -> HoldMessage {
        let began = BootTime::now();
        let pod = order.pod.name.uid.clone();
        let name = order.pod.name.clone();
        let names = HeldNames {
            namespace: name.namespace.clone(),
            pod: name.name.clone(),
            container: record.container.clone(),
        };
        let extended = order.policy.extend;
        let hold = self.drains.hold(order).await;
        if !hold.was_taken() {
            // A driver that ended by itself may stay away.
            return match self.drains.is_stopping() {
                true => NOT_HELD_SHUTDOWN,
                false => HoldMessage::Forward {
                    why: "agent-failed".into(),
                },
            };
        }
        let deadline = hold.deadline();
        let stop = self.stops.remember(StopView {
            held: true,
            deadline_ms: Some(millis(deadline.since(began))),
            ..record
        });
        let holding = HoldMessage::Holding {
            pod,
            deadline,
            reserve_ms: millis(hold.reserve()),
            extended,
            names: Some(names),
        };
        let _ = to.send(holding).await;
        let (reason, message) = tokio::select! {
            // If both have happened, the drain's reason says more.
            biased;
            report = hold.released() => {
                let reason = report.reason.unwrap_or(ReleaseReason::Shutdown);
                let held_ms = millis(BootTime::now().since(began));
                (reason.name(), HoldMessage::Release { reason, held_ms })
            }
            () = self.container_exited(call) => {
                tracing::info!(pod = %name, ?call, "hold ended: {EXITED}");
                (EXITED, HoldMessage::Forward { why: EXITED.into() })
            }
        };
        let held_ms = millis(BootTime::now().since(began));
        self.stops.released(stop, reason, held_ms);
        message
    }
}

/// The pod of what the call stops.
fn pod_of<'table>(table: &'table PodTable, call: &HeldCall) -> Option<&'table Arc<Pod>> {
    match call {
        HeldCall::StopContainer { container, .. } => table.by_container(container),
        HeldCall::StopPodSandbox { sandbox } => table.by_sandbox(sandbox),
    }
}

/// The record of a stop of `pod`, with what the call says.
fn stop_of(pod: &Pod, call: &HeldCall) -> StopView {
    match call {
        HeldCall::StopContainer {
            container,
            timeout_ms,
        } => StopView {
            container: pod
                .containers
                .iter()
                .find(|c| c.id == *container)
                .map(|c| c.name.clone()),
            timeout_ms: Some(*timeout_ms),
            ..StopView::new(&pod.name, "StopContainer")
        },
        HeldCall::StopPodSandbox { .. } => StopView::new(&pod.name, "StopPodSandbox"),
    }
}

fn runs(pod: &Pod, container: &ContainerId) -> bool {
    pod.containers
        .iter()
        .any(|c| c.id == *container && c.running)
}
