//! The drains under way, and which of them a pod or an event belongs to.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use ebb_core::{
    clock::BootTime,
    ids::{CgroupId, NetnsInode, PodUid, WatchId},
    machine::Machine,
    pod_end::PodEnd,
    policy::DrainMode,
    scope::Scope,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::handle::HoldState;
use crate::{drains::journal::Beginning, kernel::SocketEvent, pods::Pod};

/// Tells a drain from another one of the same pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct DrainId(u64);

/// One drain under way.
pub(super) struct Active {
    pub(super) pod: Arc<Pod>,
    pub(super) machine: Machine,
    /// The known facts about the pod's end.
    pub(super) end: PodEnd,
    /// None of its holds has an answer of the API server whether the pod is being deleted.
    pub(super) is_unanswered: bool,
    /// The grace period of the pod's deletion, if that is known.
    pub(super) deletion_grace: Option<Duration>,
    /// What was left of the grace period when the drain began, by its first hold.
    pub(super) first_grace: Option<Duration>,
    /// The release of the drain that this one continues.
    pub(super) first_released: Option<BootTime>,
    pub(super) holds: u32,
    /// The watch of its events, and how many events of it have been received; `None`: it is not watched.
    pub(super) watch: Option<WatchId>,
    pub(super) received: u64,
    /// How many events must have been received before ebb accepts lookups.
    pub(super) awaited_events: Option<u64>,
    /// How many state changes the kernel had left out when the last dump began.
    pub(super) missed_changes: Option<u64>,
    /// It has been reported that flows still arrive.
    pub(super) reported_blocked: bool,
    /// Cancelled when the drain is over.
    pub(super) over: CancellationToken,
    pub(super) state: watch::Sender<HoldState>,
}

impl Active {
    /// Whether it holds nothing, and is only observed.
    pub(super) fn is_observed(&self) -> bool {
        self.machine.policy().drain == DrainMode::Observe
    }

    /// Whether the pod may live on, because its waits may be for the restart of a container.
    pub(super) fn may_live_on(&self) -> bool {
        !self.end.is_final() && (self.end.is_not_deleted || self.is_unanswered)
    }

    /// Whether all its waits have left, and nothing shows that the pod ends.
    pub(super) fn is_abandoned(&self) -> bool {
        self.holds == 0 && !self.end.is_final()
    }

    /// How many calls and requests it keeps waiting.
    pub(super) fn held_calls(&self) -> u32 {
        if self.is_observed() { 0 } else { self.holds }
    }

    /// The entry of the history while it is under way.
    pub(super) fn beginning(&self) -> Beginning {
        Beginning {
            started: self.machine.started(),
            deadline: self.machine.deadline(),
            released: self.first_released,
            end: self.end.clone(),
            notified: self.machine.notified().clone(),
        }
    }
}

/// All drains under way, oldest first.
#[derive(Default)]
pub(super) struct ActiveDrains {
    drains: BTreeMap<DrainId, Active>,
    by_uid: HashMap<PodUid, DrainId>,
    by_netns: HashMap<NetnsInode, DrainId>,
    by_cgroup: HashMap<CgroupId, DrainId>,
    last: DrainId,
}

impl ActiveDrains {
    /// Adds a drain, which then gets the events of its pod.
    pub(super) fn insert(&mut self, drain: Active) -> DrainId {
        self.last = DrainId(self.last.0 + 1);
        let id = self.last;
        self.by_uid.insert(drain.pod.name.uid.clone(), id);
        match &drain.pod.scope {
            Scope::Netns { inode, .. } => {
                self.by_netns.insert(*inode, id);
            }
            Scope::HostNetwork(cgroups) => self.by_cgroup.extend(cgroups.iter().map(|c| (*c, id))),
            Scope::Untracked(_) => {}
        }
        self.drains.insert(id, drain);
        id
    }

    /// Removes a drain that is over.
    pub(super) fn remove(&mut self, id: DrainId) -> Option<Active> {
        self.by_uid.retain(|_, other| *other != id);
        self.by_netns.retain(|_, other| *other != id);
        self.by_cgroup.retain(|_, other| *other != id);
        self.drains.remove(&id)
    }

    /// The drain of a pod.
    pub(super) fn of_pod(&self, pod: &PodUid) -> Option<DrainId> {
        self.by_uid.get(pod).copied()
    }

    /// The drain that an event belongs to.
    pub(super) fn of_event(&self, event: &SocketEvent) -> Option<DrainId> {
        let by_netns = self.by_netns.get(&event.netns);
        by_netns
            .or_else(|| self.by_cgroup.get(&event.cgroup))
            .copied()
    }

    pub(super) fn get(&self, id: DrainId) -> Option<&Active> {
        self.drains.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: DrainId) -> Option<&mut Active> {
        self.drains.get_mut(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Active> {
        self.drains.values()
    }

    pub(super) fn ids(&self) -> Vec<DrainId> {
        self.drains.keys().copied().collect()
    }
}
