//! What must hold for every ordering of events: a world of flows, its kernel's edges and looks, and a
//! machine that hears of them late, twice, in any order or not at all.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::{
    tests::{START, closed, flow, opened, subject},
    *,
};
use crate::drain::policy::IdleFlows;

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
    /// Edges are thrown away and the loss is reported.
    Lose,
    /// An edge is lost, and nobody hears of it for now.
    Drop(usize),
    /// The kernel answers the look that is under way …
    TakeLook,
    /// … and a walk passes over the n-th of the open flows that the walk before has shown …
    TakePoorLook(usize),
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
        6 => (which.clone(), prop::bool::weighted(0.2)).prop_map(|(which, keep)| Op::Edge { which, keep }),
        1 => Just(Op::Lose),
        1 => which.clone().prop_map(Op::Drop),
        8 => Just(Op::TakeLook),
        1 => which.clone().prop_map(Op::TakePoorLook),
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

/// An edge that waits to be delivered, or to be delivered again.
#[derive(Clone)]
struct WorldEdge {
    event: Event,
    received: bool,
    /// How many had been counted, with it.
    number: u64,
}

/// What the machine has asked for.
enum Asked {
    Walk,
    /// So many edges had been received by then.
    LookUp(Vec<Ends>, u64),
}

struct World {
    machine: Machine,
    now: u64,
    flows: BTreeMap<u64, WorldFlow>,
    edges: Vec<WorldEdge>,
    /// Edges that the kernel has counted, and those of them that were delivered.
    counted: u64,
    received: u64,
    /// Nobody has heard yet that edges were lost: the number of the last.
    unheard: Option<u64>,
    asked: Option<Asked>,
    /// The kernel's answer, and how many edges it had counted before.
    look: Option<(Snapshot, u64)>,
    /// The flows that were live then.
    live_at_answer: HashSet<u64>,
    /// What the last walk has shown.
    shown: HashSet<u64>,
    by_lookup: bool,
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
            counted: 0,
            received: 0,
            unheard: None,
            asked: None,
            look: None,
            live_at_answer: HashSet::new(),
            shown: HashSet::new(),
            by_lookup: false,
            told_to_close: HashSet::new(),
            first_deadline: deadline,
            ended: None,
        }
    }

    fn time(&self) -> BootTime {
        START + Duration::from_millis(self.now)
    }

    fn give(&mut self, event: Event) {
        let looked = matches!(event, Event::Looked(_) | Event::LookedUp(_));
        self.by_lookup = matches!(event, Event::LookedUp(_));
        match self.machine.step(event, self.time()) {
            None => {}
            Some(Action::Look) => {
                let other = self.asked.replace(Asked::Walk);
                assert!(other.is_none(), "two looks at a time");
            }
            Some(Action::LookUp(flows)) => {
                assert!(flows.len() <= FEW);
                let other = self.asked.replace(Asked::LookUp(flows, self.received));
                assert!(other.is_none(), "two looks at a time");
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
                    let by = if self.by_lookup {
                        LookKind::Lookup
                    } else {
                        LookKind::Walk
                    };
                    assert_eq!(self.machine.report(self.time()).released_by, Some(by));
                }
                if until == Until::Zero {
                    assert!(self.flows.values().all(|f| !f.open), "a flow was cut");
                }
                if until == Until::Idle {
                    // One that has ended since its look is cut by nobody.
                    let open = |n: &u64| self.flows.get(n).is_some_and(|f| f.open);
                    assert!(!self.live_at_answer.iter().any(open), "a live flow was cut");
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
                self.count(opened(cookie, self.now));
            }
            Op::Close(n) => {
                let now = self.now;
                if let Some((cookie, flow)) = self.nth_open(n) {
                    (flow.open, flow.still_shown) = (false, true);
                    self.count(closed(cookie, now));
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
                        let again = self.edges[which].clone();
                        self.edges[which].received = true;
                        again
                    } else {
                        self.edges.swap_remove(which)
                    };
                    self.deliver(edge);
                }
            }
            Op::Lose => {
                self.edges.clear();
                self.unheard = None;
                self.give(Event::Lost);
            }
            Op::Drop(which) => {
                if let Some(which) = which.checked_rem(self.edges.len()) {
                    let edge = self.edges.swap_remove(which);
                    if !edge.received {
                        self.unheard = self.unheard.max(Some(edge.number));
                    }
                }
            }
            Op::TakeLook => self.take_look(None),
            Op::TakePoorLook(which) => {
                let open = |n: &&u64| self.flows.get(n).is_some_and(|f| f.open);
                let mut shown: Vec<_> = self.shown.iter().filter(open).copied().collect();
                shown.sort_unstable();
                let walks = matches!(self.asked, Some(Asked::Walk));
                let over = which.checked_rem(shown.len()).filter(|_| walks);
                self.take_look(over.map(|n| shown[n]));
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

    fn count(&mut self, event: Event) {
        self.counted += 1;
        self.edges.push(WorldEdge {
            event,
            received: false,
            number: self.counted,
        });
    }

    fn deliver(&mut self, edge: WorldEdge) {
        if !edge.received {
            self.received += 1;
        }
        self.give(edge.event);
    }

    fn picture(&self, asked: &Asked) -> Snapshot {
        let shown = self.flows.iter().filter(|(_, f)| f.open || f.still_shown);
        let flows =
            shown.filter_map(|(cookie, f)| {
                let state = if f.live {
                    FlowState::Active
                } else {
                    FlowState::Idle
                };
                let flow = flow(*cookie, state);
                match asked {
                    Asked::Walk => Some(flow),
                    Asked::LookUp(flows, _) => flows
                        .iter()
                        .any(|f| f.cookie == flow.cookie)
                        .then_some(Flow {
                            age: None,
                            since: Since::BeforeAgent,
                            ..flow
                        }),
                }
            });
        Snapshot {
            taken_at: self.time(),
            flows: flows.collect(),
        }
    }

    fn take_look(&mut self, over: Option<u64>) {
        if self.look.is_some() {
            return;
        }
        let Some(asked) = &self.asked else {
            return;
        };
        let live = self.flows.iter().filter(|(_, f)| f.open && f.live);
        self.live_at_answer = live.map(|(n, _)| *n).collect();
        let mut picture = self.picture(asked);
        picture.flows.retain(|f| Some(f.cookie.0) != over);
        self.look = Some((picture, self.counted));
    }

    fn end_look(&mut self, fails: bool) {
        if self.look.is_none() && !fails {
            return;
        }
        let Some(asked) = self.asked.take() else {
            return;
        };
        let look = self.look.take();
        // The driver's promise: no look before the open edges that the kernel had reported by then, and no
        // walk before word of a loss. Lookups do not rely on it for what was counted before them.
        let before = match (&asked, &look) {
            (Asked::LookUp(..), Some((_, counted))) => *counted,
            _ => 0,
        };
        // The machine is still waiting for its answer.
        self.asked = Some(asked);
        if self.unheard.is_some_and(|number| number > before) {
            self.unheard = None;
            self.give(Event::Lost);
        }
        for n in 0..self.edges.len() {
            let edge = self.edges[n].clone();
            if matches!(edge.event, Event::FlowOpened { .. }) && edge.number > before {
                self.edges[n].received = true;
                self.deliver(edge);
            }
        }
        if self.ended.is_some() {
            return;
        }
        let answer = match (self.asked.take(), look) {
            (Some(Asked::Walk), Some((look, _))) if !fails => {
                self.shown = look.flows.iter().map(|f| f.cookie.0).collect();
                Event::Looked(look)
            }
            (Some(Asked::LookUp(_, received)), Some((found, counted))) if !fails => {
                if received == counted {
                    Event::LookedUp(found)
                } else if self.received >= counted {
                    Event::Outdated
                } else {
                    Event::Unclear
                }
            }
            (Some(Asked::Walk), _) => Event::LookFailed("busy".into()),
            _ => Event::Unclear,
        };
        self.give(answer);
    }
}

proptest! {
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
            // One look in 100 ms, or a round of lookups, each with its wake, and some for the growing pauses.
            prop_assert!(steps < 1400, "spinning: {:?}", world.machine);
        }
    }
}

