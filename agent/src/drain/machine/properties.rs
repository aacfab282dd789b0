//! What must hold for every ordering of events: a world of flows, its kernel's edges and looks, and a
//! machine that hears of them late, twice, in any order or not at all.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::{
    tests::{START, closed, flow, opened, subject},
    *,
};

#[derive(Clone, Debug)]
enum Op {
    Open,
    /// The n-th flow closes.
    Close(usize),
    /// The n-th flow speaks, or falls silent.
    Speak(usize, bool),
    /// A waiting edge is delivered; it may be kept to be delivered again.
    Edge {
        which: usize,
        keep: bool,
    },
    /// Close edges are thrown away and the loss is reported.
    Lose,
    /// The kernel answers the look that is under way …
    TakeLook,
    /// … and the answer arrives, or a failure.
    EndLook {
        fails: bool,
    },
    Untracked,
    Limit(u64),
    Pass(u64),
    /// Time passes until the machine wants to be woken.
    Wake,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let which = 0..16_usize;
    let op = prop_oneof![
        3 => Just(Op::Open),
        4 => which.clone().prop_map(Op::Close),
        2 => (which.clone(), any::<bool>()).prop_map(|(n, live)| Op::Speak(n, live)),
        6 => (which, prop::bool::weighted(0.2)).prop_map(|(which, keep)| Op::Edge { which, keep }),
        1 => Just(Op::Lose),
        8 => Just(Op::TakeLook),
        8 => prop::bool::weighted(0.15).prop_map(|fails| Op::EndLook { fails }),
        1 => prop::bool::weighted(0.05).prop_map(|yes| if yes { Op::Untracked } else { Op::Wake }),
        1 => (0..80_000_u64).prop_map(Op::Limit),
        3 => prop_oneof![0..5_u64, 0..2000_u64].prop_map(Op::Pass),
        6 => Just(Op::Wake),
    ];
    proptest::collection::vec(op, 0..200)
}

struct WorldFlow {
    open: bool,
    /// The kernel has not stored the end yet, though its edge is out.
    still_shown: bool,
    live: bool,
}

struct World {
    machine: Machine,
    now: u64,
    flows: BTreeMap<u64, WorldFlow>,
    edges: Vec<Event>,
    looking: bool,
    look: Option<Snapshot>,
    /// Was any flow live at the last look that the machine got?
    live_at_look: bool,
    told_to_close: HashSet<SocketCookie>,
    first_deadline: BootTime,
    ended: Option<ReleaseReason>,
}

impl World {
    fn new(until: Until, idle_flows: IdleFlows, deadline_ms: u64, flows: usize) -> Self {
        let policy = Policy {
            until,
            idle_flows,
            ..Policy::default()
        };
        let deadline = START + Duration::from_millis(deadline_ms);
        let flows = (1..=flows as u64)
            .map(|n| {
                (
                    n,
                    WorldFlow {
                        open: true,
                        still_shown: false,
                        live: n % 2 == 0,
                    },
                )
            })
            .collect();
        Self {
            machine: Machine::new(subject(), policy, START, deadline, START),
            now: 0,
            flows,
            edges: vec![],
            looking: false,
            look: None,
            live_at_look: false,
            told_to_close: HashSet::new(),
            first_deadline: deadline,
            ended: None,
        }
    }

    fn time(&self) -> BootTime {
        START + Duration::from_millis(self.now)
    }

    fn give(&mut self, event: Event) {
        let looked = matches!(event, Event::Looked(_));
        match self.machine.step(event, self.time()) {
            None => {}
            Some(Action::Look) => {
                assert!(!self.looking, "two looks at a time");
                self.looking = true;
            }
            Some(Action::CloseIdle(idle)) => {
                assert!(looked, "closed without a fresh look");
                assert_eq!(self.machine.policy().idle_flows, IdleFlows::Close);
                assert!(self.machine.report(self.time()).phase == Phase::Drain);
                for flow in &idle {
                    assert_eq!(flow.state, FlowState::Idle, "a live flow was closed");
                    assert!(self.told_to_close.insert(flow.cookie), "told twice");
                }
                let told = idle.iter().map(|f| f.cookie).collect();
                self.give(Event::IdleClosed(told));
            }
            Some(Action::Release(reason)) => {
                assert_eq!(self.ended.replace(reason), None, "released twice");
                self.check_release(reason, looked);
            }
        }
    }

    fn check_release(&self, reason: ReleaseReason, looked: bool) {
        match reason {
            ReleaseReason::Drained => {
                let until = self.machine.policy().until;
                if until != Until::Settled {
                    assert!(looked, "no look agreed");
                }
                if until == Until::Zero {
                    assert!(self.flows.values().all(|f| !f.open), "a flow was cut");
                }
                if until == Until::Idle {
                    assert!(!self.live_at_look, "a live flow was cut");
                }
            }
            ReleaseReason::Untracked => {
                assert!(
                    self.time() >= START + self.machine.policy().settle_max,
                    "before the settle time"
                );
            }
            ReleaseReason::Deadline => assert!(self.time() >= self.machine.deadline()),
            other => panic!("nobody asked for {other}"),
        }
    }

    fn pass(&mut self, ms: u64) {
        if ms > 0 {
            for flow in self.flows.values_mut() {
                flow.still_shown = false;
            }
        }
        self.now += ms;
    }

