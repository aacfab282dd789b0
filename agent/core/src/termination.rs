//! Whether a StopContainer is part of its pod's termination or of a container restart. Pure: evidence and time are
//! arguments.
//!
//! The CRI does not say why the kubelet stops a container. ebb holds terminations and never restarts (failed liveness
//! or startup probe, changed spec), because a held restart blocks the pod's worker in the kubelet, which then can't
//! process a deletion of the pod either. The evidence, strongest first:
//!
//! 1. The API server says that the pod is being deleted. If it says that the pod is not, and the sandbox's process is
//!    gone, the kubelet recreates the sandbox (`PodSandboxChanged`, `pkg/kubelet/kuberuntime/util/util.go`), which
//!    stops all containers and the sandbox, and starts them again: nothing is held.
//! 2. The kubelet has called StopPodSandbox for it, which otherwise ends the pod whatever the API server says
//!    ([`classify_sandbox_stop`]). Or the API server's state is not known and a preStop wait of the pod is in
//!    progress.
//! 3. Else: the kubelet stops all containers of a terminating pod at once (`killContainersWithSyncResult`,
//!    `pkg/kubelet/kuberuntime/kuberuntime_container.go`). If all running containers, at least two, are stopped
//!    within a second, the pod terminates. Their calls arrive one by one, so the first ones wait for the rest.
//!    This also finds evictions and node shutdowns, which set no deletionTimestamp, so that the API server reports no
//!    deletion. In that case all of them must still be running, because a restart of several containers stops them
//!    one after the other (`SyncPod`, `pkg/kubelet/kuberuntime/kuberuntime_manager.go`).
//! 4. If the pod has one running container, there is no evidence: ebb does not hold, unless `hold_unknown` is set and
//!    the API server does not deny the deletion.
//!
//! A restart of all containers in place (KEP-5532) needs no rule: the kubelet stops them with the minimum grace period
//! (`SyncPod`, "RestartAllContainers"), which ebb never holds.
//!
//! In doubt ebb does not hold. The kubelet stops sidecars (restartable init containers) after the main containers, so
//! rule 3 does not recognise the termination of a pod with sidecars.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use crate::{
    clock::BootTime,
    ids::{ContainerId, SandboxId},
};

/// The longest time between stops of one pod's containers that count as one event.
const TOGETHER: Duration = Duration::from_secs(1);

/// How long a stop is remembered. The kubelet retries a failed one after 10 to 15 s.
const REMEMBERED: Duration = Duration::from_secs(60);

/// A pod's sandbox and containers, as the runtime lists them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodContainers {
    /// The newest ready sandbox.
    pub sandbox: SandboxId,
    /// All containers, running or not.
    pub containers: Vec<ContainerState>,
}

/// A container, as the runtime lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerState {
    /// CRI id.
    pub id: ContainerId,
    /// Name in the pod spec.
    pub name: String,
    /// Whether its state is CONTAINER_RUNNING.
    pub running: bool,
}

/// What else is known of the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminationEvidence {
    /// Whether the API server says that it is being deleted; `None` if not known.
    pub deleting: Option<bool>,
    /// A preStop wait of the pod is in progress.
    pub prestop_wait: bool,
    /// The process of the pod's sandbox is gone.
    pub sandbox_gone: bool,
}

/// What a stop is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The pod's termination.
    Yes(Ending),
    /// Not the pod's termination, or no evidence for it.
    No(NotEnding),
    /// Not known yet. Classify again when another container of the pod or its sandbox is stopped, and at this moment
    /// at the latest.
    WaitUntil(BootTime),
}

/// Why a stop is part of the pod's termination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The pod has a deletionTimestamp, or is gone from the API server.
    Deleting,
    /// A preStop wait is in progress.
    PrestopWait,
    /// Its sandbox is being stopped.
    SandboxStop,
    /// All its containers are being stopped.
    AllContainers,
    /// There is no evidence, and `hold_unknown` says to hold.
    HoldUnknown,
}

