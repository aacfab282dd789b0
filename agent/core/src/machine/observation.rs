//! A drain that ebb only observes: its stop was forwarded at once, so the application ends while ebb watches.
//!
//! The machine runs as it would with a hold, with two differences. Its release waits for [`LINGER`], because the agent
//! learns that the containers have exited only some time after the kernel has closed their sockets. And it ends when the
//! containers have exited: the connections that ended with them, or are left, count as cut.
//!
//! A connection that ends up to [`EXIT_TAKES`] before its container exits counts as cut, because a process that exits
//! closes its sockets first. So an answer that the application finishes just before it exits counts as cut, too.

use std::{collections::VecDeque, time::Duration};

use super::{Action, Event, Machine};
use crate::{
    clock::BootTime,
    drain_report::{CutFlow, ReleaseReason},
    ids::SocketCookie,
};

/// How long after its end the drain waits to learn that the containers have exited.
pub(super) const LINGER: Duration = Duration::from_secs(6);

/// How long it takes from the close of a process's sockets until the runtime has recorded the exit of its container.
pub(super) const EXIT_TAKES: Duration = Duration::from_millis(250);

/// How many of the flows that ended last are remembered.
const MAX_ENDED: usize = 4096;

/// What an observed drain remembers.
#[derive(Debug, Default)]
pub(super) struct Observation {
    /// The flows that ended last, the oldest first.
    ended: VecDeque<(BootTime, CutFlow)>,
    /// Why and when the hold would have been released.
    pub(super) would_release: Option<(ReleaseReason, BootTime)>,
    /// The flows that ended with the containers, once these have exited.
    cut: Vec<CutFlow>,
}

impl Observation {
    /// A flow ended at `at`.
    pub(super) fn ended(&mut self, at: BootTime, flow: CutFlow) {
        if self.ended.len() == MAX_ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back((at, flow));
    }

    /// When the drain is over, if a hold would have been released by now.
    pub(super) fn over_at(&self) -> Option<BootTime> {
        self.would_release.map(|(_, at)| at + LINGER)
    }

    /// The containers have exited at these moments. Returns how many flows ended with them.
    pub(super) fn exited(&mut self, exits: &[BootTime]) -> u32 {
        let last = exits.iter().max().copied().unwrap_or_default();
        let ended_with = |at: BootTime| {
            let is_just_before = |exit: &BootTime| at <= *exit && at + EXIT_TAKES >= *exit;
            at >= last || exits.iter().any(is_just_before)
        };
        let ended = std::mem::take(&mut self.ended).into_iter();
        let cut = ended.filter(|(at, _)| ended_with(*at));
        self.cut = cut.map(|(_, flow)| flow).collect();
        u32::try_from(self.cut.len()).unwrap_or(u32::MAX)
    }

    /// The flows that ended with the containers.
    pub(super) fn cut(&self) -> &[CutFlow] {
        &self.cut
    }
}

impl Machine {
    /// Keeps what is known of an open flow that ends, if the drain is observed.
    pub(super) fn observe_close(&mut self, cookie: SocketCookie, at: BootTime) {
        if let Some(observation) = &mut self.observation
            && let Some(flow) = self.stats.open_flow(&self.flows, cookie, at)
        {
            observation.ended(at, flow);
        }
    }

    /// Takes an event after the moment at which a hold would have been released: only exits and releases count.
    pub(super) fn linger(
        &mut self,
        event: Event,
        over_at: BootTime,
        now: BootTime,
    ) -> Option<Action> {
        match event {
            Event::Exited(exits) => Some(self.exited(&exits, now)),
            Event::Release(reason) => Some(self.release(reason, now)),
            _ if now >= over_at => {
                let (reason, at) = self.observation.as_ref()?.would_release?;
                Some(self.release(reason, at))
            }
            _ => None,
        }
    }