    fn nth_open(&mut self, n: usize) -> Option<(u64, &mut WorldFlow)> {
        let open = self.flows.values().filter(|f| f.open).count();
        let nth = n.checked_rem(open)?;
        self.flows
            .iter_mut()
            .filter(|(_, f)| f.open)
            .nth(nth)
            .map(|(k, f)| (*k, f))
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Open => {
                let cookie = self.flows.len() as u64 + 1;
                self.flows.insert(
                    cookie,
                    WorldFlow {
                        open: true,
                        still_shown: false,
                        live: true,
                    },
                );
                self.edges.push(opened(cookie, self.now));
            }
            Op::Close(n) => {
                let now = self.now;
                if let Some((cookie, flow)) = self.nth_open(n) {
                    (flow.open, flow.still_shown) = (false, true);
                    self.edges.push(closed(cookie, now));
                }
            }
            Op::Speak(n, live) => {
                if let Some((_, flow)) = self.nth_open(n) {
                    flow.live = live;
                }
            }
            Op::Edge { which, keep } => {
                if let Some(which) = which.checked_rem(self.edges.len()) {
                    let edge = if keep {
                        self.edges[which].clone()
                    } else {
                        self.edges.swap_remove(which)
                    };
                    self.give(edge);
                }
            }
            Op::Lose => {
                self.edges.clear();
                self.give(Event::Lost);
            }
            Op::TakeLook => {
                if self.looking && self.look.is_none() {
                    self.look = Some(self.picture());
                }
            }
            Op::EndLook { fails } => self.end_look(fails),
            Op::Untracked => self.give(Event::Untracked("the programs are gone".into())),
            Op::Limit(ms) => self.give(Event::Limit(START + Duration::from_millis(ms))),
            Op::Pass(ms) => {
                self.pass(ms);
                self.give(Event::Tick);
            }
            Op::Wake => {
                if let Some(wake) = self.machine.next_wake() {
                    let wake = wake.since(START).as_millis() as u64;
                    self.pass(wake.saturating_sub(self.now));
                    self.give(Event::Tick);
                }
            }
        }
    }

    fn picture(&self) -> Snapshot {
        let flows = self
            .flows
            .iter()
            .filter(|(_, f)| f.open || f.still_shown)
            .map(|(cookie, f)| {
                flow(
                    *cookie,
                    if f.live {
                        FlowState::Active
                    } else {
                        FlowState::Idle
                    },
                )
            });
        Snapshot {
            taken_at: self.time(),
            flows: flows.collect(),
        }
    }

    fn end_look(&mut self, fails: bool) {
        if !self.looking || (self.look.is_none() && !fails) {
            return;
        }
        // The driver's promise: no look before the open edges that the kernel had reported by then.
        for edge in self.edges.clone() {
            if matches!(edge, Event::FlowOpened { .. }) {
                self.give(edge);
            }
        }
        if self.ended.is_some() {
            return;
        }
        self.looking = false;
        let look = self.look.take();
        if fails {
            self.give(Event::LookFailed("busy".into()));
        } else if let Some(look) = look {
            self.live_at_look = look.holding().any(|f| f.state.is_live());
            self.give(Event::Looked(look));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn no_ordering_of_events_cuts_a_flow_or_holds_without_end(
        until in prop_oneof![3 => Just(Until::Zero), 2 => Just(Until::Idle), 1 => Just(Until::Settled)],
        idle_flows in prop_oneof![Just(IdleFlows::Keep), Just(IdleFlows::Close)],
        deadline_ms in prop_oneof![0..1000_u64, 1000..60_000_u64],
        flows in 0..4_usize,
        ops in ops(),
    ) {
        let mut world = World::new(until, idle_flows, deadline_ms, flows);
        world.give(Event::Tick);
        for op in ops {
            if world.ended.is_some() {
                break;
            }
            world.run(op);
            prop_assert_eq!(world.machine.next_wake().is_none(), world.ended.is_some());
            prop_assert!(world.machine.deadline() <= world.first_deadline);
        }
        if world.ended.is_none() {
            let deadline = world.machine.deadline().since(START).as_millis() as u64;
            world.pass(deadline.saturating_sub(world.now));
            world.give(Event::Tick);
        }
        prop_assert!(world.ended.is_some(), "held past its deadline");
        prop_assert!(world.machine.report(world.time()).phase == Phase::Released);
    }

    #[test]
    fn waking_it_as_it_asks_never_spins(until in prop_oneof![Just(Until::Zero), Just(Until::Idle)], idle_flows in prop_oneof![Just(IdleFlows::Keep), Just(IdleFlows::Close)], flows in 0..4_usize, ops in ops()) {
        let mut world = World::new(until, idle_flows, 60_000, flows);
        world.give(Event::Tick);
        for op in ops {
            if world.ended.is_none() {
                world.run(op);
            }
        }
        let mut steps = 0;
        while world.ended.is_none() {
            world.run(Op::Wake);
            world.run(Op::TakeLook);
            world.run(Op::EndLook { fails: false });
            steps += 1;
            // One look in 100 ms, each with its wake, and some for the growing pauses.
            prop_assert!(steps < 1400, "spinning: {:?}", world.machine);
        }
    }
}
