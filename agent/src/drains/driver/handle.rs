//! The handle by which servers reach the driver: orders in, holds and views out.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use ebb_core::{
    clock::{BootTime, millis},
    drain_report::{DeadlineCause, Phase, ReleaseReason, Report},
    ids::PodUid,
    machine::Deadline,
    notification::Notified,
    pod_end::PodEnd,
    policy::{CallLimits, DEFAULT_GRACE, DrainMode, Policy},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::DrainId;
use crate::pods::{Pod, kube::Deletion, peer_names::PeerNames};

/// Asks to hold a pod's stop until the pod has drained.
#[derive(Clone, Debug)]
pub struct HoldOrder {
    /// The pod whose stop is held.
    pub pod: Arc<Pod>,
    /// Its policy. A hold that joins a drain takes that drain's policy instead.
    pub policy: Policy,
    /// Errors in its policy: annotations that ebb could not apply.
    pub warnings: Vec<String>,
    /// What is left of its grace period, where that is known.
    pub grace: Option<Duration>,
    /// How long the caller waits for its answer, if it has a deadline.
    pub rpc_timeout: Option<Duration>,
    /// The pod's deletion, if the API server has reported one.
    pub deletion: Option<Deletion>,
    /// The runtime has just listed the pod's containers. Those of an older list show nothing about its end.
    pub is_listed: bool,
    /// It holds a call to the runtime, and not only a preStop wait.
    pub is_stop: bool,
    /// The API server says that the pod is not being deleted: if this is a wait, it is for the restart of a container,
    /// or an operator's.
    pub is_not_deleted: bool,
    /// The API server has not answered whether the pod is being deleted: it may live on.
    pub is_unanswered: bool,
    /// The trace that the call belongs to (`traceparent` of W3C Trace Context).
    pub traceparent: Option<String>,
}

impl HoldOrder {
    /// The limits of the call.
    pub const fn limits(&self) -> CallLimits {
        CallLimits {
            grace: self.grace,
            rpc_timeout: self.rpc_timeout,
        }
    }

    /// Its facts about the pod's end.
    pub(super) fn end(&self) -> PodEnd {
        let containers = self.pod.containers.iter();
        let running = containers.filter(|c| c.running && self.is_listed);
        PodEnd {
            sandbox: Some(self.pod.sandbox.clone()),
            containers: running.map(|c| c.id.clone()).collect(),
            is_stop: self.is_stop,
            deleted: self.deletion.map(|deletion| deletion.seen),
            is_not_deleted: self.is_not_deleted,
        }
    }

    /// The part of the grace period that is left to the application.
    pub fn reserve(&self) -> Duration {
        self.policy
            .effective_reserve(self.grace.unwrap_or(DEFAULT_GRACE))
    }
}

/// All drains of the node at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DrainsView {
    /// Grows by one with each change.
    pub version: u64,
    /// The moment of this view.
    pub at: BootTime,
    /// Drains under way, oldest first. Their `held_ms` is of the moment of this view.
    pub active: Vec<Report>,
    /// Drains that are over, newest first.
    pub finished: Vec<Arc<Report>>,
    /// Why no pod can be watched any more, if that is so.
    pub blind: Option<String>,
}

impl DrainsView {
    /// The drains under way, oldest first, with the time that they have been held at `now`.
    pub fn under_way(&self, now: BootTime) -> impl Iterator<Item = Report> {
        let since = millis(now.since(self.at));
        self.active.iter().map(move |report| Report {
            held_ms: report.held_ms + since,
            ..report.clone()
        })
    }
}

