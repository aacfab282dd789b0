//! Answering a holder's request (`POST /v1/holds`): is this stop to be held, and for how long?

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::wire::{HeldCall, HoldMessage, HoldRequest, PassedNotice};
use crate::{
    agent::Agent,
    clock::{BootTime, millis},
    drain::{driver::HoldOrder, report::ReleaseReason},
    ids::ContainerId,
    pods::{
        Pod,
        kube::LONGEST_WAIT,
        terminating::{Evidence, sandbox_ends},
    },
    report::view::{StopView, rfc3339},
};

/// How long a stop waits for the runtime's list of pods. With what [`FIRST_MESSAGE`] leaves for the rest.
///
/// [`FIRST_MESSAGE`]: super::wire::FIRST_MESSAGE
const REFRESH_WITHIN: Duration = Duration::from_millis(500);

/// Why a call is passed, or a hold ended, whose container or sandbox has ended by itself.
const EXITED: &str = "exited";

/// What the answer may need to get to the proxy, and timers to go off. The agent has to be the one that ends a hold at its deadline:
/// the proxy, whose own limit is the same, would cut flows that the report then takes for ended.
const ON_THE_WAY: Duration = Duration::from_millis(50);

/// Answers one request, message by message. Ends early, giving the hold up, when nobody listens any more.
pub async fn answer(agent: Arc<Agent>, request: HoldRequest, to: mpsc::Sender<HoldMessage>) {
    tokio::select! {
        () = to.closed() => {}
        () = decide(&agent, request, &to) => {}
    }
}

/// Why a call is not held.
struct Pass {
    reason: &'static str,
    /// Where it is not known to be its pod's end: what is known instead.
    evidence: Option<&'static str>,
}

impl Pass {
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

impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.reason)?;
        self.evidence.map_or(Ok(()), |e| write!(f, " ({e})"))
    }
}

async fn decide(agent: &Agent, request: HoldRequest, to: &mpsc::Sender<HoldMessage>) {
    let now = BootTime::now();
    let arrived = request.arrived.map_or(now, |arrived| arrived.min(now));
    match &request.call {
        HeldCall::StopContainer { container, .. } => agent.judge.stop_arrives(container, arrived),
        HeldCall::StopPodSandbox { sandbox } => agent.judge.sandbox_stops(sandbox, arrived),
    }
    let mut stop = None;
    let message = match wanted(agent, &request, &mut stop).await {
        Ok(mut order) => {
            // By what it was when the call came.
            order.policy.extend = order.policy.extends(order.grace);
            // What is resumed has its first deadline, which is not to be moved by the moments that two agents needed.
            let on_the_way = if request.resumed {
                Duration::ZERO
            } else {
                ON_THE_WAY
            };
            let waited = BootTime::now().since(arrived) + on_the_way;
            order.grace = order.grace.map(|grace| grace.saturating_sub(waited));
            order.patience = order.patience.map(|p| p.saturating_sub(waited));
            hold(agent, &request.call, order, stop, to).await
        }
        Err(pass) => {
            agent.metrics.passed(pass.reason, pass.evidence);
            tracing::info!(call = ?request.call, "not held: {pass}");
            if let Some(stop) = stop {
                agent.judgements.remember(StopView {
                    reason: Some(pass.reason.into()),
                    evidence: pass.evidence.map(Into::into).or(stop.evidence),
                    ..stop
                });
            }
            HoldMessage::Pass {
                why: pass.to_string(),
            }
        }
    };
    // Nobody listens: nobody has to be told.
    let _ = to.send(message).await;
}

