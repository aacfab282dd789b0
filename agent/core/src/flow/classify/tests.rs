//! A table of samples and the state of each.

use super::*;
use crate::flow::sample::{Retransmissions, testing::sample};

const IDLE_AFTER: Duration = Duration::from_secs(5);

fn class(s: &Sample) -> Option<FlowState> {
    classify(s, &IDLE_AFTER.into())
}

/// An accepted connection: request received `received` ms ago, answer sent `sent` ms ago.
fn talked(sent: u64, received: u64) -> Sample {
    Sample {
        bytes_received: 100,
        bytes_acked: 200,
        since_sent: Duration::from_millis(sent),
        since_received: Duration::from_millis(received),
        since_ack: Duration::from_millis(sent.min(received)),
        ..sample()
    }
}

#[test]
fn a_connection_that_is_not_accepted_is_backlog_whatever_has_arrived() {
    for state in [TcpState::Established, TcpState::CloseWait] {
        let s = Sample {
            state,
            inode: 0,
            ..talked(60_000, 60_000)
        };
        assert_eq!(class(&s), Some(FlowState::Backlog));
    }
}

#[test]
fn a_fast_open_child_is_backlog_and_a_handshake_under_way_is_no_flow() {
    let half_open = Sample {
        state: TcpState::SynRecv,
        inode: 0,
        origin: Origin::Unknown,
        ..sample()
    };
    assert_eq!(class(&half_open), None);
    let child = Sample {
        origin: Origin::Accepted,
        ..half_open
    };
    assert_eq!(class(&child), Some(FlowState::Backlog));
    let accepted = Sample { inode: 1, ..child };
    assert_eq!(class(&accepted), Some(FlowState::Active));
    let dialled = Sample {
        origin: Origin::Dialled,
        ..accepted
    };
    assert_eq!(class(&dialled), None);
}

#[test]
fn an_accepted_fast_open_child_that_can_not_be_inspected_is_live() {
    for quiet in [0, 60_000] {
        let child = Sample {
            state: TcpState::SynRecv,
            inode: 1,
            origin: Origin::Unknown,
            ..talked(quiet, quiet)
        };
        assert!(class(&child).is_some_and(FlowState::is_live), "{quiet}");
    }
}

#[test]
fn bytes_within_idle_after_are_active_either_way() {
    assert_eq!(class(&talked(4_999, 9_000)), Some(FlowState::Active));
    assert_eq!(class(&talked(9_000, 4_999)), Some(FlowState::Active));
}

#[test]
fn bytes_in_a_queue_are_active_however_old() {
    for (unread, unacked) in [(1, 0), (0, 1)] {
        let s = Sample {
            unread,
            unacked,
            ..talked(60_000, 90_000)
        };
        assert_eq!(class(&s), Some(FlowState::Active));
    }
}

#[test]
fn a_request_without_an_answer_is_awaiting_however_long_ago() {
    assert_eq!(
        class(&talked(9_000_000, 8_000_000)),
        Some(FlowState::Awaiting)
    );
}

#[test]
fn an_answered_quiet_connection_is_idle_from_idle_after_on() {
    assert_eq!(class(&talked(5_000, 5_004)), Some(FlowState::Idle));
    assert_eq!(class(&talked(4_996, 5_000)), Some(FlowState::Active));
}

#[test]
fn a_connection_without_bytes_is_awaiting_because_the_pod_may_have_to_send_first() {
    let s = Sample {
        bytes_acked: 0,
        bytes_received: 0,
        bare_ack: true,
        ..talked(60_000, 60_000)
    };
    assert_eq!(class(&s), Some(FlowState::Awaiting));
}

#[test]
fn equal_times_are_idle_only_if_the_peer_acknowledged_in_time_without_data() {
    let tie = |bare_ack, ack_ms| Sample {
        bare_ack,
        since_ack: Duration::from_millis(ack_ms),
        ..talked(9_000, 9_000)
    };
    assert_eq!(class(&tie(true, 9_000)), Some(FlowState::Idle));
    assert_eq!(
        class(&tie(true, 8_800)),
        Some(FlowState::Idle),
        "a delayed ACK"
    );
    assert_eq!(
        class(&tie(false, 9_000)),
        Some(FlowState::Awaiting),
        "a request came with the ACK"
    );
    assert_eq!(
        class(&tie(true, 3_000)),
        Some(FlowState::Awaiting),
        "a keep-alive probe was answered"
    );
}