/// Commands from the handles to the driver.
#[derive(Debug)]
pub(super) enum Command {
    Hold(Box<HoldOrder>, oneshot::Sender<Joined>),
    GiveUp(DrainId),
    Release(PodUid, oneshot::Sender<Option<Arc<Report>>>),
    Limit(PodUid, Deadline),
    Deletion(PodUid, Deletion),
    /// The pod does not terminate.
    NotTerminating(PodUid),
    /// The pod's containers have exited, at these moments.
    Exited(PodUid, Vec<BootTime>),
    /// Reports of earlier agents, newest first.
    Restore(Vec<Arc<Report>>),
    /// The pods that the runtime lists.
    Listed(HashSet<PodUid>, PeerNames),
    Shutdown,
}

/// The driver's answer to a [`HoldOrder`].
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) place: Place,
    pub(super) state: watch::Receiver<HoldState>,
}

/// A hold's place in a drain, counted for as long as it lives.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) drain: DrainId,
    pub(super) commands: Option<mpsc::UnboundedSender<Command>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(Command::GiveUp(self.drain));
        }
    }
}

/// What all holds of a drain share.
#[derive(Clone, Debug)]
pub(super) struct HoldState {
    pub(super) deadline: BootTime,
    /// The first dump is over, or there is none.
    pub(super) has_read: bool,
    pub(super) report: Option<Arc<Report>>,
}

/// Reaches the drains of this node.
#[derive(Clone, Debug)]
pub struct DrainHandle {
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) view: watch::Receiver<Arc<DrainsView>>,
    /// Cancelled when the agent stops.
    pub(super) stopping: CancellationToken,
}

impl DrainHandle {
    /// Starts a drain, or joins the one that the pod is in or has been through. If the driver is gone, the hold is
    /// released already, with reason `shutdown`.
    pub async fn hold(&self, order: HoldOrder) -> Hold {
        let reserve = order.reserve();
        let orphaned = orphaned(&order);
        let (answer, joined) = oneshot::channel();
        // A driver that has ended drops the sender, so the answer is an error.
        let _ = self.commands.send(Command::Hold(Box::new(order), answer));
        match joined.await {
            Ok(Joined { place, state }) => Hold {
                place: Some(place),
                state,
                reserve,
                orphaned,
            },
            Err(_) => {
                let (_, state) = watch::channel(HoldState {
                    deadline: BootTime::now(),
                    has_read: true,
                    report: None,
                });
                Hold {
                    place: None,
                    state,
                    reserve,
                    orphaned,
                }
            }
        }
    }

    /// Releases a pod's holds with reason `manual`. Returns the drain's report, or `None` if the pod is in no drain.
    pub async fn release(&self, pod: &PodUid) -> Option<Arc<Report>> {
        let (answer, released) = oneshot::channel();
        let _ = self.commands.send(Command::Release(pod.clone(), answer));
        released.await.unwrap_or_default()
    }

    /// Makes this the deadline of a pod's drain, if it is earlier than the drain's own. No effect without a drain.
    pub fn limit(&self, pod: &PodUid, deadline: Deadline) {
        let _ = self.commands.send(Command::Limit(pod.clone(), deadline));
    }

    /// The API server has reported this deletion of a pod. If its grace period is shorter than the one that the pod's
    /// drain knows, the drain's deadline becomes earlier.
    pub fn deletion(&self, pod: &PodUid, deletion: Deletion) {
        let _ = self.commands.send(Command::Deletion(pod.clone(), deletion));
    }

    /// Ends a pod's drain, because the pod does not terminate. No effect if a stop of the pod is held, or if the API
    /// server has reported its deletion meanwhile.
    pub fn not_terminating(&self, pod: &PodUid) {
        let _ = self.commands.send(Command::NotTerminating(pod.clone()));
    }

    /// The containers of a pod have exited at these moments, which ends its drain if that is only observed.
    pub fn exited(&self, pod: &PodUid, exits: Vec<BootTime>) {
        let _ = self.commands.send(Command::Exited(pod.clone(), exits));
    }

    /// Adds the reports of drains that earlier agents have finished, newest first.
    pub fn restore(&self, earlier: Vec<Arc<Report>>) {
        let _ = self.commands.send(Command::Restore(earlier));
    }