/// Why a stop is not held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotEnding {
    /// The API server says that the pod is not being deleted.
    NotDeleting,
    /// The API server says that the pod is not being deleted, and its sandbox's process is gone: the kubelet recreates
    /// the sandbox.
    SandboxGone,
    /// Other containers of the pod are not being stopped.
    OthersRun,
    /// It is the pod's only running container, so this may be a restart.
    OnlyContainer,
}

impl Ending {
    /// The name in logs and reports.
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

impl NotEnding {
    /// The name in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotDeleting => "not-deleting",
            Self::SandboxGone => "sandbox-not-ready",
            Self::OthersRun => "others-run",
            Self::OnlyContainer => "only-container",
        }
    }
}

/// Why ebb holds a StopPodSandbox of the pod; `None` if nothing runs in the sandbox. The kubelet stops a sandbox when
/// its pod ends, also in an eviction or a node shutdown, which set no deletionTimestamp, and to recreate it
/// ([`is_recreated`]).
///
/// `drains_flows`: the pod is draining and has flows. They count even if no container runs, because they may have
/// unsent bytes or belong to a process outside the listed containers.
pub fn classify_sandbox_stop(pod: &PodContainers, drains_flows: bool) -> Option<Ending> {
    (drains_flows || pod.containers.iter().any(|c| c.running)).then_some(Ending::SandboxStop)
}

/// Whether the kubelet stops the pod to recreate its sandbox, so that the pod does not end.
pub fn is_recreated(evidence: TerminationEvidence) -> bool {
    evidence.sandbox_gone && evidence.deleting == Some(false)
}

/// Remembers recent stops, and classifies new ones.
#[derive(Debug)]
pub struct TerminationDetector {
    hold_unknown: bool,
    stops: HashMap<ContainerId, RecordedStop>,
    sandboxes: HashMap<SandboxId, BootTime>,
}

/// When a StopContainer arrived at the proxy, and when this agent learnt of it: later, if the call has waited for this
/// agent to start.
#[derive(Clone, Copy, Debug)]
struct RecordedStop {
    arrived: BootTime,
    received: BootTime,
}

impl TerminationDetector {
    /// `hold_unknown`: hold even without evidence.
    pub fn new(hold_unknown: bool) -> Self {
        Self {
            hold_unknown,
            stops: HashMap::new(),
            sandboxes: HashMap::new(),
        }
    }

    /// Records that StopContainer arrived, and that it is received now. Callers that wait for a verdict on this pod
    /// should classify again. Call this before any wait, because the time between stops counts from their arrival.
    pub fn record_stop(&mut self, container: &ContainerId, arrived: BootTime, received: BootTime) {
        self.forget(received);
        let stop = RecordedStop { arrived, received };
        self.stops.insert(container.clone(), stop);
    }

    /// Records that StopPodSandbox arrived, as [`record_stop`](Self::record_stop) does.
    pub fn record_sandbox_stop(&mut self, sandbox: &SandboxId, arrived: BootTime) {
        self.forget(arrived);
        self.sandboxes.insert(sandbox.clone(), arrived);
    }

    /// Whether a recorded stop is part of its pod's termination. `pod` should be fresh, because the verdict depends
    /// on which containers run. May be called again.
    pub fn classify_stop(
        &mut self,
        pod: &PodContainers,
        container: &ContainerId,
        evidence: TerminationEvidence,
        now: BootTime,
    ) -> Verdict {
        self.forget(now);
        if evidence.deleting == Some(true) {
            return Verdict::Yes(Ending::Deleting);
        }
        if is_recreated(evidence) {
            return Verdict::No(NotEnding::SandboxGone);
        }
        let denied = evidence.deleting == Some(false);
        match self.classify_by_stops(pod, container, denied, now) {
            by_stops @ Verdict::Yes(Ending::SandboxStop | Ending::AllContainers) => by_stops,
            // The stops give no evidence, or none yet.
            _ if evidence.prestop_wait && !denied => Verdict::Yes(Ending::PrestopWait),
            by_stops => by_stops,
        }
    }

