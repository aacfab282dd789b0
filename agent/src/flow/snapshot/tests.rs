//! Which flows hold, and what is counted.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::flow::{Acceptance, sample::testing::sample};

const NOW: BootTime = BootTime::from_nanos(100_000_000_000);
const IDLE_AFTER: Duration = Duration::from_secs(5);

const ACCEPTED: Origin = Origin::Accepted(Acceptance {
    opened_at: BootTime::from_nanos(90_000_000_000),
    seeded: false,
    probe: false,
});

fn connection(origin: Origin, local: &str, remote: &str) -> Sample {
    static INODES: AtomicU32 = AtomicU32::new(1);
    Sample {
        inode: INODES.fetch_add(1, Ordering::Relaxed),
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        origin,
        ..sample()
    }
}

/// As on the host's network, where addresses tell nothing.
fn nobodys(_: IpAddr) -> bool {
    false
}

fn exempt(samples: &[Sample]) -> Vec<Option<Exempt>> {
    let snapshot = Snapshot::new(NOW, samples, IDLE_AFTER, |port| port != 9090, nobodys);
    snapshot.flows.iter().map(|f| f.exempt).collect()
}

#[test]
fn inbound_flows_hold_and_outbound_ones_do_not() {
    let samples = [
        connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000"),
        connection(Origin::Dialled, "10.0.0.2:40000", "10.0.0.9:5432"),
    ];
    assert_eq!(exempt(&samples), [None, Some(Exempt::Outbound)]);
}

#[test]
fn a_socket_without_a_record_holds_because_not_knowing_must_not_cut_anybody_off() {
    let samples = [connection(Origin::Unknown, "10.0.0.2:80", "10.0.0.9:5000")];
    assert_eq!(exempt(&samples), [None]);
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, nobodys);
    assert_eq!(snapshot.flows[0].age, None);
    assert_eq!(
        snapshot.flows[0].since,
        Since::Unknown,
        "nobody can tell whether it is older than the agent"
    );
}

#[test]
fn a_flow_with_both_ends_in_the_pod_does_not_hold() {
    let samples = [
        connection(ACCEPTED, "127.0.0.1:9000", "127.0.0.1:40000"),
        connection(Origin::Dialled, "127.0.0.1:40000", "127.0.0.1:9000"),
        // The same ports on other addresses are another connection.
        connection(ACCEPTED, "10.0.0.2:9000", "10.0.0.3:40000"),
    ];
    assert_eq!(
        exempt(&samples),
        [Some(Exempt::InPod), Some(Exempt::Outbound), None]
    );
}

#[test]
fn a_flow_from_an_address_of_the_pods_own_does_not_hold_though_its_other_end_is_gone() {
    let samples = [
        connection(ACCEPTED, "127.0.0.1:9000", "127.0.0.1:40000"),
        connection(ACCEPTED, "10.0.0.2:9000", "10.0.0.2:40000"),
        connection(ACCEPTED, "10.0.0.2:9000", "10.0.0.3:40000"),
    ];
    let own = |ip: IpAddr| ip.is_loopback() || ip == samples[1].remote.ip();
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, own);
    let exempt: Vec<_> = snapshot.flows.iter().map(|f| f.exempt).collect();
    assert_eq!(exempt, [Some(Exempt::InPod), Some(Exempt::InPod), None]);
}

#[test]
fn a_flow_on_a_port_that_the_policy_ignores_does_not_hold() {
    let samples = [connection(ACCEPTED, "10.0.0.2:9090", "10.0.0.9:5000")];
    assert_eq!(exempt(&samples), [Some(Exempt::IgnoredPort)]);
}

#[test]
fn what_the_kubelet_dialled_does_not_hold() {
    let probe = Origin::Accepted(Acceptance {
        opened_at: NOW,
        seeded: false,
        probe: true,
    });
    let probe = connection(probe, "10.0.0.2:80", "10.0.0.1:5000");
    assert_eq!(exempt(&[probe]), [Some(Exempt::Probe)]);
}

#[test]
fn listeners_are_no_flows_and_make_no_peer_of_anything() {
    let samples = [
        Sample {
            state: TcpState::Listen,
            ..connection(Origin::Unknown, "0.0.0.0:80", "0.0.0.0:0")
        },
        connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000"),
    ];
    assert_eq!(exempt(&samples), [None]);
}

#[test]
fn counts_are_of_the_flows_that_hold() {
    let samples = [
        connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000"),
        Sample {
            state: TcpState::FinWait1,
            ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5001")
        },
        connection(Origin::Dialled, "10.0.0.2:40000", "10.0.0.9:5432"),
    ];
    let counts = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, nobodys).counts();
    assert_eq!((counts.active, counts.flushing, counts.total()), (1, 1, 2));
    assert_eq!(counts.live(), 2);
}

#[test]
fn the_peers_fin_is_not_a_byte() {
    let inbound = || connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000");
    let samples = [
        Sample {
            bytes_received: 5,
            ..inbound()
        },
        Sample {
            bytes_received: 6,
            state: TcpState::CloseWait,
            ..inbound()
        },
    ];
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, nobodys);
    assert!(snapshot.flows.iter().all(|f| f.bytes_in == 5));
}

#[test]
fn ages_count_from_the_handshake() {
    let samples = [connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000")];
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, nobodys);
    assert_eq!(snapshot.flows[0].age, Some(Duration::from_secs(10)));
}

#[test]
fn what_is_connected_to_ebb_itself_does_not_hold() {
    let samples = [Sample {
        to_wait_port: true,
        ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.1:5000")
    }];
    assert_eq!(exempt(&samples), [Some(Exempt::WaitPort)]);
}

fn subflows(of: [(Duration, u64); 2]) -> [Sample; 2] {
    of.map(|(quiet, bytes)| Sample {
        cookie: SocketCookie(bytes),
        inode: 4711,
        since_sent: quiet,
        since_received: quiet + Duration::from_secs(1),
        bytes_received: bytes,
        bytes_acked: 1,
        ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000")
    })
}

#[test]
fn the_subflows_of_a_multipath_connection_are_one_flow_that_is_live_if_any_is() {
    let (long, now) = (Duration::from_secs(60), Duration::ZERO);
    for (quiet, state) in [
        ([long, now], FlowState::Active),
        ([now, long], FlowState::Active),
        ([long, long], FlowState::Idle),
    ] {
        let samples = subflows([(quiet[0], 7), (quiet[1], 8)]);
        let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, nobodys);
        assert_eq!(snapshot.flows.len(), 1);
        let flow = &snapshot.flows[0];
        assert_eq!((flow.state, flow.bytes_in, flow.bytes_out), (state, 15, 2));
        assert_eq!(flow.quiet_for, *quiet.iter().min().unwrap());
        let named = (flow.cookie, flow.others.as_slice());
        assert_eq!(
            named,
            (SocketCookie(7), &[SocketCookie(8)][..]),
            "whatever they do"
        );
        assert_eq!(snapshot.counts().total(), 1);
    }
}

#[test]
fn sockets_that_nobody_has_accepted_are_flows_of_their_own() {
    let samples =
        subflows([(Duration::ZERO, 1), (Duration::ZERO, 2)]).map(|s| Sample { inode: 0, ..s });
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, nobodys);
    assert_eq!(snapshot.flows.len(), 2);
}
