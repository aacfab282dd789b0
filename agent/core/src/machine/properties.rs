//! Invariants for every ordering of events: a simulated kernel with flows, events and snapshots, and a machine that
//! gets the events late, twice, in any order or not at all.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::{
    settle::MIN_QUIET,
    tests::{START, by, closed, flow, opened, subject},
    *,
};
use crate::{
    arrivals::Arrivals,
    drain_report::SettleRule,
    flow::{Flow, FlowState},
    notification::{Notification, NotificationOutcome},
    policy::IdleFlows,
};

#[derive(Clone, Debug)]
enum Op {
    Open,
    /// The n-th flow closes.
    Close(usize),
    /// The n-th flow becomes active, or idle.
    Speak(usize, bool),
    /// A waiting event is delivered; it may be kept to be delivered again.
    Deliver {
        which: usize,
        keep: bool,
    },
    /// Events are thrown away and the loss is reported.
    Lose,
    /// An event is lost, and the loss is not reported yet.
    Drop(usize),
    /// The kernel answers the snapshot that is under way.
    TakeRead,
    /// As above, but a dump skips the n-th of the open flows that the dump before has shown.
    TakeIncompleteDump(usize),
    /// The kernel's answer arrives at the machine, or a failure.
    EndRead {
        fails: bool,
    },
    /// The pod is known to end, or its last hold is given up.
    Stopping(bool),
    /// A notification has been sent.
    EndNotify,
    Untracked,
    /// The machine gets to know how often clients have connected.
    Arrivals(u64, Option<u64>),
    /// The server begins or stops listening. Flows open only while it listens.
    Listen(bool),
    Limit(u64),
    Pass(u64),
    /// Time passes until the machine's next wake.
    Wake,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let which = 0..16_usize;
    let op = prop_oneof![
        3 => Just(Op::Open),
        4 => which.clone().prop_map(Op::Close),
        2 => (which.clone(), any::<bool>()).prop_map(|(n, live)| Op::Speak(n, live)),
        6 => (which.clone(), prop::bool::weighted(0.2)).prop_map(|(which, keep)| Op::Deliver { which, keep }),
        1 => Just(Op::Lose),
        1 => which.clone().prop_map(Op::Drop),
        8 => Just(Op::TakeRead),
        1 => which.clone().prop_map(Op::TakeIncompleteDump),
        8 => prop::bool::weighted(0.15).prop_map(|fails| Op::EndRead { fails }),
        1 => any::<bool>().prop_map(Op::Stopping),
        2 => Just(Op::EndNotify),
        1 => prop::bool::weighted(0.05).prop_map(|yes| if yes { Op::Untracked } else { Op::Wake }),
        1 => (0..200_000_u64, proptest::option::of(0..200_000_u64))
            .prop_map(|(observed, gap)| Op::Arrivals(observed, gap)),
        1 => any::<bool>().prop_map(Op::Listen),
        1 => (0..80_000_u64).prop_map(Op::Limit),
        3 => prop_oneof![0..5_u64, 0..2000_u64].prop_map(Op::Pass),
        6 => Just(Op::Wake),
    ];
    proptest::collection::vec(op, 0..200)
}

struct WorldFlow {
    open: bool,
    /// The kernel has not stored the end yet, though its event is out.
    still_shown: bool,
    live: bool,
}

/// An event that waits to be delivered, or to be delivered again.
#[derive(Clone)]
struct WorldEvent {
    event: Event,
    received: bool,
    /// How many had been counted, with it.
    number: u64,
}

/// The machine's request.
enum Asked {
    Dump,
    /// How many events had been received by then.
    LookUp(Vec<FlowEndpoints>, u64),
}