/// Remembers a call that the proxy passed by itself. A pod that is not known is not asked about either.
pub async fn passed(agent: &Agent, notice: PassedNotice) {
    let reason = match notice.why.as_str() {
        "no-time" => "no-time",
        "agent-away" => "agent-away",
        "agent-silent" => "agent-silent",
        _ => "other",
    };
    agent.metrics.passed(reason, None);
    let table = agent.pods.fresh(REFRESH_WITHIN).await.unwrap_or_default();
    let pod = match &notice.call {
        HeldCall::StopContainer { container, .. } => table.by_container(container),
        HeldCall::StopPodSandbox { sandbox } => table.by_sandbox(sandbox),
    };
    let Some(pod) = pod else { return };
    if let HeldCall::StopContainer { timeout_ms, .. } = notice.call {
        // By then the container is killed, and whatever else holds for its sake has nothing to wait for.
        let killed = notice.at + Duration::from_millis(timeout_ms);
        agent.drains.limit(&pod.name.uid, killed);
    }
    agent.judgements.remember(StopView {
        at: rfc3339(notice.at),
        reason: Some(reason.into()),
        ..stop_of(pod, &notice.call)
    });
}

/// A stop of `pod`, as far as the call says it.
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

/// The hold to order, or why there is none. `stop` is what is to be remembered of it, once the pod is known.
async fn wanted(
    agent: &Agent,
    request: &HoldRequest,
    stop: &mut Option<StopView>,
) -> Result<HoldOrder, Pass> {
    let remember = |pod: &Pod| StopView {
        patience_ms: request.caller_patience_ms,
        ..stop_of(pod, &request.call)
    };
    let (pod, grace) = match &request.call {
        HeldCall::StopContainer {
            container,
            timeout_ms,
        } => {
            // Which containers run matters, so what was known before will do only if the runtime is away.
            let table = agent.pods.fresh(REFRESH_WITHIN).await.unwrap_or_default();
            let pod = table
                .by_container(container)
                .cloned()
                .ok_or(Pass::because("unknown-container"))?;
            let stop = stop.insert(remember(&pod));
            may_hold(agent, &pod)?;
            let verdict = ending(agent, &pod, container, request).await;
            stop.ending = verdict.map_or_else(|no| no.deleting, |_| Some(true));
            let why = verdict.map_err(|no| Pass::not_terminating(no.why))?;
            stop.evidence = Some(why.into());
            tracing::debug!(pod = %pod.name, "terminating: {why}");
            if !runs(&pod, container) {
                return Err(Pass::because(EXITED));
            }
            (pod, Some(Duration::from_millis(*timeout_ms)))
        }
        HeldCall::StopPodSandbox { sandbox } => {
            let table = agent.pods.fresh(REFRESH_WITHIN).await.unwrap_or_default();
            let pod = table
                .by_sandbox(sandbox)
                .cloned()
                .ok_or(Pass::because("unknown-sandbox"))?;
            let stop = stop.insert(remember(&pod));
            may_hold(agent, &pod)?;
            let drains = in_drain(agent, &pod) && has_flows(agent, &pod).await;
            let why = sandbox_ends(&pod, drains).ok_or(Pass::because("nothing-runs"))?;
            stop.ending = Some(true);
            stop.evidence = Some(why.name().into());
            // For the grace period, which is the deletion's if there is one: its news may be on the way.
            agent.kube.is_deleting(&pod, LONGEST_WAIT).await;
            let grace = agent.grace_of(&pod);
            (pod, grace)
        }
    };
    let (policy, warnings) = agent.policy_of(&pod);
    Ok(HoldOrder {
        deleted: agent.deletion_of(&pod.name.uid).map(|d| d.seen),
        pod,
        policy,
        warnings,
        grace,
        patience: request.caller_patience_ms.map(Duration::from_millis),
    })
}

/// A stop that is not known to be its pod's end.
#[derive(Clone, Copy)]
struct NotEnding {
    why: &'static str,
    deleting: Option<bool>,
}

