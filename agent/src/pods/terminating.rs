//! Is this StopContainer part of the pod's end, or of a container's restart? Pure: evidence and time are
//! passed in.
//!
//! The CRI does not say why a container is stopped. A pod's end is held, a restart (liveness, startup
//! probe, changed definition) never is: it would block the pod's worker in the kubelet, a later deletion
//! included. The evidence, in order of weight:
//!
//! 1. The API server says that the pod is being deleted, or that it is not.
//! 2. Without it: a preStop wait of the pod is in progress, which is what the pod asked for; or the
//!    kubelet has called StopPodSandbox for it.
//! 3. Else: the kubelet stops all containers of a pod at once (`killContainersWithSyncResult`,
//!    `pkg/kubelet/kuberuntime/kuberuntime_container.go`). When all that run are asked to stop within
//!    [`TOGETHER`], and they are two at least, it is the end. Their calls arrive one by one, so the first
//!    ones have to wait for the rest.
//! 4. A pod of one running container can't be told: not held, unless `hold_unknown` is set.
//!
//! It errs towards not holding. Sidecars (restartable init containers) are stopped after the main
//! containers, so rule 3 does not see the end of a pod that has them; nor does rule 1 see evictions and
//! node shutdowns, which set no deletionTimestamp.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use super::Pod;
use crate::{
    clock::BootTime,
    ids::{ContainerId, PodUid, SandboxId},
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

/// Remembers the recent stops of each pod, and judges.
#[derive(Debug)]
pub struct StopWatch {
    hold_unknown: bool,
    stops: HashMap<PodUid, HashMap<ContainerId, BootTime>>,
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

    /// StopContainer was called. `pod` should be fresh: which containers run matters.
    pub fn stop_requested(
        &mut self,
        pod: &Pod,
        container: &ContainerId,
        evidence: Evidence,
        now: BootTime,
    ) -> Verdict {
        self.forget(now);
        self.stops
            .entry(pod.name.uid.clone())
            .or_default()
            .insert(container.clone(), now);
        self.judge(pod, container, evidence, now)
    }

    /// StopPodSandbox was called: whoever waits for a verdict on this pod should ask again.
    pub fn sandbox_stop_requested(&mut self, sandbox: &SandboxId, now: BootTime) {
        self.forget(now);
        self.sandboxes.insert(sandbox.clone(), now);
    }

    /// Asks again about a stop that is waiting. It is not counted as another one.
    pub fn ask_again(
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
        match evidence.deleting {
            Some(true) => return Verdict::Yes(YesWhy::Deleting),
            Some(false) => return Verdict::No(NoWhy::NotDeleting),
            None => {}
        }
        if evidence.prestop_wait {
            return Verdict::Yes(YesWhy::PrestopWait);
        }
        if self.sandboxes.contains_key(&pod.sandbox) {
            return Verdict::Yes(YesWhy::SandboxStop);
        }
        let stops = self.stops.get(&pod.name.uid);
        let Some(&asked) = stops.and_then(|s| s.get(container)) else {
            // Forgotten: it has waited long enough.
            return Verdict::No(NoWhy::OthersRun);
        };
        let together: HashSet<&ContainerId> = stops
            .into_iter()
            .flatten()
            .filter(|(_, at)| at.since(asked).max(asked.since(**at)) <= TOGETHER)
            .map(|(id, _)| id)
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
            return match self.hold_unknown {
                true => Verdict::Yes(YesWhy::HoldUnknown),
                false => Verdict::No(NoWhy::OnlyContainer),
            };
        }
        if running().all(|id| together.contains(id)) {
            return Verdict::Yes(YesWhy::AllContainers);
        }
        let patience = asked + TOGETHER;
        if now < patience {
            Verdict::WaitUntil(patience)
        } else {
            Verdict::No(NoWhy::OthersRun)
        }
    }

    fn forget(&mut self, now: BootTime) {
        self.sandboxes.retain(|_, at| now.since(*at) < REMEMBERED);
        self.stops.retain(|_, stops| {
            stops.retain(|_, at| now.since(*at) < REMEMBERED);
            !stops.is_empty()
        });
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
            stops.stop_requested(&pod, &id("a"), evidence, at(0))
        };
        assert_eq!(ask(true), Verdict::Yes(YesWhy::Deleting));
        assert_eq!(ask(false), Verdict::No(NoWhy::NotDeleting));
    }

    #[test]
    fn a_prestop_wait_in_progress_is_the_end() {
        let pod = pod("u1", "web", &["a", "b"]);
        let evidence = Evidence {
            prestop_wait: true,
            ..NOTHING
        };
        let verdict = StopWatch::new(false).stop_requested(&pod, &id("a"), evidence, at(0));
        assert_eq!(verdict, Verdict::Yes(YesWhy::PrestopWait));
    }

    #[test]
    fn a_sandbox_being_stopped_is_the_end_of_its_own_pod_only() {
        let (mine, other) = (pod("u1", "web", &["a"]), pod("u2", "db", &["x"]));
        let mut stops = StopWatch::new(false);
        stops.sandbox_stop_requested(&mine.sandbox, at(0));
        let verdict = stops.stop_requested(&mine, &id("a"), NOTHING, at(10));
        assert_eq!(verdict, Verdict::Yes(YesWhy::SandboxStop));
        let verdict = stops.stop_requested(&other, &id("x"), NOTHING, at(10));
        assert_eq!(verdict, Verdict::No(NoWhy::OnlyContainer));
    }

    #[test]
    fn all_running_containers_together_are_the_end() {
        let pod = exited(pod("u1", "web", &["a", "b", "done"]), "done");
        let mut stops = StopWatch::new(false);
        let first = stops.stop_requested(&pod, &id("a"), NOTHING, at(0));
        assert_eq!(first, Verdict::WaitUntil(at(1000)));
        let second = stops.stop_requested(&pod, &id("b"), NOTHING, at(4));
        assert_eq!(second, Verdict::Yes(YesWhy::AllContainers));
        let first = stops.ask_again(&pod, &id("a"), NOTHING, at(4));
        assert_eq!(first, Verdict::Yes(YesWhy::AllContainers));
    }

    #[test]
    fn a_container_that_stops_at_once_does_not_make_the_other_the_only_one() {
        let both = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(false);
        stops.stop_requested(&both, &id("a"), NOTHING, at(0));
        let rest = exited(both, "a");
        let verdict = stops.stop_requested(&rest, &id("b"), NOTHING, at(5));
        assert_eq!(verdict, Verdict::Yes(YesWhy::AllContainers));
    }

    #[test]
    fn a_restarted_container_and_its_successor_are_not_two() {
        let mut pod = exited(pod("u1", "web", &["a1", "a2"]), "a1");
        pod.containers.iter_mut().for_each(|c| c.name = "a".into());
        let mut stops = StopWatch::new(false);
        stops.stop_requested(&pod, &id("a1"), NOTHING, at(0));
        let verdict = stops.stop_requested(&pod, &id("a2"), NOTHING, at(500));
        assert_eq!(verdict, Verdict::No(NoWhy::OnlyContainer));
    }

    #[test]
    fn one_of_several_is_a_restart_after_a_second() {
        let pod = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(true);
        stops.stop_requested(&pod, &id("a"), NOTHING, at(0));
        let early = stops.ask_again(&pod, &id("a"), NOTHING, at(999));
        assert_eq!(early, Verdict::WaitUntil(at(1000)));
        let late = stops.ask_again(&pod, &id("a"), NOTHING, at(1000));
        assert_eq!(late, Verdict::No(NoWhy::OthersRun));
        // Too far from the first to be the same event.
        let other = stops.stop_requested(&pod, &id("b"), NOTHING, at(1500));
        assert_eq!(other, Verdict::WaitUntil(at(2500)));
    }

    #[test]
    fn a_retry_of_all_counts_anew() {
        let pod = pod("u1", "web", &["a", "b"]);
        let mut stops = StopWatch::new(false);
        for round in [0, 12_000] {
            let first = stops.stop_requested(&pod, &id("a"), NOTHING, at(round));
            assert_eq!(first, Verdict::WaitUntil(at(round + 1000)));
            let second = stops.stop_requested(&pod, &id("b"), NOTHING, at(round + 3));
            assert_eq!(second, Verdict::Yes(YesWhy::AllContainers));
        }
    }

    #[test]
    fn the_only_container_is_held_only_if_told_to() {
        let pod = exited(pod("u1", "web", &["a", "init"]), "init");
        let ask = |hold_unknown| {
            StopWatch::new(hold_unknown).stop_requested(&pod, &id("a"), NOTHING, at(0))
        };
        assert_eq!(ask(false), Verdict::No(NoWhy::OnlyContainer));
        assert_eq!(ask(true), Verdict::Yes(YesWhy::HoldUnknown));
    }

    #[test]
    fn stops_are_forgotten_after_a_minute() {
        let mut stops = StopWatch::new(false);
        for n in 0..1000 {
            let pod = pod(&format!("u{n}"), "web", &["a", "b"]);
            stops.stop_requested(&pod, &id("a"), NOTHING, at(n));
            stops.sandbox_stop_requested(&pod.sandbox, at(n));
        }
        let pod = pod("u0", "web", &["a", "b"]);
        let verdict = stops.ask_again(&pod, &id("a"), NOTHING, at(62_000));
        assert_eq!(verdict, Verdict::No(NoWhy::OthersRun));
        assert!(stops.stops.is_empty() && stops.sandboxes.is_empty());
    }
}