#[test]
fn a_connection_that_the_pod_closed_is_flushing_until_the_peer_acknowledged_all() {
    for state in [TcpState::FinWait1, TcpState::Closing, TcpState::LastAck] {
        let s = Sample {
            state,
            inode: 0,
            ..talked(60_000, 60_000)
        };
        assert_eq!(class(&s), Some(FlowState::Flushing));
    }
}

#[test]
fn a_connection_that_the_peer_closed_is_half_closed_then_idle_once_quiet_with_empty_queues() {
    let half = |quiet, unacked| Sample {
        state: TcpState::CloseWait,
        unacked,
        ..talked(quiet, quiet)
    };
    assert_eq!(class(&half(1_000, 0)), Some(FlowState::HalfClosed));
    assert_eq!(class(&half(60_000, 1)), Some(FlowState::HalfClosed));
    assert_eq!(class(&half(60_000, 0)), Some(FlowState::Idle));
}

#[test]
fn a_half_closed_connection_becomes_idle_whether_the_pod_has_read_the_end_of_the_stream_or_not() {
    let unread = |unread| Sample {
        state: TcpState::CloseWait,
        unread,
        ..talked(60_000, 60_000)
    };
    assert_eq!(class(&unread(1)), Some(FlowState::Idle), "the FIN alone");
    assert_eq!(
        class(&unread(2)),
        Some(FlowState::HalfClosed),
        "a byte before the FIN"
    );
}

#[test]
fn an_upload_to_a_server_that_has_closed_its_side_is_live_while_bytes_arrive() {
    let reading = |received| Sample {
        state: TcpState::FinWait2,
        ..talked(60_000, received)
    };
    assert_eq!(class(&reading(1_000)), Some(FlowState::Active));
    assert_eq!(class(&reading(6_000)), Some(FlowState::Idle));
    let orphan = Sample {
        inode: 0,
        ..reading(1_000)
    };
    assert_eq!(class(&orphan), None, "the application has closed it");
}

#[test]
fn a_socket_that_could_not_be_read_is_live() {
    let s = Sample {
        origin: Origin::Unknown,
        ..talked(60_000, 60_004)
    };
    assert_eq!(class(&s), Some(FlowState::Awaiting));
}

#[test]
fn handshakes_listeners_and_ended_connections_are_no_flows() {
    for state in [
        TcpState::SynSent,
        TcpState::NewSynRecv,
        TcpState::TimeWait,
        TcpState::Close,
        TcpState::Listen,
    ] {
        assert_eq!(
            class(&Sample {
                state,
                ..talked(0, 0)
            }),
            None,
            "{state:?}"
        );
    }
}

#[test]
fn only_idle_and_lost_are_not_live() {
    let live: Vec<_> = FlowState::ALL.iter().filter(|s| s.is_live()).collect();
    assert_eq!(live.len(), FlowState::ALL.len() - 2);
    assert!(!FlowState::Idle.is_live() && !FlowState::Lost.is_live());
}

#[test]
fn after_a_probe_a_delayed_acknowledgement_means_idle_and_one_with_the_request_does_not() {
    // The peer answered a probe 1 s ago.
    let probed = |since_delivery| {
        let mut s = Sample {
            since_ack: Duration::from_millis(1_000),
            ..talked(9_000, 9_000)
        };
        s.set_bare_ack(Duration::from_millis(since_delivery));
        class(&s)
    };
    assert_eq!(probed(8_960), Some(FlowState::Idle));
    assert_eq!(
        probed(8_990),
        Some(FlowState::Awaiting),
        "too close to be certain"
    );
    assert_eq!(probed(9_000), Some(FlowState::Awaiting));
    assert_eq!(probed(9_010), Some(FlowState::Awaiting));
}

fn options() -> ClassifyOptions {
    ClassifyOptions {
        peer_timeout: Duration::from_secs(20),
        ..IDLE_AFTER.into()
    }
}

/// A connection with unacknowledged data. The first of `retransmits` was sent when `rto` was 200 ms.
fn blackholed(retransmits: u8, since_last: u64, since_ack: u64) -> Sample {
    Sample {
        unacked: 10,
        since_ack: Duration::from_millis(since_ack),
        retransmissions: Retransmissions {
            retransmits,
            probes: 0,
            backoff: retransmits,
            rto: Duration::from_millis(200 << retransmits),
        },
        ..talked(since_last, 900_000)
    }
}