/// By what the stop of a container is known to be its pod's end.
async fn ending(
    agent: &Agent,
    pod: &Pod,
    container: &ContainerId,
    request: &HoldRequest,
) -> Result<&'static str, NotEnding> {
    // The agent that held it knew, and what it knew by may be gone: the stops of the others, a wait.
    if request.resumed {
        return Ok("resumed");
    }
    let deleting = agent.kube.is_deleting(pod, LONGEST_WAIT).await;
    let evidence = || Evidence {
        deleting,
        prestop_wait: in_drain(agent, pod),
    };
    let verdict = agent.judge.is_end(pod, container, evidence).await;
    verdict.map_err(|why| NotEnding { why, deleting })
}

fn may_hold(agent: &Agent, pod: &Pod) -> Result<(), Pass> {
    let (policy, _) = agent.policy_of(pod);
    policy
        .enabled
        .then_some(())
        .ok_or(Pass::because("drain-off"))
}

fn in_drain(agent: &Agent, pod: &Pod) -> bool {
    let view = agent.drains.view();
    let view = view.borrow();
    view.active.iter().any(|r| r.pod.uid == pod.name.uid)
}

/// Whether there are flows that hold a drain. What can't be seen is not waited for by a pod in which nothing runs.
async fn has_flows(agent: &Agent, pod: &Pod) -> bool {
    let flows = agent.snapshot(pod).await;
    flows.is_ok_and(|flows| flows.holding().next().is_some())
}

fn runs(pod: &Pod, container: &ContainerId) -> bool {
    pod.containers
        .iter()
        .any(|c| c.id == *container && c.running)
}

/// Ends when what the call is to stop has ended by itself: its container does not run any more, or its pod is gone,
/// or nothing runs in its sandbox and no flow is left there. As of the looks at the runtime that others make, at its
/// word, so at once where it tells.
async fn exited(agent: &Agent, call: &HeldCall) {
    let mut looks = agent.pods.subscribe();
    loop {
        let table = Arc::clone(&looks.borrow_and_update());
        let goes_on = match call {
            HeldCall::StopContainer { container, .. } => table
                .by_container(container)
                .is_some_and(|pod| runs(pod, container)),
            HeldCall::StopPodSandbox { sandbox } => match table.by_sandbox(sandbox) {
                Some(pod) => {
                    pod.containers.iter().any(|c| c.running) || has_flows(agent, pod).await
                }
                None => false,
            },
        };
        if !goes_on {
            return;
        }
        if looks.changed().await.is_err() {
            // Nobody looks any more: the agent stops, and its holds end with it.
            std::future::pending().await
        }
    }
}

async fn hold(
    agent: &Agent,
    call: &HeldCall,
    order: HoldOrder,
    stop: Option<StopView>,
    to: &mpsc::Sender<HoldMessage>,
) -> HoldMessage {
    let began = BootTime::now();
    let pod = order.pod.name.uid.clone();
    let extended = order.policy.extend;
    let hold = agent.drains.hold(order).await;
    let deadline_ms = millis(hold.deadline().since(began));
    let judgement = stop.map(|stop| {
        agent.judgements.remember(StopView {
            held: true,
            deadline_ms: Some(deadline_ms),
            ..stop
        })
    });
    let holding = HoldMessage::Holding {
        pod,
        deadline_ms,
        reserve_ms: millis(hold.reserve()),
        extended,
    };
    let _ = to.send(holding).await;
    let (end, message) = tokio::select! {
        // A drain that is over says more.
        biased;
        report = hold.released() => {
            let reason = report.reason.unwrap_or(ReleaseReason::Shutdown);
            let held_ms = millis(BootTime::now().since(began));
            (reason.name(), HoldMessage::Release { reason, held_ms })
        }
        () = exited(agent, call) => {
            tracing::info!(?call, "not held any longer: {EXITED}");
            (EXITED, HoldMessage::Pass { why: EXITED.into() })
        }
    };
    if let Some(judgement) = judgement {
        let held_ms = millis(BootTime::now().since(began));
        agent.judgements.released(judgement, end, held_ms);
    }
    message
}
