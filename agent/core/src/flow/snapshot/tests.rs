//! Which flows hold a drain, and what is counted.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::flow::sample::testing::sample;

const NOW: BootTime = BootTime::from_nanos(100_000_000_000);
const IDLE_AFTER: Duration = Duration::from_secs(5);

const ACCEPTED: Origin = Origin::Accepted;

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

/// As on the host's network, where no address belongs to one pod.
fn no_pods(_: IpAddr) -> bool {
    false
}

fn exempt(samples: &[Sample]) -> Vec<Option<Exempt>> {
    let snapshot = Snapshot::new(NOW, samples, IDLE_AFTER, |port| port != 9090, no_pods);
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
fn a_socket_that_could_not_be_read_holds_and_is_live() {
    let samples = [connection(Origin::Unknown, "10.0.0.2:80", "10.0.0.9:5000")];
    assert_eq!(exempt(&samples), [None]);
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, no_pods);
    assert!(snapshot.flows[0].state.is_live());
}

#[test]
fn an_unknown_age_is_at_least_the_time_since_the_last_byte() {
    let quiet = Duration::from_secs(7);
    let samples = [Sample {
        since_sent: quiet,
        since_received: quiet * 2,
        ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000")
    }];
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, no_pods);
    assert_eq!(snapshot.flows[0].age, Age::AtLeast(quiet));
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
fn a_flow_from_the_pods_own_address_does_not_hold_even_if_its_other_end_is_gone() {
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
fn a_flow_that_the_kubelet_dialled_does_not_hold() {
    let probe = Sample {
        probe: true,
        ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.1:5000")
    };
    assert_eq!(exempt(&[probe]), [Some(Exempt::Probe)]);
}

#[test]
fn listeners_are_no_flows() {
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
fn counts_cover_only_the_flows_that_hold() {
    let samples = [
        connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000"),
        Sample {
            state: TcpState::FinWait1,
            ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5001")
        },
        connection(Origin::Dialled, "10.0.0.2:40000", "10.0.0.9:5432"),
    ];
    let counts = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, no_pods).counts();
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
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, no_pods);
    assert!(snapshot.flows.iter().all(|f| f.bytes_in == 5));
}

#[test]
fn ages_count_from_the_handshake() {
    let age = Duration::from_secs(10);
    let samples = [Sample {
        age: Some(age),
        ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000")
    }];
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true, no_pods);
    assert_eq!(snapshot.flows[0].age, Age::Known(age));
}

#[test]
fn a_flow_to_ebbs_own_listener_does_not_hold() {
    let samples = [Sample {
        to_wait_port: true,
        ..connection(ACCEPTED, "10.0.0.2:80", "10.0.0.1:5000")
    }];
    assert_eq!(exempt(&samples), [Some(Exempt::WaitPort)]);
}

/// Both ends of a connection whose addresses are translated on the way, and the first sequence numbers of both sides.
fn through_a_service(dialler: u32, server: u32) -> [Sample; 2] {
    let start = |sent, received| Some(SequenceStart { sent, received });
    [
        Sample {
            sequence: start(server.wrapping_add(1), dialler.wrapping_add(1)),
            ..connection(ACCEPTED, "10.0.0.2:8080", "10.0.0.1:31000")
        },
        Sample {
            sequence: start(dialler, server.wrapping_add(1)),
            ..connection(Origin::Dialled, "10.0.0.2:40000", "10.96.0.1:80")
        },
    ]
}

#[test]
fn a_connection_of_the_pod_to_itself_through_its_service_does_not_hold() {
    for (dialler, server) in [(7, 1_000_000), (u32::MAX, u32::MAX - 1), (0, u32::MAX)] {
        assert_eq!(
            exempt(&through_a_service(dialler, server)),
            [Some(Exempt::InPod), Some(Exempt::Outbound)],
            "{dialler} {server}"
        );
    }
}

#[test]
fn a_client_is_not_taken_for_the_pod_if_only_one_sequence_number_agrees_or_none_is_known() {
    let [accepted, dialled] = through_a_service(7, 1_000_000);
    let with = |sequence| Sample {
        sequence,
        ..dialled.clone()
    };
    let start = dialled.sequence.unwrap();
    for other in [
        None,
        Some(SequenceStart { sent: 10, ..start }),
        Some(SequenceStart {
            received: start.received + 2,
            ..start
        }),
        Some(SequenceStart {
            sent: start.received,
            received: start.sent,
        }),
    ] {
        let samples = [accepted.clone(), with(other)];
        assert_eq!(exempt(&samples)[0], None, "{other:?}");
    }
    let unread = Sample {
        sequence: None,
        ..accepted.clone()
    };
    assert_eq!(exempt(&[unread, dialled.clone()])[0], None);
    // Another accepted connection is no other end.
    let also_accepted = Sample {
        origin: ACCEPTED,
        ..dialled
    };
    assert_eq!(exempt(&[accepted, also_accepted]), [None, None]);
}

#[test]
fn dialled_flows_hold_where_the_policy_says_so_unless_both_ends_are_in_the_pod() {
    let policy = crate::policy::Policy {
        outbound: "5672".parse().unwrap(),
        // A rule about the pod's own ports.
        ports: vec![8080],
        ..crate::policy::Policy::default()
    };
    let [accepted, mut through_service] = through_a_service(7, 9);
    through_service.remote.set_port(5672);
    let samples = [
        connection(Origin::Dialled, "10.0.0.2:40000", "10.0.0.9:5672"),
        connection(Origin::Dialled, "10.0.0.2:40000", "10.0.0.9:443"),
        connection(Origin::Dialled, "127.0.0.1:40001", "127.0.0.1:5672"),
        connection(ACCEPTED, "127.0.0.1:5672", "127.0.0.1:40001"),
        accepted,
        through_service,
    ];
    let snapshot = Snapshot::new(
        NOW,
        &samples,
        policy.classify_options(),
        |port| policy.holds_port(port),
        no_pods,
    );
    let exempt: Vec<_> = snapshot.flows.iter().map(|f| f.exempt).collect();
    let in_pod = Some(Exempt::InPod);
    assert_eq!(
        exempt,
        [None, Some(Exempt::Outbound), in_pod, in_pod, in_pod, in_pod]
    );
}

#[test]
fn only_a_dump_tells_whether_anything_listens_and_ebbs_own_listener_does_not_count() {
    let listener = |to_wait_port| Sample {
        state: TcpState::Listen,
        to_wait_port,
        ..connection(Origin::Unknown, "0.0.0.0:80", "0.0.0.0:0")
    };
    let samples = [
        listener(true),
        connection(ACCEPTED, "10.0.0.2:80", "10.0.0.9:5000"),
    ];
    let snapshot = |samples: &[Sample]| Snapshot::new(NOW, samples, IDLE_AFTER, |_| true, no_pods);
    assert_eq!(snapshot(&samples).listens, None);
    assert_eq!(
        snapshot(&samples).with_listeners(&samples).listens,
        Some(false)
    );
    let samples = [listener(true), listener(false)];
    assert_eq!(
        snapshot(&samples).with_listeners(&samples).listens,
        Some(true)
    );
}