#[test]
fn a_flow_that_a_walk_passes_over_and_that_then_ends_is_in_nobodys_way() {
    let mut world = World::new(Until::Idle, IdleFlows::Keep, 60_000, 2);
    world.give(Event::Tick);
    let mut until = |ops: &[Op]| ops.iter().for_each(|op| world.run(op.clone()));
    let answer = Op::EndLook { fails: false };
    until(&[Op::TakeLook, answer.clone(), Op::Wake]);
    // The first flow is idle, the second is live, and the walk misses it.
    until(&[Op::TakePoorLook(1), Op::Close(1)]);
    let edge = Op::Edge {
        which: 0,
        keep: false,
    };
    until(&[edge, answer]);
    assert_eq!(world.ended, Some(ReleaseReason::Drained));
}

#[test]
fn in_this_world_lookups_release_what_edges_have_emptied() {
    let mut world = World::new(Until::Zero, IdleFlows::Keep, 60_000, 3);
    world.give(Event::Tick);
    let mut until = |ops: &[Op]| ops.iter().for_each(|op| world.run(op.clone()));
    let look = [Op::TakeLook, Op::EndLook { fails: false }];
    until(&look);
    until(&[Op::Wake]);
    until(&look);
    until(&[
        Op::Open,
        Op::Close(0),
        Op::Close(0),
        Op::Close(0),
        Op::Close(0),
    ]);
    let edge = Op::Edge {
        which: 0,
        keep: false,
    };
    until(&vec![edge.clone(); 4]);
    until(&[Op::Pass(10), edge]);
    until(&look);
    assert_eq!(world.ended, Some(ReleaseReason::Drained));
    assert!(world.by_lookup);
}
