//! Whether a hold belongs to the same end of a pod as an earlier one, and so to its deadline.
//!
//! The kubelet repeats a StopContainer that failed, for hours if need be, and always gives it the full grace period
//! again. All these calls share one deadline. A preStop wait, on the other hand, also runs for the restart of a
//! container, and the pod's end that may follow has its own deadline.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    clock::BootTime,
    ids::{ContainerId, SandboxId},
};

/// How far the API server's report of a deletion may be behind the first hold that the deletion led to, if the API
/// server said at that hold that the pod is not being deleted.
const REPORTED_WITHIN: Duration = Duration::from_secs(1);

/// What is known of a pod's end when a hold is ordered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodEnd {
    /// The pod's sandbox.
    pub sandbox: Option<SandboxId>,
    /// The pod's containers that run, and of a drain those that ran when it began. Empty if the runtime did not list
    /// them in time.
    pub containers: Vec<ContainerId>,
    /// A call to the runtime is held, and not only a preStop wait.
    pub is_stop: bool,
    /// When the API server reported the pod's deletion, if it did.
    pub deleted: Option<BootTime>,
    /// The API server said that the pod is not being deleted: a wait was for the restart of a container, or by hand.
    /// False also if the API server did not answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_not_deleted: bool,
}

impl PodEnd {
    /// Whether a hold that comes now, with `later`, belongs to the end that a drain is for. `self` is what was known of
    /// that drain, which began at `started`. `is_recent`: the drain is under way or was a moment ago.
    pub fn includes(&self, later: &Self, started: BootTime, is_recent: bool) -> bool {
        let same_sandbox = self.sandbox == later.sandbox;
        let known = |id: &ContainerId| self.containers.contains(id);
        // The same containers are being stopped, again or still.
        if self.is_stop && later.is_stop && same_sandbox && later.containers.iter().any(known) {
            return true;
        }
        match (self.deleted, later.deleted) {
            // A pod is deleted once.
            (Some(_), _) => true,
            // A drain that began before the deletion was for the restart of a container.
            (None, Some(deleted)) if self.is_not_deleted => {
                started + REPORTED_WITHIN >= deleted && same_sandbox
            }
            // Without an answer, the drain may have begun with the deletion, and the report may come much later.
            (None, _) => {
                let is_unknown = self.containers.is_empty();
                let none_started = is_unknown || later.containers.iter().all(known);
                is_recent && same_sandbox && none_started
            }
        }
    }

    /// Adds the facts of another hold of the same end.
    pub fn add(&mut self, other: Self) {
        self.is_stop |= other.is_stop;
        self.deleted = self.deleted.or(other.deleted);
        self.is_not_deleted |= other.is_not_deleted;
        for id in other.containers {
            if !self.containers.contains(&id) {
                self.containers.push(id);
            }
        }
    }

    /// Whether the drain is kept until the pod is gone, because the kubelet may repeat its calls at any time.
    pub fn is_final(&self) -> bool {
        self.is_stop || self.deleted.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> BootTime {
        BootTime::from_nanos((1000 + seconds) * 1_000_000_000)
    }

    fn end(sandbox: &str, containers: &[&str]) -> PodEnd {
        PodEnd {
            sandbox: Some(SandboxId::new(sandbox)),
            containers: containers.iter().map(|id| ContainerId::new(*id)).collect(),
            ..PodEnd::default()
        }
    }

    fn stop(sandbox: &str, containers: &[&str]) -> PodEnd {
        PodEnd {
            is_stop: true,
            ..end(sandbox, containers)
        }
    }

    /// The API server says that the pod is not being deleted.
    fn restart(end: PodEnd) -> PodEnd {
        PodEnd {
            is_not_deleted: true,
            ..end
        }
    }

    fn deleted(end: PodEnd, seconds: u64) -> PodEnd {
        PodEnd {
            deleted: Some(at(seconds)),
            ..end
        }
    }

    #[test]
    fn a_deletion_is_one_end_however_late_its_calls_are_repeated() {
        let first = deleted(stop("s", &["a"]), 0);
        assert!(first.includes(&deleted(stop("s", &["a"]), 0), at(0), false));
        // Another agent has no answer of the API server.
        assert!(first.includes(&stop("s", &["a"]), at(0), false));
    }

    #[test]
    fn a_wait_that_the_api_server_did_not_answer_is_part_of_a_deletion_that_is_reported_later() {
        let mut wait = end("s", &["a"]);
        assert!(wait.includes(&deleted(stop("s", &["a"]), 30), at(0), true));
        // A container was started since: the wait was for a restart.
        assert!(!wait.includes(&deleted(stop("s", &["a2"]), 30), at(0), true));
        assert!(!wait.includes(&deleted(stop("s2", &["a"]), 30), at(0), true));
        assert!(!wait.includes(&deleted(stop("s", &["a"]), 30), at(0), false));
        // The API server has answered in the meantime.
        wait.add(restart(end("s", &["a"])));
        assert!(!wait.includes(&deleted(stop("s", &["a"]), 30), at(0), true));
    }

    #[test]
    fn without_an_api_server_stops_of_the_same_containers_are_one_end() {
        let first = stop("s", &["a", "b"]);
        assert!(first.includes(&stop("s", &["b"]), at(0), false));
        assert!(!first.includes(&stop("s", &["c"]), at(0), false));
        assert!(!first.includes(&stop("s2", &["a"]), at(0), true));
    }

    #[test]
    fn a_wait_for_a_restart_is_no_part_of_a_deletion_that_comes_later() {
        let restart = restart(end("s", &["a"]));
        // The report came just after the wait.
        assert!(restart.includes(&deleted(stop("s", &["a"]), 1), at(0), false));
        assert!(!restart.includes(&deleted(stop("s", &["a"]), 30), at(0), true));
        assert!(!restart.includes(&deleted(stop("s2", &["a2"]), 0), at(0), true));
        // A wait by hand on a healthy pod, long before its end.
        assert!(!restart.includes(&stop("s", &["a"]), at(0), false));
    }

    #[test]
    fn a_stop_follows_a_prestop_wait_whose_containers_were_not_listed() {
        let mut wait = end("s", &[]);
        assert!(wait.includes(&stop("s", &["a2"]), at(0), true));
        assert!(!wait.includes(&stop("s2", &["a2"]), at(0), true));
        wait.add(stop("s", &["a2"]));
        assert!(!wait.includes(&end("s", &["a3"]), at(0), true));
    }

    #[test]
    fn a_stop_follows_its_prestop_wait_within_a_moment() {
        let mut wait = end("s", &["a"]);
        assert!(wait.includes(&stop("s", &["a"]), at(0), true));
        // A container was started since: the wait was for a restart.
        assert!(!wait.includes(&stop("s", &["a", "a2"]), at(0), true));
        assert!(!wait.is_final());
        wait.add(stop("s", &["a"]));
        assert!(wait.is_final());
        assert!(wait.includes(&stop("s", &["a"]), at(0), false));
    }
}
