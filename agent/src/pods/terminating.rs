//! Is this StopContainer part of the pod's end, or of a container's restart? Pure: evidence and time are
//! passed in.
//!
//! The CRI does not say why a container is stopped. A pod's end is held, a restart (liveness, startup
//! probe, changed definition) never is: it would block the pod's worker in the kubelet, a later deletion
//! included. The evidence, in order of weight:
//!
//! 1. The API server says that the pod is being deleted.
//! 2. The kubelet has called StopPodSandbox for it, which is the pod's end whatever the API server says of it
//!    ([`sandbox_ends`]). Or, where the API server says nothing, a preStop wait of the
//!    pod is in progress, which is what the pod asked for.
//! 3. Else: the kubelet stops all containers of a pod at once (`killContainersWithSyncResult`,
//!    `pkg/kubelet/kuberuntime/kuberuntime_container.go`). When all that run are asked to stop within
//!    [`TOGETHER`], and they are two at least, it is the end. Their calls arrive one by one, so the first
//!    ones have to wait for the rest. Where the API server says that the pod is not being deleted, this is how an
//!    eviction or the node's shutdown looks, which set no deletionTimestamp; then all of them have to run still,
//!    since the restart of several containers stops them one after the other (`SyncPod`,
//!    `pkg/kubelet/kuberuntime/kuberuntime_manager.go`).
//! 4. A pod of one running container can't be told: not held, unless `hold_unknown` is set and there is no API
//!    server to say that it is not being deleted.
//!
//! It errs towards not holding. Sidecars (restartable init containers) are stopped after the main
//! containers, so rule 3 does not see the end of a pod that has them.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use super::Pod;
use crate::{
    clock::BootTime,
    ids::{ContainerId, SandboxId},
};

/// How far apart the stops of one pod's containers may be.
pub const TOGETHER: Duration = Duration::from_secs(1);

/// For how long a stop is remembered. The kubelet retries a failed one after 10 to 15 s.
pub const REMEMBERED: Duration = Duration::from_secs(60);

/// What is known of the pod besides the stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Whether it is being deleted, by the API server; `None` if that is not known.
    pub deleting: Option<bool>,
    /// A preStop wait of it is in progress.
    pub prestop_wait: bool,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is part of the pod's end.
    Yes(YesWhy),
    /// It is not, or nobody can tell.
    No(NoWhy),
    /// Ask again when another container of the pod is to be stopped, or its sandbox, and at this moment
    /// at the latest.
    WaitUntil(BootTime),
}

/// Why a stop is part of the pod's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum YesWhy {
    /// The pod has a deletionTimestamp, or is gone from the API server.
    Deleting,
    /// A preStop wait is in progress.
    PrestopWait,
    /// Its sandbox is being stopped.
    SandboxStop,
    /// All its containers are being stopped.
    AllContainers,
    /// It can't be told, and `hold_unknown` says to hold.
    HoldUnknown,
}

/// Why a stop is not held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoWhy {
    /// The API server says that the pod is not being deleted.
    NotDeleting,
    /// Other containers of the pod go on.
    OthersRun,
    /// It is the pod's only running container, so it may be a restart.
    OnlyContainer,
}

impl YesWhy {
    /// For logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deleting => "deleting",
            Self::PrestopWait => "prestop-wait",
            Self::SandboxStop => "sandbox-stop",
            Self::AllContainers => "all-containers",
            Self::HoldUnknown => "hold-unknown",
        }
    }
}

impl NoWhy {
    /// For logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotDeleting => "not-deleting",
            Self::OthersRun => "others-run",
            Self::OnlyContainer => "only-container",
        }
    }
}

/// What a StopPodSandbox of the pod ends, if it is to be held: a sandbox is stopped for no other reason than its pod's
/// end, eviction and the node's shutdown included, which set no deletionTimestamp. `None` if there is nothing to
/// wait for: nothing runs in it. What is in a drain may have flows all the same, of a process of somebody else's or
/// with bytes that are not sent yet.
pub fn sandbox_ends(pod: &Pod, drains_flows: bool) -> Option<YesWhy> {
    (drains_flows || pod.containers.iter().any(|c| c.running)).then_some(YesWhy::SandboxStop)
}