struct World {
    machine: Machine,
    now: u64,
    flows: BTreeMap<u64, WorldFlow>,
    events: Vec<WorldEvent>,
    /// Events that the kernel has counted, and those of them that were delivered.
    counted: u64,
    received: u64,
    /// Events were lost, which is not reported yet: the number of the last.
    unheard: Option<u64>,
    asked: Option<Asked>,
    /// The kernel's answer, and how many events it had counted before.
    snapshot: Option<(Snapshot, u64)>,
    /// The flows that were live then.
    live_at_answer: HashSet<u64>,
    /// What the last dump has shown.
    shown: HashSet<u64>,
    by_lookup: bool,
    told_to_close: HashSet<SocketCookie>,
    is_stopping: bool,
    /// The notification that is under way, and those that were sent, in this order.
    telling: Option<Notification>,
    told: Vec<Notification>,
    first_deadline: BootTime,
    listens: bool,
    ended: Option<ReleaseReason>,
}

impl World {
    fn new(until: Until, idle_flows: IdleFlows, deadline_ms: u64, flows: usize) -> Self {
        let policy = Policy {
            until,
            idle_flows,
            stop_signals: "SIGQUIT".parse().unwrap(),
            on_drain: Some("GET :80/drain".parse().unwrap()),
            ..Policy::default()
        };
        let deadline = by(deadline_ms);
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
            events: vec![],
            counted: 0,
            received: 0,
            unheard: None,
            asked: None,
            snapshot: None,
            live_at_answer: HashSet::new(),
            shown: HashSet::new(),
            by_lookup: false,
            told_to_close: HashSet::new(),
            is_stopping: false,
            telling: None,
            told: vec![],
            first_deadline: deadline.at,
            listens: true,
            ended: None,
        }
    }

    fn time(&self) -> BootTime {
        START + Duration::from_millis(self.now)
    }

    fn give(&mut self, event: Event) {
        let has_read = matches!(event, Event::Dumped(_) | Event::LookedUp(_));
        self.by_lookup = matches!(event, Event::LookedUp(_));
        match self.machine.step(event, self.time()) {
            None => {}
            Some(Action::Dump) => {
                let other = self.asked.replace(Asked::Dump);
                assert!(other.is_none(), "two snapshots at a time");
            }
            Some(Action::LookUp(flows)) => {
                assert!(flows.len() <= MAX_LOOKUPS);
                let other = self.asked.replace(Asked::LookUp(flows, self.received));
                assert!(other.is_none(), "two snapshots at a time");
            }
            Some(Action::CloseIdle(idle)) => {
                assert!(has_read, "closed without a fresh snapshot");
                assert_eq!(self.machine.policy().idle_flows, IdleFlows::Close);
                assert!(self.machine.report(self.time()).phase == Phase::Drain);
                for flow in &idle {
                    assert_eq!(flow.state, FlowState::Idle, "a live flow was closed");
                    assert!(self.told_to_close.insert(flow.cookie), "told twice");
                }
                let told = idle.iter().map(|f| f.cookie).collect();
                self.give(Event::IdleClosed(told));
            }
            Some(Action::Notify(notification)) => {
                assert!(self.is_stopping, "told of a pod that may live on");
                assert!(!self.told.contains(&notification), "told twice");
                if let Notification::Signal(..) = notification {
                    assert!(self.machine.report(self.time()).phase == Phase::Drain);
                }
                self.told.push(notification.clone());
                let other = self.telling.replace(notification);
                assert_eq!(other, None, "two notifications at a time");
            }
            Some(Action::Release(reason)) => {
                assert_eq!(self.ended.replace(reason), None, "released twice");
                self.check_release(reason, has_read);
            }
        }
    }

    fn check_release(&self, reason: ReleaseReason, has_read: bool) {
        match reason {
            ReleaseReason::Drained => {
                let until = self.machine.policy().until;
                if until != Until::Settled {
                    assert_eq!(self.telling, None, "released while the application is told");
                    assert!(has_read, "no snapshot agreed");
                    let by = if self.by_lookup {
                        ReleasedBy::Lookup
                    } else {
                        ReleasedBy::Dump
                    };
                    assert_eq!(self.machine.report(self.time()).released_by, Some(by));
                }
                let settle = self
                    .machine
                    .report(self.time())
                    .settle
                    .expect("always told");
                if settle.rule == SettleRule::NoListener {
                    assert!(has_read || self.time() >= START + self.machine.policy().settle_min);
                } else {
                    assert!(self.time() >= START + MIN_QUIET, "it has not settled");
                }
                if until == Until::Zero {
                    assert!(self.flows.values().all(|f| !f.open), "a flow was cut");
                }
                if until == Until::Idle {
                    // A flow that has ended since its snapshot is not cut.
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
            ReleaseReason::Deadline => assert!(self.time() >= self.machine.deadline().at),
            other => panic!("unexpected {other}"),
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
            Op::Listen(listens) => self.listens = listens,
            Op::Arrivals(observed, gap) => {
                let ms = Duration::from_millis;
                self.give(Event::Arrivals(Arrivals {
                    observed: ms(observed),
                    gap: gap.map(ms),
                }));
            }
            Op::Open if !self.listens => {}
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
            Op::Deliver { which, keep } => {
                if let Some(which) = which.checked_rem(self.events.len()) {
                    let event = if keep {
                        let again = self.events[which].clone();
                        self.events[which].received = true;
                        again
                    } else {
                        self.events.swap_remove(which)
                    };
                    self.deliver(event);
                }
            }
            Op::Lose => {
                self.events.clear();
                self.unheard = None;
                self.give(Event::Lost);
            }
            Op::Drop(which) => {
                if let Some(which) = which.checked_rem(self.events.len()) {
                    let event = self.events.swap_remove(which);
                    if !event.received {
                        self.unheard = self.unheard.max(Some(event.number));
                    }
                }
            }
            Op::TakeRead => self.take_read(None),
            Op::TakeIncompleteDump(which) => {
                let open = |n: &&u64| self.flows.get(n).is_some_and(|f| f.open);
                let mut shown: Vec<_> = self.shown.iter().filter(open).copied().collect();
                shown.sort_unstable();
                let walks = matches!(self.asked, Some(Asked::Dump));
                let over = which.checked_rem(shown.len()).filter(|_| walks);
                self.take_read(over.map(|n| shown[n]));
            }
            Op::EndRead { fails } => self.end_read(fails),
            Op::Stopping(is_stopping) => {
                self.is_stopping = is_stopping;
                self.give(Event::Stopping(is_stopping));
            }
            Op::EndNotify => {
                let outcome = match self.telling.take() {
                    None => return,
                    Some(Notification::Signal(..)) => NotificationOutcome::Signaled(vec![]),
                    Some(Notification::Request(_)) => NotificationOutcome::Requested(Ok(200)),
                };
                self.give(Event::Notified(outcome));
            }
            Op::Untracked => self.give(Event::Untracked("the programs are gone".into())),
            Op::Limit(ms) => self.give(Event::Limit(by(ms))),
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
        self.events.push(WorldEvent {
            event,
            received: false,
            number: self.counted,
        });
    }

    fn deliver(&mut self, event: WorldEvent) {
        if !event.received {
            self.received += 1;
        }
        self.give(event.event);
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
                    Asked::Dump => Some(flow),
                    Asked::LookUp(flows, _) => flows
                        .iter()
                        .any(|f| f.cookie == flow.cookie)
                        .then_some(Flow {
                            age: Age::AtLeast(Duration::ZERO),
                            ..flow
                        }),
                }
            });
        Snapshot {
            taken_at: self.time(),
            flows: flows.collect(),
            listens: matches!(asked, Asked::Dump).then_some(self.listens),
        }
    }

    fn take_read(&mut self, over: Option<u64>) {
        if self.snapshot.is_some() {
            return;
        }
        let Some(asked) = &self.asked else {
            return;
        };
        let live = self.flows.iter().filter(|(_, f)| f.open && f.live);
        self.live_at_answer = live.map(|(n, _)| *n).collect();
        let mut picture = self.picture(asked);
        picture.flows.retain(|f| Some(f.cookie.0) != over);
        self.snapshot = Some((picture, self.counted));
    }

    fn end_read(&mut self, fails: bool) {
        if self.snapshot.is_none() && !fails {
            return;
        }
        let Some(asked) = self.asked.take() else {
            return;
        };
        let snapshot = self.snapshot.take();
        // The driver's promise: no snapshot before the open events that the kernel had reported by then, and no
        // dump before the report of a loss. Lookups do not rely on it for what was counted before them.
        let before = match (&asked, &snapshot) {
            (Asked::LookUp(..), Some((_, counted))) => *counted,
            _ => 0,
        };
        // The machine is still waiting for its answer.
        self.asked = Some(asked);
        if self.unheard.is_some_and(|number| number > before) {
            self.unheard = None;
            self.give(Event::Lost);
        }
        for n in 0..self.events.len() {
            let event = self.events[n].clone();
            if matches!(event.event, Event::FlowOpened { .. }) && event.number > before {
                self.events[n].received = true;
                self.deliver(event);
            }
        }
        if self.ended.is_some() {
            return;
        }
        let answer = match (self.asked.take(), snapshot) {
            (Some(Asked::Dump), Some((snapshot, _))) if !fails => {
                self.shown = snapshot.flows.iter().map(|f| f.cookie.0).collect();
                Event::Dumped(snapshot)
            }
            (Some(Asked::LookUp(_, received)), Some((found, counted))) if !fails => {
                if received == counted {
                    Event::LookedUp(found)
                } else if self.received >= counted {
                    Event::Outdated
                } else {
                    Event::Unclear(DumpReason::LookupFailed)
                }
            }
            (Some(Asked::Dump), _) => Event::DumpFailed("busy".into()),
            _ => Event::Unclear(DumpReason::LookupFailed),
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
            prop_assert!(world.machine.deadline().at <= world.first_deadline);
        }
        if world.ended.is_none() {
            let deadline = world.machine.deadline().at.since(START).as_millis() as u64;
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
            world.run(Op::TakeRead);
            world.run(Op::EndRead { fails: false });
            steps += 1;
            // One snapshot in 100 ms, or a round of lookups, each with its wake, and some for the growing pauses.
            prop_assert!(steps < 1400, "spinning: {:?}", world.machine);
        }
    }
}