#[test]
fn a_peer_that_has_not_answered_retransmissions_for_peer_timeout_is_lost() {
    // Sent 12.6 s before the sixth retransmission.
    for (since_last, state) in [(7_300, FlowState::Active), (7_400, FlowState::Lost)] {
        let s = blackholed(6, since_last, 900_000);
        assert_eq!(
            s.unanswered_for(),
            Some(Duration::from_millis(12_600 + since_last))
        );
        assert_eq!(classify(&s, &options()), Some(state), "{since_last}");
    }
    for state in [TcpState::CloseWait, TcpState::FinWait1, TcpState::LastAck] {
        let s = Sample {
            state,
            ..blackholed(7, 0, 900_000)
        };
        assert_eq!(classify(&s, &options()), Some(FlowState::Lost), "{state:?}");
    }
}

#[test]
fn a_peer_that_answers_is_not_lost_however_slowly_it_reads() {
    let answers = blackholed(9, 60_000, 19_000);
    assert_eq!(classify(&answers, &options()), Some(FlowState::Active));
    let closed_window = |probes, backoff| Sample {
        retransmissions: Retransmissions {
            retransmits: 0,
            probes,
            backoff,
            rto: Duration::from_millis(200),
        },
        ..blackholed(0, 900_000, 120_000)
    };
    // Each probe is answered, so that no more than one has no answer.
    for (probes, backoff) in [(0, 12), (1, 12)] {
        let s = closed_window(probes, backoff);
        assert_eq!(classify(&s, &options()), Some(FlowState::Active));
    }
    // No answer to several, the first of them a minute before the last.
    let gone = closed_window(2, 12);
    assert_eq!(gone.unanswered_for(), Some(Duration::from_secs(60)));
    assert_eq!(classify(&gone, &options()), Some(FlowState::Lost));
}

#[test]
fn an_idle_connection_whose_peer_was_silent_for_hours_is_not_lost_by_its_first_retransmission() {
    for retransmits in [0, 1, 2] {
        let s = blackholed(retransmits, 100, 9_000_000);
        assert_eq!(classify(&s, &options()), Some(FlowState::Active));
    }
}

#[test]
fn doublings_of_an_earlier_outage_do_not_count() {
    let mut s = blackholed(8, 0, 900_000);
    s.retransmissions.retransmits = 1;
    // The timeout was half as long before, 25.6 s, and that is certain.
    assert_eq!(s.unanswered_for(), Some(Duration::from_millis(25_600)));
    s.retransmissions.backoff = 0;
    assert_eq!(s.unanswered_for(), Some(Duration::ZERO));
}

#[test]
fn keep_alive_probes_without_answer_are_the_kernels_business() {
    let s = Sample {
        unacked: 0,
        ..blackholed(0, 890_000, 890_000)
    };
    let s = Sample {
        retransmissions: Retransmissions {
            probes: 8,
            ..s.retransmissions
        },
        ..s
    };
    assert_eq!(s.unanswered_for(), None);
    assert_eq!(classify(&s, &options()), Some(FlowState::Idle));
}

#[test]
fn a_silent_connection_is_idle_only_where_that_is_asked_for_and_only_if_it_is_accepted() {
    let silent = |quiet| Sample {
        bytes_acked: 0,
        bytes_received: 0,
        bare_ack: true,
        ..talked(quiet, quiet)
    };
    let with = |silent_is_idle, s: &Sample| {
        classify(
            s,
            &ClassifyOptions {
                silent_is_idle,
                ..options()
            },
        )
    };
    let quiet = silent(60_000);
    assert_eq!(with(false, &quiet), Some(FlowState::Awaiting));
    assert_eq!(with(true, &quiet), Some(FlowState::Idle));
    assert_eq!(with(true, &silent(4_900)), Some(FlowState::Active));
    let not_accepted = Sample { inode: 0, ..quiet };
    assert_eq!(with(true, &not_accepted), Some(FlowState::Backlog));
    for s in [
        Sample {
            unread: 1,
            bytes_received: 1,
            ..silent(60_000)
        },
        Sample {
            bytes_received: 1,
            ..silent(60_000)
        },
        Sample {
            unacked: 1,
            ..silent(60_000)
        },
        Sample {
            origin: Origin::Unknown,
            ..silent(60_000)
        },
    ] {
        assert!(with(true, &s).is_some_and(FlowState::is_live), "{s:?}");
    }
}