/// Remembers the recent stops of each pod, and judges.
#[derive(Debug)]
pub struct StopWatch {
    hold_unknown: bool,
    stops: HashMap<ContainerId, BootTime>,
    sandboxes: HashMap<SandboxId, BootTime>,
}

impl StopWatch {
    /// `hold_unknown`: hold also where nobody can tell.
    pub fn new(hold_unknown: bool) -> Self {
        Self {
            hold_unknown,
            stops: HashMap::new(),
            sandboxes: HashMap::new(),
        }
    }

    /// StopContainer was called at `arrived`: whoever waits for a verdict on this pod should ask again. To be told
    /// before anything is waited for, since how far apart the calls are is counted from here.
    pub fn stop_requested(&mut self, container: &ContainerId, arrived: BootTime) {
        self.forget(arrived);
        self.stops.insert(container.clone(), arrived);
    }

    /// StopPodSandbox was called: whoever waits for a verdict on this pod should ask again.
    pub fn sandbox_stop_requested(&mut self, sandbox: &SandboxId, now: BootTime) {
        self.forget(now);
        self.sandboxes.insert(sandbox.clone(), now);
    }

    /// Whether a stop that was requested is part of its pod's end. `pod` should be fresh: which containers run
    /// matters. May be asked again.
    pub fn ask(
        &mut self,
        pod: &Pod,
        container: &ContainerId,
        evidence: Evidence,
        now: BootTime,
    ) -> Verdict {
        self.forget(now);
        self.judge(pod, container, evidence, now)
    }

    fn judge(
        &self,
        pod: &Pod,
        container: &ContainerId,
        evidence: Evidence,
        now: BootTime,
    ) -> Verdict {
        if evidence.deleting == Some(true) {
            return Verdict::Yes(YesWhy::Deleting);
        }
        let denied = evidence.deleting == Some(false);
        match self.judge_by_stops(pod, container, denied, now) {
            by_stops @ Verdict::Yes(YesWhy::SandboxStop | YesWhy::AllContainers) => by_stops,
            // The stops say nothing, or not yet.
            _ if evidence.prestop_wait && !denied => Verdict::Yes(YesWhy::PrestopWait),
            by_stops => by_stops,
        }
    }

    fn judge_by_stops(
        &self,
        pod: &Pod,
        container: &ContainerId,
        denied: bool,
        now: BootTime,
    ) -> Verdict {
        let no = |why| Verdict::No(if denied { NoWhy::NotDeleting } else { why });
        if self.sandboxes.contains_key(&pod.sandbox) {
            return Verdict::Yes(YesWhy::SandboxStop);
        }
        let Some(&asked) = self.stops.get(container) else {
            // Forgotten: it has waited long enough.
            return no(NoWhy::OthersRun);
        };
        let is_near = |at: &BootTime| at.since(asked).max(asked.since(*at)) <= TOGETHER;
        let together: HashSet<&ContainerId> = pod
            .containers
            .iter()
            .map(|c| &c.id)
            .filter(|id| self.stops.get(id).is_some_and(is_near))
            .collect();
        let running = || pod.containers.iter().filter(|c| c.running).map(|c| &c.id);
        // One that stopped quickly does not run any more, and still was one of several. By name: a restarted
        // container and the one it replaces are not two.
        let name = |id: &ContainerId| pod.containers.iter().find(|c| c.id == *id).map(|c| &c.name);
        let involved = running()
            .chain(together.iter().copied())
            .filter_map(name)
            .collect::<HashSet<_>>()
            .len();
        if involved < 2 {
            return match self.hold_unknown && !denied {
                true => Verdict::Yes(YesWhy::HoldUnknown),
                false => no(NoWhy::OnlyContainer),
            };
        }
        let all_run = || running().filter(|id| together.contains(id)).count() == together.len();
        if running().all(|id| together.contains(id)) && (!denied || all_run()) {
            return Verdict::Yes(YesWhy::AllContainers);
        }
        let patience = asked + TOGETHER;
        if now < patience {
            Verdict::WaitUntil(patience)
        } else {
            no(NoWhy::OthersRun)
        }
    }