    fn classify_by_stops(
        &self,
        pod: &PodContainers,
        container: &ContainerId,
        denied: bool,
        now: BootTime,
    ) -> Verdict {
        let no = |why| Verdict::No(if denied { NotEnding::NotDeleting } else { why });
        if self.sandboxes.contains_key(&pod.sandbox) {
            return Verdict::Yes(Ending::SandboxStop);
        }
        let Some(&RecordedStop { arrived, received }) = self.stops.get(container) else {
            // Forgotten, because it has waited longer than a verdict takes.
            return no(NotEnding::OthersRun);
        };
        let is_near = |stop: &RecordedStop| {
            let at = stop.arrived;
            at.since(arrived).max(arrived.since(at)) <= TOGETHER
        };
        let together: HashSet<&ContainerId> = pod
            .containers
            .iter()
            .map(|c| &c.id)
            .filter(|id| self.stops.get(id).is_some_and(is_near))
            .collect();
        let running = || pod.containers.iter().filter(|c| c.running).map(|c| &c.id);
        // A container that has stopped quickly does not run any more, but still counts. Counted by name, because a
        // restarted container and its predecessor are one.
        let name = |id: &ContainerId| pod.containers.iter().find(|c| c.id == *id).map(|c| &c.name);
        let involved = running()
            .chain(together.iter().copied())
            .filter_map(name)
            .collect::<HashSet<_>>()
            .len();
        if involved < 2 {
            return match self.hold_unknown && !denied {
                true => Verdict::Yes(Ending::HoldUnknown),
                false => no(NotEnding::OnlyContainer),
            };
        }
        let all_run = || running().filter(|id| together.contains(id)).count() == together.len();
        if running().all(|id| together.contains(id)) && (!denied || all_run()) {
            return Verdict::Yes(Ending::AllContainers);
        }
        // The stops of the other containers may have waited for this agent, too.
        let latest = arrived.max(received) + TOGETHER;
        if now < latest {
            Verdict::WaitUntil(latest)
        } else {
            no(NotEnding::OthersRun)
        }
    }