    /// Removes the beginnings of drains of all pods that are not among these, which the runtime lists. Reports name their
    /// peers by `names`.
    pub(crate) fn pods_listed(&self, listed: HashSet<PodUid>, names: PeerNames) {
        let _ = self.commands.send(Command::Listed(listed, names));
    }

    /// Releases all holds with reason `shutdown` and ends the driver. Later holds are released at once.
    pub fn shutdown(&self) {
        self.stopping.cancel();
        let _ = self.commands.send(Command::Shutdown);
    }

    /// Waits for [`Self::shutdown`].
    pub async fn stopping(&self) {
        self.stopping.cancelled().await;
    }

    /// Whether [`Self::shutdown`] was called.
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Whether drains can go on as they should.
    ///
    /// # Errors
    ///
    /// Why not, on one line: the driver has ended, or no events of the kernel arrive any more. Only a restart helps.
    pub fn health(&self) -> Result<(), String> {
        if self.commands.is_closed() {
            return Err("the task that owns the drains has ended; restart the agent".into());
        }
        self.view.borrow().blind.clone().map_or(Ok(()), Err)
    }

    /// The newest view, and each that follows.
    pub fn view(&self) -> watch::Receiver<Arc<DrainsView>> {
        self.view.clone()
    }
}

/// A call or request that ebb holds. Dropping it gives the hold up; the drain continues.
#[derive(Debug)]
pub struct Hold {
    place: Option<Place>,
    state: watch::Receiver<HoldState>,
    reserve: Duration,
    /// The report if the driver ends without one.
    orphaned: Arc<Report>,
}

impl Hold {
    /// Whether a drain took the hold. If not, the driver was gone, and the hold is released already.
    pub const fn was_taken(&self) -> bool {
        self.place.is_some()
    }

    /// The latest moment of release, as of now: another hold may have brought it forward.
    pub fn deadline(&self) -> BootTime {
        self.state.borrow().deadline
    }

    /// The part of the hold's grace period that is left to the application.
    pub fn reserve(&self) -> Duration {
        self.reserve
    }

    /// Waits until the drain's first dump is over.
    pub async fn first_dump(&self) {
        let mut state = self.state.clone();
        let is_read = |s: &HoldState| s.has_read || s.report.is_some();
        // A driver that has ended dumps no more.
        let _ = state.wait_for(is_read).await;
    }

    /// Waits for the release, and returns the drain's final report. May be called again. If the driver has ended, the
    /// reason is `shutdown`.
    pub async fn released(&self) -> Arc<Report> {
        let mut state = self.state.clone();
        let report = state
            .wait_for(|s| s.report.is_some())
            .await
            .ok()
            .and_then(|s| s.report.clone());
        report.unwrap_or_else(|| self.orphaned.clone())
    }
}

/// The report of a drain whose driver has ended.
fn orphaned(order: &HoldOrder) -> Arc<Report> {
    Arc::new(Report {
        pod: order.pod.name.clone(),
        workload: order.pod.workload.clone(),
        started_at: BootTime::now().rfc3339(),
        observed: order.policy.drain == DrainMode::Observe,
        traceparent: order.traceparent.clone(),
        phase: Phase::Released,
        reason: Some(ReleaseReason::Shutdown),
        detail: Some("the agent stopped holding".to_owned()),
        until: order.policy.until,
        held_ms: 0,
        deadline_ms: 0,
        deadline_cause: DeadlineCause::default(),
        holds: 0,
        flows_at_start: None,
        flows_now: None,
        changes: vec![],
        arrived: None,
        ended: None,
        idle_closed: 0,
        cut: vec![],
        cut_total: None,
        late_peers: vec![],
        still_arriving: false,
        settle: None,
        settled_ms: None,
        release_lag_us: None,
        released_by: None,
        dumps_ended: 0,
        dumps: BTreeMap::new(),
        lookups: 0,
        notified: Notified::NOTHING,
        warnings: order.warnings.clone(),
    })
}