    fn forget(&mut self, now: BootTime) {
        self.sandboxes.retain(|_, at| now.since(*at) < REMEMBERED);
        self.stops.retain(|_, at| now.since(*at) < REMEMBERED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::table::tests::pod;

    const NOTHING: Evidence = Evidence {
        deleting: None,
        prestop_wait: false,
    };

    fn at(ms: u64) -> BootTime {
        BootTime::from_nanos((100_000 + ms) * 1_000_000)
    }

    fn id(id: &str) -> ContainerId {
        ContainerId::new(id)
    }

    /// A stop that is asked about as soon as it arrives.
    fn requested(
        stops: &mut StopWatch,
        pod: &Pod,
        container: &ContainerId,
        evidence: Evidence,
        now: BootTime,
    ) -> Verdict {
        stops.stop_requested(container, now);
        stops.ask(pod, container, evidence, now)
    }

    fn exited(mut pod: Pod, id: &str) -> Pod {
        pod.containers
            .iter_mut()
            .filter(|c| c.id.as_str() == id)
            .for_each(|c| c.running = false);
        pod
    }

    #[test]
    fn the_api_servers_word_goes_before_all_other_evidence() {
        let pod = pod("u1", "web", &["a"]);
        let mut stops = StopWatch::new(true);
        let mut ask = |deleting| {
            let evidence = Evidence {
                deleting: Some(deleting),
                prestop_wait: true,
            };
            requested(&mut stops, &pod, &id("a"), evidence, at(0))
        };
        assert_eq!(ask(true), Verdict::Yes(YesWhy::Deleting));
        assert_eq!(ask(false), Verdict::No(NoWhy::NotDeleting));
    }

    const DENIED: Evidence = Evidence {
        deleting: Some(false),
        prestop_wait: false,
    };

    #[test]
    fn containers_that_stop_together_are_the_end_of_a_pod_that_nobody_deletes() {
        let pod = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(false);
        let first = requested(&mut stops, &pod, &id("a"), DENIED, at(0));
        assert_eq!(first, Verdict::WaitUntil(at(1000)));
        let second = requested(&mut stops, &pod, &id("b"), DENIED, at(4));
        assert_eq!(second, Verdict::Yes(YesWhy::AllContainers));
        let first = stops.ask(&pod, &id("a"), DENIED, at(4));
        assert_eq!(first, Verdict::Yes(YesWhy::AllContainers));
    }

    #[test]
    fn containers_that_are_restarted_one_after_the_other_are_not() {
        let both = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(true);
        requested(&mut stops, &both, &id("a"), DENIED, at(0));
        let rest = exited(both, "a");
        let second = requested(&mut stops, &rest, &id("b"), DENIED, at(500));
        assert_eq!(second, Verdict::WaitUntil(at(1500)));
        let second = stops.ask(&rest, &id("b"), DENIED, at(1500));
        assert_eq!(second, Verdict::No(NoWhy::NotDeleting));
    }

    #[test]
    fn a_sandbox_that_is_stopped_is_the_end_of_a_pod_that_nobody_deletes() {
        let pod = pod("u1", "web", &["a"]);
        let mut stops = StopWatch::new(false);
        stops.sandbox_stop_requested(&pod.sandbox, at(0));
        let verdict = requested(&mut stops, &pod, &id("a"), DENIED, at(10));
        assert_eq!(verdict, Verdict::Yes(YesWhy::SandboxStop));
    }

    #[test]
    fn a_prestop_wait_in_progress_is_the_end() {
        let pod = pod("u1", "web", &["a", "b"]);
        let evidence = Evidence {
            prestop_wait: true,
            ..NOTHING
        };
        let verdict = requested(&mut StopWatch::new(false), &pod, &id("a"), evidence, at(0));
        assert_eq!(verdict, Verdict::Yes(YesWhy::PrestopWait));
    }

    #[test]
    fn stops_of_all_containers_say_more_than_the_drain_that_the_first_of_them_began() {
        let pod = pod("u1", "web", &["a", "b"]);
        let evidence = Evidence {
            prestop_wait: true,
            ..NOTHING
        };
        let mut stops = StopWatch::new(false);
        stops.stop_requested(&id("a"), at(0));
        stops.stop_requested(&id("b"), at(1));
        let verdict = stops.ask(&pod, &id("b"), evidence, at(2));
        assert_eq!(verdict, Verdict::Yes(YesWhy::AllContainers));
    }

    #[test]
    fn a_sandbox_being_stopped_is_the_end_of_its_own_pod_only() {
        let (mine, other) = (pod("u1", "web", &["a"]), pod("u2", "db", &["x"]));
        let mut stops = StopWatch::new(false);
        stops.sandbox_stop_requested(&mine.sandbox, at(0));
        let verdict = requested(&mut stops, &mine, &id("a"), NOTHING, at(10));
        assert_eq!(verdict, Verdict::Yes(YesWhy::SandboxStop));
        let verdict = requested(&mut stops, &other, &id("x"), NOTHING, at(10));
        assert_eq!(verdict, Verdict::No(NoWhy::OnlyContainer));
    }

    #[test]
    fn a_sandbox_stop_passes_no_hold_of_a_pod_that_nobody_deletes() {
        let both = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(false);
        requested(&mut stops, &both, &id("a"), DENIED, at(0));
        let held = requested(&mut stops, &both, &id("b"), DENIED, at(4));
        assert_eq!(held, Verdict::Yes(YesWhy::AllContainers));
        stops.sandbox_stop_requested(&both.sandbox, at(500));
        assert_eq!(sandbox_ends(&both, true), Some(YesWhy::SandboxStop));
        // Retries of the stops are as little a reason to let go.
        let retried = requested(&mut stops, &both, &id("a"), DENIED, at(30_000));
        assert_eq!(retried, Verdict::Yes(YesWhy::SandboxStop));
    }

    #[test]
    fn a_sandbox_stop_is_held_if_something_runs_or_drains() {
        let runs = pod("u1", "web", &["a"]);
        let ended = exited(runs.clone(), "a");
        assert_eq!(sandbox_ends(&runs, false), Some(YesWhy::SandboxStop));
        assert_eq!(sandbox_ends(&ended, true), Some(YesWhy::SandboxStop));
        assert_eq!(sandbox_ends(&ended, false), None);
    }

    #[test]
    fn all_running_containers_together_are_the_end() {
        let pod = exited(pod("u1", "web", &["a", "b", "done"]), "done");
        let mut stops = StopWatch::new(false);
        let first = requested(&mut stops, &pod, &id("a"), NOTHING, at(0));
        assert_eq!(first, Verdict::WaitUntil(at(1000)));
        let second = requested(&mut stops, &pod, &id("b"), NOTHING, at(4));
        assert_eq!(second, Verdict::Yes(YesWhy::AllContainers));
        let first = stops.ask(&pod, &id("a"), NOTHING, at(4));
        assert_eq!(first, Verdict::Yes(YesWhy::AllContainers));
    }

    #[test]
    fn a_container_that_stops_at_once_does_not_make_the_other_the_only_one() {
        let both = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(false);
        requested(&mut stops, &both, &id("a"), NOTHING, at(0));
        let rest = exited(both, "a");
        let verdict = requested(&mut stops, &rest, &id("b"), NOTHING, at(5));
        assert_eq!(verdict, Verdict::Yes(YesWhy::AllContainers));
    }

    #[test]
    fn a_restarted_container_and_its_successor_are_not_two() {
        let mut pod = exited(pod("u1", "web", &["a1", "a2"]), "a1");
        pod.containers.iter_mut().for_each(|c| c.name = "a".into());
        let mut stops = StopWatch::new(false);
        requested(&mut stops, &pod, &id("a1"), NOTHING, at(0));
        let verdict = requested(&mut stops, &pod, &id("a2"), NOTHING, at(500));
        assert_eq!(verdict, Verdict::No(NoWhy::OnlyContainer));
    }

    #[test]
    fn one_of_several_is_a_restart_after_a_second() {
        let pod = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(true);
        requested(&mut stops, &pod, &id("a"), NOTHING, at(0));
        let early = stops.ask(&pod, &id("a"), NOTHING, at(999));
        assert_eq!(early, Verdict::WaitUntil(at(1000)));
        let late = stops.ask(&pod, &id("a"), NOTHING, at(1000));
        assert_eq!(late, Verdict::No(NoWhy::OthersRun));
        // Too far from the first to be the same event.
        let other = requested(&mut stops, &pod, &id("b"), NOTHING, at(1500));
        assert_eq!(other, Verdict::WaitUntil(at(2500)));
    }

    #[test]
    fn how_far_apart_stops_are_is_counted_from_their_arrival_and_not_from_when_they_are_asked_about()
     {
        let pod = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(false);
        stops.stop_requested(&id("a"), at(0));
        stops.stop_requested(&id("b"), at(900));
        // The runtime and the API server took their time to answer about the one, and none about the other.
        let slow = stops.ask(&pod, &id("a"), NOTHING, at(1300));
        assert_eq!(slow, Verdict::Yes(YesWhy::AllContainers));
        let mut stops = StopWatch::new(false);
        stops.stop_requested(&id("a"), at(0));
        stops.stop_requested(&id("b"), at(1100));
        let slow = stops.ask(&pod, &id("a"), NOTHING, at(1300));
        assert_eq!(slow, Verdict::No(NoWhy::OthersRun));
        // Nobody waits for a second that is over.
        let quick = stops.ask(&pod, &id("b"), NOTHING, at(1300));
        assert_eq!(quick, Verdict::WaitUntil(at(2100)));
    }

    #[test]
    fn a_retry_of_all_counts_anew() {
        let pod = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(false);
        for round in [0, 12_000] {
            let first = requested(&mut stops, &pod, &id("a"), NOTHING, at(round));
            assert_eq!(first, Verdict::WaitUntil(at(round + 1000)));
            let second = requested(&mut stops, &pod, &id("b"), NOTHING, at(round + 3));
            assert_eq!(second, Verdict::Yes(YesWhy::AllContainers));
        }
    }

    #[test]
    fn the_only_container_is_held_only_if_told_to() {
        let pod = exited(pod("u1", "web", &["a", "init"]), "init");
        let ask = |hold_unknown| {
            requested(
                &mut StopWatch::new(hold_unknown),
                &pod,
                &id("a"),
                NOTHING,
                at(0),
            )
        };
        assert_eq!(ask(false), Verdict::No(NoWhy::OnlyContainer));
        assert_eq!(ask(true), Verdict::Yes(YesWhy::HoldUnknown));
    }

    #[test]
    fn stops_are_forgotten_after_a_minute() {
        let mut stops = StopWatch::new(false);
        for n in 0..1000 {
            let pod = pod(&format!("u{n}"), "web", &["a", "b"]);
            requested(&mut stops, &pod, &id("a"), NOTHING, at(n));
            stops.sandbox_stop_requested(&pod.sandbox, at(n));
        }
        let pod = pod("u0", "web", &["a", "b"]);
        let verdict = stops.ask(&pod, &id("a"), NOTHING, at(62_000));
        assert_eq!(verdict, Verdict::No(NoWhy::OthersRun));
        assert!(stops.stops.is_empty() && stops.sandboxes.is_empty());
    }
}
