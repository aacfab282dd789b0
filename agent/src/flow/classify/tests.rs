//! A table of samples and what each is called.

use super::*;
use crate::{
    clock::BootTime,
    flow::{Acceptance, sample::testing::sample},
};

const IDLE_AFTER: Duration = Duration::from_secs(5);

fn class(s: &Sample) -> Option<FlowState> {
    classify(s, IDLE_AFTER)
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
fn what_nobody_has_accepted_is_backlog_whatever_has_arrived() {
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
        ..sample()
    };
    assert_eq!(class(&half_open), None);
    let origin = Origin::Accepted(Acceptance {
        opened_at: BootTime::from_nanos(1),
        seeded: false,
        probe: false,
    });
    let child = Sample {
        origin,
        ..half_open
    };
    assert_eq!(class(&child), Some(FlowState::Backlog));
    let accepted = Sample { inode: 1, ..child };
    assert_eq!(class(&accepted), Some(FlowState::Active));
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
fn where_nobody_has_said_anything_the_pod_may_still_have_to() {
    let s = Sample {
        bytes_acked: 0,
        bytes_received: 0,
        bare_ack: true,
        ..talked(60_000, 60_000)
    };
    assert_eq!(class(&s), Some(FlowState::Awaiting));
}

#[test]
fn a_tie_is_idle_only_if_the_peer_acknowledged_bare_and_in_time() {
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
fn what_the_pod_has_closed_is_flushing_until_the_peer_has_it_all() {
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
fn what_the_peer_has_closed_is_half_closed_and_idle_once_quiet_with_empty_queues() {
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
fn states_without_a_flow_have_none() {
    for state in [
        TcpState::SynSent,
        TcpState::NewSynRecv,
        TcpState::FinWait2,
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
fn only_idle_is_not_live() {
    let live: Vec<_> = FlowState::ALL.iter().filter(|s| s.is_live()).collect();
    assert_eq!(live.len(), FlowState::ALL.len() - 1);
    assert!(!FlowState::Idle.is_live());
}

#[test]
fn a_delayed_acknowledgement_says_idle_also_after_probes_and_one_with_the_request_does_not() {
    // A probe was answered 1 s ago.
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
        "too close to tell"
    );
    assert_eq!(probed(9_000), Some(FlowState::Awaiting));
    assert_eq!(probed(9_010), Some(FlowState::Awaiting));
}