    /// The containers have exited: the observed drain is over.
    pub(super) fn exited(&mut self, exits: &[BootTime], now: BootTime) -> Action {
        let would_release = self.observation.as_ref().and_then(|o| o.would_release);
        let last = exits.iter().max().copied().unwrap_or(now);
        let end = last.clamp(self.started, now.max(self.started));
        // Flows that were open at the deadline are already counted as cut.
        if let Some((ReleaseReason::Deadline, at)) = would_release {
            return self.release(ReleaseReason::Deadline, at);
        }
        let observation = self.observation.as_mut();
        let cut = observation.map_or(0, |observation| observation.exited(exits));
        self.stats.ended = self.stats.ended.saturating_sub(cut);
        match would_release {
            Some((reason, at)) if cut == 0 => self.release(reason, at),
            _ => self.release(ReleaseReason::Exited, end),
        }
    }

    /// The drain is over. An observed drain first waits for the exits of the containers.
    pub(super) fn end(&mut self, reason: ReleaseReason, now: BootTime) -> Option<Action> {
        match &mut self.observation {
            None => Some(self.release(reason, now)),
            Some(observation) => {
                observation.would_release = Some((reason, now));
                self.revision += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{START, at, by, closed, flow, opened, subject},
        *,
    };
    use crate::{
        drain_report::{DeadlineCause, Phase},
        flow::{Flow, FlowState, Snapshot},
        machine::Deadline,
        notification::DrainRequest,
        policy::{DrainMode, IdleFlows, Policy, Until},
    };

    fn observed() -> Policy {
        Policy {
            drain: DrainMode::Observe,
            ..Policy::default()
        }
    }

    fn dumped(ms: u64, flows: &[Flow]) -> Event {
        Event::Dumped(Snapshot {
            taken_at: at(ms),
            flows: flows.to_vec(),
            listens: None,
        })
    }

    /// An observed drain whose first dump has shown these flows.
    fn machine(policy: Policy, flows: &[Flow]) -> Machine {
        let mut m = Machine::new(subject(), policy, START, by(20_000), START);
        assert_eq!(m.step(Event::Tick, START), Some(Action::Dump));
        assert_eq!(m.step(dumped(0, flows), at(1)), None);
        m
    }

    fn exited(m: &mut Machine, exit: u64, now: u64) -> Option<Action> {
        m.step(Event::Exited(vec![at(exit)]), at(now))
    }

    const EXITED: Option<Action> = Some(Action::Release(ReleaseReason::Exited));
    const DRAINED: Option<Action> = Some(Action::Release(ReleaseReason::Drained));

    #[test]
    fn flows_that_end_with_the_containers_are_cut_and_earlier_ends_are_not() {
        let flows: Vec<_> = [1, 2, 3].map(|n| flow(n, FlowState::Active)).into();
        let mut m = machine(observed(), &flows);
        m.step(closed(1, 500), at(500));
        m.step(opened(4, 600), at(600));
        // A process that exits closes its sockets just before the runtime sees the exit.
        m.step(closed(2, 900), at(900));
        m.step(closed(4, 1001), at(1001));
        assert_eq!(exited(&mut m, 1000, 2500), EXITED);
        let report = m.report(at(9000));
        assert!(report.observed);
        assert_eq!(report.reason, Some(ReleaseReason::Exited));
        assert_eq!(
            report.held_ms, 1000,
            "until the exit, not until it was known"
        );
        let mut cut: Vec<_> = report.cut.iter().map(|c| c.remote).collect();
        cut.sort();
        let expected = [2, 3, 4].map(super::super::tests::remote);
        assert_eq!(cut, expected);
        assert_eq!((report.cut_total, report.ended), (Some(3), Some(1)));
    }

    #[test]
    fn a_drain_that_comes_to_its_end_waits_to_learn_of_the_exit() {
        let mut m = machine(observed(), &[flow(1, FlowState::Active)]);
        m.step(closed(1, 2900), at(2900));
        assert_eq!(m.step(Event::Tick, at(3000)), Some(Action::Dump));
        assert_eq!(m.step(dumped(3000, &[]), at(3001)), None);
        assert_eq!(m.report(at(5000)).held_ms, 3001);
        assert_eq!(m.next_wake(), Some(at(3001) + LINGER));
        // Later events do not belong to it.
        assert_eq!(m.step(opened(2, 4000), at(4000)), None);
        let mut no_exit = machine(observed(), &[]);
        no_exit.step(Event::Tick, at(3000));
        no_exit.step(dumped(3000, &[]), at(3001));
        assert_eq!(no_exit.step(Event::Tick, at(3001) + LINGER), DRAINED);
        assert_eq!(no_exit.report(at(60_000)).held_ms, 3001);
        // The flow ended because its container did, so a hold would have lasted longer.
        assert_eq!(exited(&mut m, 3100, 5000), EXITED);
        let report = m.report(at(9000));
        assert_eq!((report.cut_total, report.ended), (Some(1), Some(0)));
        assert_eq!(report.arrived, Some(0));
    }

    #[test]
    fn an_exit_long_after_the_last_flow_leaves_the_drain_drained() {
        let mut m = machine(observed(), &[flow(1, FlowState::Active)]);
        m.step(closed(1, 1000), at(1000));
        m.step(Event::Tick, at(3000));
        m.step(dumped(3000, &[]), at(3001));
        assert_eq!(exited(&mut m, 3500, 5000), DRAINED);
        let report = m.report(at(9000));
        assert_eq!((report.held_ms, report.cut_total), (3001, Some(0)));
        assert_eq!(report.phase, Phase::Released);
    }

    #[test]
    fn what_is_open_at_the_deadline_is_cut_whatever_follows() {
        let mut m = machine(observed(), &[flow(1, FlowState::Active)]);
        assert_eq!(m.step(Event::Tick, at(20_000)), None);
        m.step(closed(1, 20_100), at(20_100));
        let deadline = Some(Action::Release(ReleaseReason::Deadline));
        assert_eq!(exited(&mut m, 20_100, 22_000), deadline);
        let report = m.report(at(30_000));
        assert_eq!((report.held_ms, report.cut_total), (20_000, Some(1)));
    }

    #[test]
    fn the_removal_of_the_pod_is_not_the_end_of_an_observation() {
        let mut m = machine(observed(), &[flow(1, FlowState::Active)]);
        let removed = Deadline {
            at: at(100),
            cause: DeadlineCause::Removed,
        };
        assert_eq!(m.step(Event::Limit(removed), at(100)), None);
        assert_eq!(m.deadline(), by(20_000));
    }

    #[test]
    fn an_observed_drain_closes_nothing_and_does_not_tell_the_application() {
        let request: DrainRequest = "GET :8080/drain".parse().unwrap();
        let policy = Policy {
            idle_flows: IdleFlows::Close,
            on_drain: Some(request),
            stop_signals: "SIGQUIT".parse().unwrap(),
            ..observed()
        };
        let idle = flow(1, FlowState::Idle);
        let mut m = machine(policy, &[idle.clone(), flow(2, FlowState::Active)]);
        assert!(!m.policy().notifies());
        // The idle flow, which ebb would have closed, does not hold.
        assert_eq!(m.policy().until, Until::Idle);
        assert_eq!(m.step(Event::Stopping(true), at(10)), None);
        m.step(closed(2, 100), at(100));
        assert_eq!(m.step(Event::Tick, at(3000)), Some(Action::Dump));
        assert_eq!(m.step(dumped(3000, &[idle]), at(3001)), None);
        assert_eq!(m.report(at(3001)).held_ms, 3001, "it would be released");
    }

    #[test]
    fn a_held_drain_ignores_exits() {
        let mut m = machine(Policy::default(), &[flow(1, FlowState::Active)]);
        assert_eq!(exited(&mut m, 100, 200), None);
        assert!(!m.report(at(200)).observed);
        assert_eq!(
            m.step(Event::Tick, at(20_000)),
            Some(Action::Release(ReleaseReason::Deadline))
        );
    }
}
