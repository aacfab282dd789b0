//! What the rest of the agent holds of the driver: orders in, holds and views out.

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot, watch};

use super::{DrainId, NEWS_WITHIN};
use crate::{
    clock::{BootTime, millis},
    drain::{
        policy::{CallLimits, DEFAULT_GRACE, Policy},
        report::{Phase, ReleaseReason, Report},
    },
    ids::PodUid,
    pods::Pod,
};

/// A wish to hold a pod's stop until the pod has drained.
#[derive(Clone, Debug)]
pub struct HoldOrder {
    /// The pod.
    pub pod: Arc<Pod>,
    /// Its policy. A hold that joins a drain takes that drain's policy instead.
    pub policy: Policy,
    /// What was wrong with its policy: annotations that could not be obeyed.
    pub warnings: Vec<String>,
    /// What is left of its grace period, where that is known.
    pub grace: Option<Duration>,
    /// How long the caller waits for its answer, if it says.
    pub patience: Option<Duration>,
    /// When the pod's deletion was heard of, if it was: a drain that was over by then was not for that.
    pub deleted: Option<BootTime>,
}

impl HoldOrder {
    /// What the call allows.
    pub const fn limits(&self) -> CallLimits {
        CallLimits {
            grace: self.grace,
            patience: self.patience,
        }
    }

    /// Whether the pod was deleted after `released`.
    pub(super) fn is_of_later_end(&self, released: BootTime) -> bool {
        let deleted = self.deleted;
        deleted.is_some_and(|deleted| released + NEWS_WITHIN < deleted)
    }

    /// What is to be left to the application.
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

/// Something to tell about a drain. Each drain begins once and finishes once, in that order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainNotice {
    /// It began.
    Began(Arc<Report>),
    /// Settle is over, and flows still arrive. Once at most. Its late peers are those who still connect.
    Blocked(Arc<Report>),
    /// It is over.
    Finished(Arc<Report>),
}

/// What the handles say to the driver.
#[derive(Debug)]
pub(super) enum Command {
    Hold(Box<HoldOrder>, oneshot::Sender<Joined>),
    GiveUp(DrainId),
    Release(PodUid, oneshot::Sender<bool>),
    Limit(PodUid, BootTime),
    Shutdown,
}

/// The driver's answer to a [`HoldOrder`].
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) place: Place,
    pub(super) state: watch::Receiver<HoldState>,
}

/// A hold's place in a drain: counted as long as it lives, wherever its caller may have stopped waiting
/// for it.
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
    pub(super) report: Option<Arc<Report>>,
}

/// The way to the drains of this node.
#[derive(Clone, Debug)]
pub struct DrainHandle {
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) view: watch::Receiver<Arc<DrainsView>>,
}

impl DrainHandle {
    /// Begins a drain, or joins the one that the pod is in or has been through. If there is no driver any
    /// more the hold is released already, with reason `shutdown`.
    pub async fn hold(&self, order: HoldOrder) -> Hold {
        let reserve = order.reserve();
        let orphaned = orphaned(&order);
        let (answer, joined) = oneshot::channel();
        // A driver that is gone drops the question, and that is the answer.
        let _ = self.commands.send(Command::Hold(Box::new(order), answer));
        match joined.await {
            Ok(Joined { place, state }) => Hold {
                _place: Some(place),
                state,
                reserve,
                orphaned,
            },
            Err(_) => {
                let (_, state) = watch::channel(HoldState {
                    deadline: BootTime::now(),
                    report: None,
                });
                Hold {
                    _place: None,
                    state,
                    reserve,
                    orphaned,
                }
            }
        }
    }

    /// Releases a pod's holds with reason `manual`. `false` if the pod is in no drain.
    pub async fn release(&self, pod: &PodUid) -> bool {
        let (answer, released) = oneshot::channel();
        let _ = self.commands.send(Command::Release(pod.clone(), answer));
        released.await.unwrap_or(false)
    }

    /// Brings the deadline of a pod's drain forward to this moment, if it is later and the pod is in one.
    pub fn limit(&self, pod: &PodUid, deadline: BootTime) {
        let _ = self.commands.send(Command::Limit(pod.clone(), deadline));
    }

    /// Releases all holds with reason `shutdown` and ends the driver. Later holds are released at once.
    pub fn shutdown(&self) {
        let _ = self.commands.send(Command::Shutdown);
    }

    /// Whether drains can go on as they should.
    ///
    /// # Errors
    ///
    /// Why not, on one line: the driver is gone, or the kernel tells it nothing any more. Neither mends itself.
    pub fn health(&self) -> Result<(), String> {
        if self.commands.is_closed() {
            return Err("nobody holds pods any more".into());
        }
        self.view.borrow().blind.clone().map_or(Ok(()), Err)
    }

    /// The newest view, and word of each that follows.
    pub fn view(&self) -> watch::Receiver<Arc<DrainsView>> {
        self.view.clone()
    }
}

/// A call or request that is being kept waiting. Dropping it gives the hold up; the drain goes on to its
/// own end.
#[derive(Debug)]
pub struct Hold {
    _place: Option<Place>,
    state: watch::Receiver<HoldState>,
    reserve: Duration,
    /// The report if the driver ends without one.
    orphaned: Arc<Report>,
}

impl Hold {
    /// The latest moment of release, as of now: another hold may have brought it forward.
    pub fn deadline(&self) -> BootTime {
        self.state.borrow().deadline
    }

    /// What is to be left to the application of the grace period that the hold was ordered with.
    pub fn reserve(&self) -> Duration {
        self.reserve
    }

    /// Waits for the release, and returns the drain's final report. May be asked again. If the driver is
    /// gone the reason is `shutdown`.
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

/// What is known of a drain whose driver is gone.
fn orphaned(order: &HoldOrder) -> Arc<Report> {
    Arc::new(Report {
        pod: order.pod.name.clone(),
        started_at: super::wall_clock(BootTime::now()),
        phase: Phase::Released,
        reason: Some(ReleaseReason::Shutdown),
        detail: Some("the agent stopped holding".to_owned()),
        until: order.policy.until,
        held_ms: 0,
        deadline_ms: 0,
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
        release_lag_us: None,
        released_by: None,
        walks: 0,
        lookups: 0,
        warnings: order.warnings.clone(),
    })
}
