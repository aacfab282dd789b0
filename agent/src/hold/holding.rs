//! Answering a holder's request (`POST /v1/holds`): is this stop to be held, and for how long?

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::timeout};

use super::wire::{HeldCall, HoldMessage, HoldRequest, ReleaseReason};
use crate::{
    agent::Agent,
    clock::{BootTime, millis},
    drain::driver::HoldOrder,
    pods::{Pod, kube::LONGEST_WAIT, table::PodTable, terminating::Evidence},
};

/// How long a stop waits for the runtime's list of pods. With what [`FIRST_MESSAGE`] leaves for the rest.
///
/// [`FIRST_MESSAGE`]: super::wire::FIRST_MESSAGE
const REFRESH_WITHIN: Duration = Duration::from_millis(500);

/// Answers one request, message by message. Ends early, giving the hold up, when nobody listens any more.
pub async fn answer(agent: Arc<Agent>, request: HoldRequest, to: mpsc::Sender<HoldMessage>) {
    tokio::select! {
        () = to.closed() => {}
        () = decide(&agent, request, &to) => {}
    }
}

async fn decide(agent: &Agent, request: HoldRequest, to: &mpsc::Sender<HoldMessage>) {
    let message = match wanted(agent, &request).await {
        Ok(order) => hold(agent, order, to).await,
        Err(why) => {
            agent.metrics.passed(why);
            tracing::info!(call = ?request.call, "not held: {why}");
            HoldMessage::Pass { why: why.into() }
        }
    };
    // Nobody listens: nobody has to be told.
    let _ = to.send(message).await;
}

/// The hold to order, or why there is none.
async fn wanted(agent: &Agent, request: &HoldRequest) -> Result<HoldOrder, &'static str> {
    let (pod, grace) = match &request.call {
        HeldCall::StopContainer {
            container,
            timeout_ms,
        } => {
            // Which containers run matters, so what was known before will do only if the runtime is away.
            let table = fresh(agent).await;
            let pod = table
                .by_container(container)
                .cloned()
                .ok_or("unknown-container")?;
            may_hold(agent, &pod)?;
            let evidence = Evidence {
                deleting: agent.kube.is_deleting(&pod, LONGEST_WAIT).await,
                prestop_wait: in_drain(agent, &pod),
            };
            let why = agent.judge.is_end(&pod, container, evidence).await?;
            tracing::debug!(pod = %pod.name, "terminating: {why}");
            (pod, Some(Duration::from_millis(*timeout_ms)))
        }
        HeldCall::StopPodSandbox { sandbox } => {
            agent.judge.sandbox_stops(sandbox);
            let table = fresh(agent).await;
            let pod = table
                .by_sandbox(sandbox)
                .cloned()
                .ok_or("unknown-sandbox")?;
            may_hold(agent, &pod)?;
            if !in_drain(agent, &pod) && !pod.containers.iter().any(|c| c.running) {
                return Err("nothing-runs");
            }
            if agent.kube.is_deleting(&pod, LONGEST_WAIT).await == Some(false) {
                return Err("not-deleting");
            }
            let grace = agent.grace_of(&pod);
            (pod, grace)
        }
    };
    let (policy, warnings) = agent.policy_of(&pod);
    Ok(HoldOrder {
        pod,
        policy,
        warnings,
        grace,
        patience: request.caller_patience_ms.map(Duration::from_millis),
    })
}

fn may_hold(agent: &Agent, pod: &Pod) -> Result<(), &'static str> {
    let (policy, _) = agent.policy_of(pod);
    policy.enabled.then_some(()).ok_or("drain-off")
}

fn in_drain(agent: &Agent, pod: &Pod) -> bool {
    let view = agent.drains.view();
    let view = view.borrow();
    view.active.iter().any(|r| r.pod.uid == pod.name.uid)
}

/// The pods as they are now, or as they were last known if the runtime is away or slow: one sandbox that is
/// stuck must not keep all the others from being held.
async fn fresh(agent: &Agent) -> Arc<PodTable> {
    match timeout(REFRESH_WITHIN, agent.pods.refresh()).await {
        Ok(Ok(table)) => table,
        Ok(Err(_)) | Err(_) => agent.pods.latest(),
    }
}

async fn hold(agent: &Agent, order: HoldOrder, to: &mpsc::Sender<HoldMessage>) -> HoldMessage {
    let began = BootTime::now();
    let pod = order.pod.name.uid.clone();
    let hold = agent.drains.hold(order).await;
    let holding = HoldMessage::Holding {
        pod,
        deadline_ms: millis(hold.deadline().since(began)),
        reserve_ms: millis(hold.reserve()),
    };
    let _ = to.send(holding).await;
    let report = hold.released().await;
    HoldMessage::Release {
        reason: report.reason.unwrap_or(ReleaseReason::Shutdown),
        held_ms: millis(BootTime::now().since(began)),
    }
}
