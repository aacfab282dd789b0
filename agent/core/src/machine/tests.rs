//! The machine, one ordering of events at a time.

mod closing_idle;
mod deadlines;
mod dumps;
mod exemptions;
mod idle;
mod notifying;
mod settling;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{
    closing::{MAX_PER_ROUND, ROUND_INTERVAL},
    requests::MAX_FAILED_DUMPS,
    *,
};
use crate::{
    arrivals::Arrivals,
    drain_report::{DeadlineCause, LatePeer, SettleRule},
    flow::{Direction, Exempt, Flow, FlowCounts, FlowState},
    ids::{PodName, PodUid, SocketCookie},
    policy::IdleFlows,
};

/// The beginning of every drain here.
pub(super) const START: BootTime = BootTime::from_nanos(1_000_000_000_000);

pub(super) fn at(ms: u64) -> BootTime {
    START + Duration::from_millis(ms)
}

pub(super) fn subject() -> Subject {
    Subject {
        pod: PodName {
            uid: PodUid::new("uid"),
            namespace: "shop".into(),
            name: "web-0".into(),
        },
        workload: None,
        started_at: "2026-01-01T00:00:00Z".into(),
        warnings: vec![],
        traceparent: None,
    }
}

pub(super) fn flow(cookie: u64, state: FlowState) -> Flow {
    Flow {
        cookie: SocketCookie(cookie),
        direction: Direction::Inbound,
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: remote(cookie),
        state,
        exempt: None,
        age: Age::Known(Duration::from_secs(600)),
        quiet_for: Duration::ZERO,
        unanswered_for: None,
        bytes_in: 1,
        bytes_out: 2,
        cgroup: None,
    }
}

pub(super) fn remote(cookie: u64) -> SocketAddr {
    let [.., a, b] = cookie.to_be_bytes();
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 9, a, b)), 40_000)
}

pub(super) fn opened(cookie: u64, ms: u64) -> Event {
    Event::FlowOpened {
        cookie: SocketCookie(cookie),
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: remote(cookie),
        at: at(ms),
    }
}

pub(super) fn closed(cookie: u64, ms: u64) -> Event {
    Event::FlowClosed {
        cookie: SocketCookie(cookie),
        at: at(ms),
    }
}

fn dumped(ms: u64, flows: &[Flow]) -> Event {
    Event::Dumped(Snapshot {
        taken_at: at(ms),
        flows: flows.to_vec(),
        listens: None,
    })
}

/// Lookups have shown these.
fn found(ms: u64, flows: &[Flow]) -> Event {
    Event::LookedUp(Snapshot {
        taken_at: at(ms),
        flows: flows.to_vec(),
        listens: None,
    })
}

/// The request to look these up.
fn look_up(cookies: &[u64]) -> Option<Action> {
    let ends = cookies.iter().map(|n| {
        let flow = flow(*n, Active);
        FlowEndpoints {
            cookie: flow.cookie,
            local: flow.local,
            remote: flow.remote,
        }
    });
    Some(Action::LookUp(ends.collect()))
}

/// A dump of a pod in which nothing listens.
fn without_listener(ms: u64, flows: &[Flow]) -> Event {
    Event::Dumped(Snapshot {
        taken_at: at(ms),
        flows: flows.to_vec(),
        listens: Some(false),
    })
}

fn failed() -> Event {
    Event::DumpFailed("no such namespace".into())
}

fn until(until: Until) -> Policy {
    Policy {
        until,
        ..Policy::default()
    }
}

/// A deadline by the grace period.
pub(super) fn by(ms: u64) -> Deadline {
    Deadline {
        at: at(ms),
        cause: DeadlineCause::Grace,
    }
}

fn machine(policy: Policy) -> Machine {
    Machine::new(subject(), policy, START, by(60_000), START)
}

const DUMP: Option<Action> = Some(Action::Dump);

const DRAINED: Option<Action> = Some(Action::Release(ReleaseReason::Drained));

use FlowState::{Active, Awaiting, Flushing, Idle};

/// A machine that has its first dump, and whose snapshot of the drain phase, requested at 3 s, is under way.
fn in_drain(policy: Policy, flows: &[Flow]) -> Machine {
    let mut m = machine(policy);
    assert_eq!(m.step(Event::Tick, START), DUMP);
    assert_eq!(m.step(dumped(0, flows), at(1)), None);
    assert_eq!(m.next_wake(), Some(at(3000)));
    assert_eq!(m.step(Event::Tick, at(3000)), DUMP);
    m
}

/// Steps through time until the machine returns an action, and returns both.
fn next(m: &mut Machine) -> (BootTime, Action) {
    for _ in 0..100 {
        let now = m.next_wake().expect("not released");
        if let Some(action) = m.step(Event::Tick, now) {
            return (now, action);
        }
    }
    panic!("woken a hundred times for nothing: {m:?}");
}
