//! Flows and pods that hold otherwise: lost peers, forwarded traffic, port rules, dialled flows.

use super::*;

#[test]
fn a_lost_flow_holds_under_no_policy() {
    for policy in [Until::Zero, Until::Idle].map(until) {
        let lost = [flow(1, FlowState::Lost)];
        let mut m = in_drain(policy, &[flow(1, Active)]);
        assert_eq!(m.step(dumped(3000, &lost), at(3001)), DRAINED);
        let report = m.report(at(3001));
        assert_eq!(report.cut[0].state, FlowState::Lost);
    }
}

#[test]
fn a_drain_looks_flows_up_when_the_peer_of_its_last_one_may_be_lost() {
    let silent_for = |cookie, ms| Flow {
        unanswered_for: Some(Duration::from_millis(ms)),
        ..flow(cookie, Active)
    };
    let flows = [silent_for(1, 18_500), silent_for(2, 17_000)];
    let mut m = in_drain(until(Until::Zero), &flows);
    m.step(dumped(3000, &flows), at(3001));
    assert_eq!(m.next_wake(), Some(at(6000)), "both must be lost");
    assert_eq!(m.step(Event::Tick, at(6000)), look_up(&[1, 2]));
    // One peer has answered meanwhile, and the other is lost: the next dump is the regular one.
    let now = [flow(1, Active), flow(2, FlowState::Lost)];
    assert_eq!(m.step(found(6000, &now), at(6001)), None);
    assert_eq!(m.next_wake(), Some(at(8001)));
    m.step(closed(1, 6100), at(6100));
    let found = Event::LookedUp(Snapshot {
        taken_at: at(6100),
        flows: vec![flow(2, FlowState::Lost)],
        listens: None,
    });
    assert_eq!(m.step(found, at(6101)), DRAINED);
}

#[test]
fn a_pod_that_forwards_traffic_ends_as_untracked_after_settle() {
    for policy in [Until::Zero, Until::Settled].map(until) {
        let mut m = machine(policy);
        assert_eq!(m.step(Event::Tick, START), DUMP);
        assert_eq!(m.step(Event::Hidden("tap0".into()), at(1)), None);
        assert_eq!(m.step(dumped(0, &[]), at(1)), None);
        if m.policy().until == Until::Zero {
            assert_eq!(m.step(Event::Tick, at(3000)), DUMP);
            assert_eq!(m.step(Event::Hidden("tap0".into()), at(3001)), None);
            assert_eq!(m.step(dumped(3000, &[]), at(3001)), None);
        } else {
            assert_eq!(m.step(Event::Tick, at(3000)), None);
        }
        assert_eq!(m.next_wake(), Some(at(15_000)));
        let released = Some(Action::Release(ReleaseReason::Untracked));
        assert_eq!(m.step(Event::Tick, at(15_000)), released);
        let report = m.report(at(15_000));
        assert_eq!(report.detail.as_deref(), Some("tap0"));
        assert_eq!(report.released_by, None);
    }
}

#[test]
fn a_pod_that_forwards_traffic_settles_although_nothing_listens_in_it() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(Event::Hidden("tap0".into()), at(1));
    assert_eq!(m.step(without_listener(0, &[]), at(2)), None);
    assert!(m.next_wake().unwrap() >= at(500));
}

#[test]
fn a_pod_that_forwards_traffic_is_held_for_its_own_flows() {
    let mut m = machine(until(Until::Zero));
    m.step(Event::Tick, START);
    m.step(Event::Hidden("tap0".into()), at(1));
    m.step(dumped(0, &[flow(1, Active)]), at(1));
    assert_eq!(m.step(Event::Tick, at(3000)), DUMP);
    assert_eq!(m.step(dumped(3000, &[flow(1, Active)]), at(3001)), None);
    m.step(Event::Tick, at(20_000));
    m.step(dumped(20_000, &[flow(1, Active)]), at(20_001));
    assert_eq!(m.step(closed(1, 20_100), at(20_100)), look_up(&[1]));
    let released = Some(Action::Release(ReleaseReason::Untracked));
    assert_eq!(m.step(found(20_100, &[]), at(20_101)), released);
}

#[test]
fn a_port_rule_is_compared_once_with_the_ports_in_use() {
    use crate::flow::{Sample, TcpState};
    let listens = |port: u16| {
        PortsInUse::of(&[Sample::new(
            SocketCookie(1),
            ([10, 0, 0, 1], port).into(),
            ([0, 0, 0, 0], 0).into(),
            TcpState::Listen,
        )])
    };
    let only = |port| Policy {
        ports: vec![port],
        ..Policy::default()
    };
    let mut m = machine(only(8080));
    assert!(m.wants_ports());
    m.step(Event::PortsInUse(listens(15006)), at(1));
    assert!(!m.wants_ports() && m.policy().holds_port(15006));
    assert_eq!(m.warnings().len(), 1);
    assert_eq!(m.report(at(1)).warnings, m.warnings());
    // A server that stops listening during the drain changes nothing.
    let mut m = machine(only(8080));
    m.step(Event::PortsInUse(listens(8080)), at(1));
    m.step(Event::PortsInUse(listens(9090)), at(2));
    assert!(!m.policy().holds_port(9090) && m.warnings().is_empty());
}

#[test]
fn a_dialled_flow_may_hold_while_it_is_live_and_only_dumps_release_it() {
    let policy = Policy {
        outbound: crate::policy::Outbound::Hold,
        ..until(Until::Zero)
    };
    let dialled = |state| Flow {
        direction: Direction::Outbound,
        age: Age::AtLeast(Duration::ZERO),
        quiet_for: Duration::from_secs(1),
        ..flow(7, state)
    };
    let mut m = in_drain(policy, &[flow(1, Active)]);
    let both = [flow(1, Active), dialled(Awaiting)];
    assert_eq!(m.step(dumped(3000, &both), at(3001)), None);
    assert_eq!(m.report(at(3001)).arrived, Some(0), "the pod dialled it");
    // No event reports its end, and an event about the end of another flow costs a dump.
    m.step(closed(1, 3100), at(3100));
    assert_eq!(m.next_wake(), Some(at(8000)));
    assert_eq!(m.step(Event::Tick, at(8000)), DUMP);
    assert_eq!(m.step(dumped(8000, &[dialled(Active)]), at(8001)), None);
    assert_eq!(m.next_wake(), Some(at(12_000)), "it can be idle then");
    assert_eq!(m.step(Event::Tick, at(12_000)), DUMP);
    let idle = dumped(12_000, &[dialled(Idle)]);
    assert_eq!(m.step(idle, at(12_001)), DRAINED);
    assert_eq!(m.report(at(12_001)).lookups, 0);
}