    fn forget(&mut self, now: BootTime) {
        self.sandboxes.retain(|_, at| now.since(*at) < REMEMBERED);
        self.stops
            .retain(|_, stop| now.since(stop.received) < REMEMBERED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: TerminationEvidence = TerminationEvidence {
        deleting: None,
        prestop_wait: false,
        sandbox_gone: false,
    };

    /// A pod with the running containers `ids`, each named as its id.
    fn pod(uid: &str, ids: &[&str]) -> PodContainers {
        PodContainers {
            sandbox: SandboxId::new(format!("sandbox-of-{uid}")),
            containers: ids
                .iter()
                .map(|id| ContainerState {
                    id: ContainerId::new(*id),
                    name: (*id).to_owned(),
                    running: true,
                })
                .collect(),
        }
    }

    fn at(ms: u64) -> BootTime {
        BootTime::from_nanos((100_000 + ms) * 1_000_000)
    }

    fn id(id: &str) -> ContainerId {
        ContainerId::new(id)
    }

    /// Records a stop and classifies it at once.
    fn requested(
        stops: &mut TerminationDetector,
        pod: &PodContainers,
        container: &ContainerId,
        evidence: TerminationEvidence,
        now: BootTime,
    ) -> Verdict {
        stops.record_stop(container, now, now);
        stops.classify_stop(pod, container, evidence, now)
    }

    fn exited(mut pod: PodContainers, id: &str) -> PodContainers {
        pod.containers
            .iter_mut()
            .filter(|c| c.id.as_str() == id)
            .for_each(|c| c.running = false);
        pod
    }

    #[test]
    fn the_api_servers_answer_outweighs_all_other_evidence() {
        let pod = pod("u1", &["a"]);
        let mut stops = TerminationDetector::new(true);
        let mut ask = |deleting| {
            let evidence = TerminationEvidence {
                deleting: Some(deleting),
                prestop_wait: true,
                sandbox_gone: false,
            };
            requested(&mut stops, &pod, &id("a"), evidence, at(0))
        };
        assert_eq!(ask(true), Verdict::Yes(Ending::Deleting));
        assert_eq!(ask(false), Verdict::No(NotEnding::NotDeleting));
    }

    const DENIED: TerminationEvidence = TerminationEvidence {
        deleting: Some(false),
        prestop_wait: false,
        sandbox_gone: false,
    };

    #[test]
    fn containers_that_stop_together_end_a_pod_that_is_not_deleted() {
        let pod = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(false);
        let first = requested(&mut stops, &pod, &id("a"), DENIED, at(0));
        assert_eq!(first, Verdict::WaitUntil(at(1000)));
        let second = requested(&mut stops, &pod, &id("b"), DENIED, at(4));
        assert_eq!(second, Verdict::Yes(Ending::AllContainers));
        let first = stops.classify_stop(&pod, &id("a"), DENIED, at(4));
        assert_eq!(first, Verdict::Yes(Ending::AllContainers));
    }

    #[test]
    fn containers_that_restart_one_after_the_other_do_not_end_the_pod() {
        let both = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(true);
        requested(&mut stops, &both, &id("a"), DENIED, at(0));
        let rest = exited(both, "a");
        let second = requested(&mut stops, &rest, &id("b"), DENIED, at(500));
        assert_eq!(second, Verdict::WaitUntil(at(1500)));
        let second = stops.classify_stop(&rest, &id("b"), DENIED, at(1500));
        assert_eq!(second, Verdict::No(NotEnding::NotDeleting));
    }

    #[test]
    fn a_sandbox_stop_ends_a_pod_that_is_not_deleted() {
        let pod = pod("u1", &["a"]);
        let mut stops = TerminationDetector::new(false);
        stops.record_sandbox_stop(&pod.sandbox, at(0));
        let verdict = requested(&mut stops, &pod, &id("a"), DENIED, at(10));
        assert_eq!(verdict, Verdict::Yes(Ending::SandboxStop));
    }

    #[test]
    fn the_stops_of_a_pod_whose_sandbox_is_recreated_do_not_end_it() {
        let both = pod("u1", &["a", "b"]);
        let gone = TerminationEvidence {
            sandbox_gone: true,
            ..DENIED
        };
        let mut stops = TerminationDetector::new(true);
        stops.record_sandbox_stop(&both.sandbox, at(0));
        stops.record_stop(&id("a"), at(0), at(0));
        let second = requested(&mut stops, &both, &id("b"), gone, at(4));
        assert_eq!(second, Verdict::No(NotEnding::SandboxGone));
        assert!(is_recreated(gone) && !is_recreated(DENIED));
        // Deleted, or not known: the sandbox may have failed during the pod's end.
        for deleting in [Some(true), None] {
            let evidence = TerminationEvidence { deleting, ..gone };
            assert!(!is_recreated(evidence));
            let verdict = stops.classify_stop(&both, &id("b"), evidence, at(5));
            assert!(matches!(verdict, Verdict::Yes(_)), "{verdict:?}");
        }
    }

    #[test]
    fn stops_that_waited_for_the_agent_wait_for_each_other_once_more() {
        let pod = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(false);
        stops.record_stop(&id("a"), at(0), at(8000));
        let first = stops.classify_stop(&pod, &id("a"), NOTHING, at(8000));
        assert_eq!(first, Verdict::WaitUntil(at(9000)));
        stops.record_stop(&id("b"), at(3), at(8200));
        let first = stops.classify_stop(&pod, &id("a"), NOTHING, at(8200));
        assert_eq!(first, Verdict::Yes(Ending::AllContainers));
        // Not together, although they are received together.
        stops.record_stop(&id("b"), at(3000), at(8200));
        let second = stops.classify_stop(&pod, &id("b"), NOTHING, at(9200));
        assert_eq!(second, Verdict::No(NotEnding::OthersRun));
    }

    #[test]
    fn a_stop_during_a_prestop_wait_is_the_pods_end() {
        let pod = pod("u1", &["a", "b"]);
        let evidence = TerminationEvidence {
            prestop_wait: true,
            ..NOTHING
        };
        let verdict = requested(
            &mut TerminationDetector::new(false),
            &pod,
            &id("a"),
            evidence,
            at(0),
        );
        assert_eq!(verdict, Verdict::Yes(Ending::PrestopWait));
    }

    #[test]
    fn stops_of_all_containers_outweigh_a_prestop_wait() {
        let pod = pod("u1", &["a", "b"]);
        let evidence = TerminationEvidence {
            prestop_wait: true,
            ..NOTHING
        };
        let mut stops = TerminationDetector::new(false);
        stops.record_stop(&id("a"), at(0), at(0));
        stops.record_stop(&id("b"), at(1), at(1));
        let verdict = stops.classify_stop(&pod, &id("b"), evidence, at(2));
        assert_eq!(verdict, Verdict::Yes(Ending::AllContainers));
    }

    #[test]
    fn a_sandbox_stop_ends_its_own_pod_only() {
        let (mine, other) = (pod("u1", &["a"]), pod("u2", &["x"]));
        let mut stops = TerminationDetector::new(false);
        stops.record_sandbox_stop(&mine.sandbox, at(0));
        let verdict = requested(&mut stops, &mine, &id("a"), NOTHING, at(10));
        assert_eq!(verdict, Verdict::Yes(Ending::SandboxStop));
        let verdict = requested(&mut stops, &other, &id("x"), NOTHING, at(10));
        assert_eq!(verdict, Verdict::No(NotEnding::OnlyContainer));
    }

    #[test]
    fn a_sandbox_stop_ends_no_hold_of_a_pod_that_is_not_deleted() {
        let both = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(false);
        requested(&mut stops, &both, &id("a"), DENIED, at(0));
        let held = requested(&mut stops, &both, &id("b"), DENIED, at(4));
        assert_eq!(held, Verdict::Yes(Ending::AllContainers));
        stops.record_sandbox_stop(&both.sandbox, at(500));
        assert_eq!(
            classify_sandbox_stop(&both, true),
            Some(Ending::SandboxStop)
        );
        // A retry of a stop ends no hold either.
        let retried = requested(&mut stops, &both, &id("a"), DENIED, at(30_000));
        assert_eq!(retried, Verdict::Yes(Ending::SandboxStop));
    }

    #[test]
    fn a_sandbox_stop_is_held_if_something_runs_or_drains() {
        let runs = pod("u1", &["a"]);
        let ended = exited(runs.clone(), "a");
        assert_eq!(
            classify_sandbox_stop(&runs, false),
            Some(Ending::SandboxStop)
        );
        assert_eq!(
            classify_sandbox_stop(&ended, true),
            Some(Ending::SandboxStop)
        );
        assert_eq!(classify_sandbox_stop(&ended, false), None);
    }

    #[test]
    fn stops_of_all_running_containers_are_the_pods_end() {
        let pod = exited(pod("u1", &["a", "b", "done"]), "done");
        let mut stops = TerminationDetector::new(false);
        let first = requested(&mut stops, &pod, &id("a"), NOTHING, at(0));
        assert_eq!(first, Verdict::WaitUntil(at(1000)));
        let second = requested(&mut stops, &pod, &id("b"), NOTHING, at(4));
        assert_eq!(second, Verdict::Yes(Ending::AllContainers));
        let first = stops.classify_stop(&pod, &id("a"), NOTHING, at(4));
        assert_eq!(first, Verdict::Yes(Ending::AllContainers));
    }

    #[test]
    fn a_container_that_stops_at_once_still_counts_beside_the_other() {
        let both = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(false);
        requested(&mut stops, &both, &id("a"), NOTHING, at(0));
        let rest = exited(both, "a");
        let verdict = requested(&mut stops, &rest, &id("b"), NOTHING, at(5));
        assert_eq!(verdict, Verdict::Yes(Ending::AllContainers));
    }

    #[test]
    fn a_restarted_container_and_its_predecessor_count_as_one() {
        let mut pod = exited(pod("u1", &["a1", "a2"]), "a1");
        pod.containers.iter_mut().for_each(|c| c.name = "a".into());
        let mut stops = TerminationDetector::new(false);
        requested(&mut stops, &pod, &id("a1"), NOTHING, at(0));
        let verdict = requested(&mut stops, &pod, &id("a2"), NOTHING, at(500));
        assert_eq!(verdict, Verdict::No(NotEnding::OnlyContainer));
    }

    #[test]
    fn a_stop_of_one_of_several_counts_as_a_restart_after_a_second() {
        let pod = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(true);
        requested(&mut stops, &pod, &id("a"), NOTHING, at(0));
        let early = stops.classify_stop(&pod, &id("a"), NOTHING, at(999));
        assert_eq!(early, Verdict::WaitUntil(at(1000)));
        let late = stops.classify_stop(&pod, &id("a"), NOTHING, at(1000));
        assert_eq!(late, Verdict::No(NotEnding::OthersRun));
        // Too long after the first to be the same event.
        let other = requested(&mut stops, &pod, &id("b"), NOTHING, at(1500));
        assert_eq!(other, Verdict::WaitUntil(at(2500)));
    }

    #[test]
    fn the_time_between_stops_counts_from_their_arrival_and_not_from_their_classification() {
        let pod = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(false);
        stops.record_stop(&id("a"), at(0), at(0));
        stops.record_stop(&id("b"), at(900), at(900));
        // The runtime and the API server answered slowly for the first stop.
        let slow = stops.classify_stop(&pod, &id("a"), NOTHING, at(1300));
        assert_eq!(slow, Verdict::Yes(Ending::AllContainers));
        let mut stops = TerminationDetector::new(false);
        stops.record_stop(&id("a"), at(0), at(0));
        stops.record_stop(&id("b"), at(1100), at(1100));
        let slow = stops.classify_stop(&pod, &id("a"), NOTHING, at(1300));
        assert_eq!(slow, Verdict::No(NotEnding::OthersRun));
        // The wait for other stops counts from the arrival, too.
        let quick = stops.classify_stop(&pod, &id("b"), NOTHING, at(1300));
        assert_eq!(quick, Verdict::WaitUntil(at(2100)));
    }

    #[test]
    fn retries_of_all_stops_are_classified_like_first_stops() {
        let pod = pod("u1", &["a", "b"]);
        let mut stops = TerminationDetector::new(false);
        for round in [0, 12_000] {
            let first = requested(&mut stops, &pod, &id("a"), NOTHING, at(round));
            assert_eq!(first, Verdict::WaitUntil(at(round + 1000)));
            let second = requested(&mut stops, &pod, &id("b"), NOTHING, at(round + 3));
            assert_eq!(second, Verdict::Yes(Ending::AllContainers));
        }
    }

    #[test]
    fn the_only_container_is_held_only_with_hold_unknown() {
        let pod = exited(pod("u1", &["a", "init"]), "init");
        let ask = |hold_unknown| {
            requested(
                &mut TerminationDetector::new(hold_unknown),
                &pod,
                &id("a"),
                NOTHING,
                at(0),
            )
        };
        assert_eq!(ask(false), Verdict::No(NotEnding::OnlyContainer));
        assert_eq!(ask(true), Verdict::Yes(Ending::HoldUnknown));
    }

    #[test]
    fn stops_are_forgotten_after_a_minute() {
        let mut stops = TerminationDetector::new(false);
        for n in 0..1000 {
            let pod = pod(&format!("u{n}"), &["a", "b"]);
            requested(&mut stops, &pod, &id("a"), NOTHING, at(n));
            stops.record_sandbox_stop(&pod.sandbox, at(n));
        }
        let pod = pod("u0", &["a", "b"]);
        let verdict = stops.classify_stop(&pod, &id("a"), NOTHING, at(62_000));
        assert_eq!(verdict, Verdict::No(NotEnding::OthersRun));
        assert!(stops.stops.is_empty() && stops.sandboxes.is_empty());
    }
}