#[test]
fn a_flow_that_a_dump_misses_and_that_then_ends_holds_nothing() {
    let mut world = World::new(Until::Idle, IdleFlows::Keep, 60_000, 2);
    world.give(Event::Tick);
    let mut until = |ops: &[Op]| ops.iter().for_each(|op| world.run(op.clone()));
    let answer = Op::EndRead { fails: false };
    until(&[Op::TakeRead, answer.clone(), Op::Wake]);
    // The first flow is idle, the second is live, and the dump misses it.
    until(&[Op::TakeIncompleteDump(1), Op::Close(1)]);
    let event = Op::Deliver {
        which: 0,
        keep: false,
    };
    until(&[event, answer]);
    assert_eq!(world.ended, Some(ReleaseReason::Drained));
}

#[test]
fn in_this_world_lookups_release_what_events_have_emptied() {
    let mut world = World::new(Until::Zero, IdleFlows::Keep, 60_000, 3);
    world.give(Event::Tick);
    let mut until = |ops: &[Op]| ops.iter().for_each(|op| world.run(op.clone()));
    let snapshot = [Op::TakeRead, Op::EndRead { fails: false }];
    until(&snapshot);
    until(&[Op::Wake]);
    until(&snapshot);
    until(&[
        Op::Open,
        Op::Close(0),
        Op::Close(0),
        Op::Close(0),
        Op::Close(0),
    ]);
    let event = Op::Deliver {
        which: 0,
        keep: false,
    };
    until(&vec![event.clone(); 4]);
    until(&[Op::Pass(10), event]);
    until(&snapshot);
    assert_eq!(world.ended, Some(ReleaseReason::Drained));
    assert!(world.by_lookup);
}
