//! What becomes known of a pod's end during its drain.

use ebb_core::{
    clock::BootTime,
    drain_report::{DeadlineCause, ReleaseReason},
    ids::PodUid,
    machine::{Deadline, Event},
    pod_end::PodEnd,
    policy::{CallLimits, HoldLimit, IdleFlows},
};

use super::{Drains, Kernel, active::DrainId};
use crate::pods::kube::Deletion;

impl<K: Kernel> Drains<K> {
    /// Makes a drain's deadline earlier.
    pub(super) fn limit(&mut self, id: DrainId, limit: Deadline) {
        self.step(id, Event::Limit(limit));
        self.remember(id);
    }

    /// The API server has reported a deletion. If its grace period is shorter than the one that the drain knows, the
    /// drain's deadline becomes earlier.
    ///
    /// `deletion` may be from the first list of an agent, and then counts from the first delete.
    pub(super) fn deletion(&mut self, uid: &PodUid, deletion: Deletion) {
        let now = BootTime::now();
        let Some(id) = self.active.of_pod(uid) else {
            return;
        };
        let Some(active) = self.active.get_mut(id) else {
            return;
        };
        let deleted = PodEnd {
            deleted: Some(deletion.seen),
            ..active.end.clone()
        };
        // A drain for the restart of a container ends when the first hold of the deletion comes.
        if !active.beginning().includes(&deleted, now) {
            return;
        }
        active.end = deleted;
        self.end_changed(id);
        let (Some(grace), Some(active)) = (deletion.grace, self.active.get_mut(id)) else {
            return;
        };
        // Without an earlier report, the drain counts on what the first hold knew. That is no more than the grace period of
        // its deletion, so a report of the same deletion that comes late is not shorter.
        let known = active.deletion_grace.or(active.first_grace);
        let is_shorter = known.is_none_or(|known| grace < known);
        // The kubelet gives a stop no more than the grace period, so this delete came after the stop.
        let is_second = active.deletion_grace.is_none() && active.end.is_stop;
        let left = if is_second {
            Some(grace)
        } else {
            deletion.left(now)
        };
        active.deletion_grace = Some(grace);
        if let Some(left) = left.filter(|_| is_shorter) {
            let limits = CallLimits {
                grace: Some(left),
                rpc_timeout: None,
            };
            let limit = HoldLimit {
                cause: DeadlineCause::ShorterGrace,
                ..active.machine.policy().deadline(limits)
            };
            self.step(id, Event::Limit(Deadline::of(now, limit)));
        }
        self.remember(id);
    }

    /// A preStop wait ran for the restart of a container, or by hand.
    pub(super) fn not_terminating(&mut self, uid: &PodUid) {
        if let Some(id) = self.active.of_pod(uid)
            && let Some(active) = self.active.get_mut(id)
            && !active.end.is_final()
        {
            active.end.is_not_deleted = true;
            self.step(id, Event::Release(ReleaseReason::NotTerminating));
        }
    }

    /// Tells the machine how certain the pod's end is. Only while it is certain and held may the machine send
    /// notifications. While the pod may live on, the machine closes no idle flow.
    pub(super) fn end_changed(&mut self, id: DrainId) {
        let Some(active) = self.active.get(id) else {
            return;
        };
        let policy = active.machine.policy();
        let (notifies, closes) = (policy.notifies(), policy.idle_flows == IdleFlows::Close);
        let is_stopping = active.end.is_final() && active.holds > 0;
        let may_live_on = active.may_live_on();
        if closes {
            self.step(id, Event::MayLiveOn(may_live_on));
        }
        if notifies {
            self.step(id, Event::Stopping(is_stopping));
        }
    }
}
