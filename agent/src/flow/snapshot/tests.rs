//! Which flows hold, and what is counted.

use super::*;
use crate::flow::sample::{Record, testing::sample};

const NOW: BootTime = BootTime::from_nanos(100_000_000_000);
const IDLE_AFTER: Duration = Duration::from_secs(5);

fn connection(direction: Option<Direction>, local: &str, remote: &str) -> Sample {
    Sample {
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        record: direction.map(|direction| Record {
            direction,
            opened_at: BootTime::from_nanos(90_000_000_000),
            seeded: false,
        }),
        ..sample()
    }
}

fn exempt(samples: &[Sample]) -> Vec<Option<Exempt>> {
    let snapshot = Snapshot::new(NOW, samples, IDLE_AFTER, |port| port != 9090);
    snapshot.flows.iter().map(|f| f.exempt).collect()
}

#[test]
fn inbound_flows_hold_and_outbound_ones_do_not() {
    let samples = [
        connection(Some(Direction::Inbound), "10.0.0.2:80", "10.0.0.9:5000"),
        connection(Some(Direction::Outbound), "10.0.0.2:40000", "10.0.0.9:5432"),
    ];
    assert_eq!(exempt(&samples), [None, Some(Exempt::Outbound)]);
}

#[test]
fn a_socket_without_a_record_holds_because_not_knowing_must_not_cut_anybody_off() {
    let samples = [connection(None, "10.0.0.2:80", "10.0.0.9:5000")];
    assert_eq!(exempt(&samples), [None]);
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true);
    assert_eq!(snapshot.flows[0].age, None);
    assert!(snapshot.flows[0].older_than_agent);
}

#[test]
fn a_flow_with_both_ends_in_the_pod_does_not_hold() {
    let samples = [
        connection(
            Some(Direction::Inbound),
            "127.0.0.1:9000",
            "127.0.0.1:40000",
        ),
        connection(
            Some(Direction::Outbound),
            "127.0.0.1:40000",
            "127.0.0.1:9000",
        ),
        // The same ports on other addresses are another connection.
        connection(Some(Direction::Inbound), "10.0.0.2:9000", "10.0.0.3:40000"),
    ];
    assert_eq!(
        exempt(&samples),
        [Some(Exempt::InPod), Some(Exempt::Outbound), None]
    );
}

#[test]
fn a_flow_on_a_port_that_the_policy_ignores_does_not_hold() {
    let samples = [connection(
        Some(Direction::Inbound),
        "10.0.0.2:9090",
        "10.0.0.9:5000",
    )];
    assert_eq!(exempt(&samples), [Some(Exempt::IgnoredPort)]);
}

#[test]
fn listeners_are_no_flows_and_make_no_peer_of_anything() {
    let samples = [
        Sample {
            state: TcpState::Listen,
            ..connection(None, "0.0.0.0:80", "0.0.0.0:0")
        },
        connection(Some(Direction::Inbound), "10.0.0.2:80", "10.0.0.9:5000"),
    ];
    assert_eq!(exempt(&samples), [None]);
}

#[test]
fn counts_are_of_the_flows_that_hold() {
    let samples = [
        connection(Some(Direction::Inbound), "10.0.0.2:80", "10.0.0.9:5000"),
        Sample {
            state: TcpState::FinWait1,
            ..connection(Some(Direction::Inbound), "10.0.0.2:80", "10.0.0.9:5001")
        },
        connection(Some(Direction::Outbound), "10.0.0.2:40000", "10.0.0.9:5432"),
    ];
    let counts = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true).counts();
    assert_eq!((counts.active, counts.flushing, counts.total()), (1, 1, 2));
    assert_eq!(counts.live(), 2);
}

#[test]
fn the_peers_fin_is_not_a_byte() {
    let inbound = || connection(Some(Direction::Inbound), "10.0.0.2:80", "10.0.0.9:5000");
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
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true);
    assert!(snapshot.flows.iter().all(|f| f.bytes_in == 5));
}

#[test]
fn ages_count_from_the_handshake() {
    let samples = [connection(
        Some(Direction::Inbound),
        "10.0.0.2:80",
        "10.0.0.9:5000",
    )];
    let snapshot = Snapshot::new(NOW, &samples, IDLE_AFTER, |_| true);
    assert_eq!(snapshot.flows[0].age, Some(Duration::from_secs(10)));
}
