//! Events, dumps and lookups of a drain.

use super::*;

#[tokio::test]
async fn a_pod_without_flows_is_watched_dumped_and_released() {
    let mut harness = harness(vec![]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert!(report.held_ms >= 40, "{report:?}");
    assert_eq!(
        harness.kernel.script().asked,
        ["watch", "dump", "dump", "unwatch"]
    );
    assert!(
        matches!(harness.notices.recv().await, Some(DrainNotice::Began(r)) if r.reason.is_none())
    );
    assert!(
        matches!(harness.notices.recv().await, Some(DrainNotice::Settled(r)) if r.settled_ms >= Some(40))
    );
    assert_eq!(
        harness.notices.recv().await,
        Some(DrainNotice::Finished(report))
    );
}

#[tokio::test]
async fn a_port_rule_that_matches_nothing_is_reported_and_events_of_other_ports_count() {
    let listener = Sample::new(
        SocketCookie(9),
        SocketAddr::from(([10, 0, 0, 1], 80)),
        SocketAddr::from(([0, 0, 0, 0], 0)),
        TcpState::Listen,
    );
    let mut harness = harness(vec![listener, sample(1)]);
    let only = Policy {
        ports: vec![8080],
        ..policy()
    };
    let hold = harness.drains.hold(order(pod("a"), only)).await;
    harness
        .until_view(|v| v.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    assert!(matches!(
        harness.notices.recv().await,
        Some(DrainNotice::Began(_))
    ));
    let Some(DrainNotice::Warned(named, warning)) = harness.notices.recv().await else {
        panic!("no warning");
    };
    assert_eq!(named, pod("a").name);
    harness.close_all();
    harness.event(closes(1)).await;
    let report = released(&hold).await;
    assert_eq!(report.warnings, [warning]);
    assert_eq!(report.ended, Some(1), "{report:?}");
}

#[tokio::test]
async fn a_pod_that_forwards_traffic_is_untracked() {
    let harness = harness_with(
        FakeKernel(Mutex::new(Script {
            forwards: Some("tap0".into()),
            ..Script::default()
        })),
        None,
    );
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Untracked));
    assert_eq!(report.detail.as_deref(), Some("tap0"));
}

#[tokio::test]
async fn a_pod_in_which_nothing_listens_is_released_by_the_first_dump() {
    let harness = harness(vec![]);
    harness.kernel.script().no_listener = true;
    let policy = Policy {
        quiet: Duration::from_secs(60),
        settle_max: Duration::from_secs(60),
        ..Policy::default()
    };
    let hold = harness.drains.hold(order(pod("a"), policy)).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert_eq!(report.settle.unwrap().rule, SettleRule::NoListener);
    assert_eq!(report.dumps_ended, 1);
}

#[tokio::test]
async fn the_kernels_counters_decide_how_long_a_pod_settles() {
    let harness = harness(vec![]);
    harness.kernel.script().arrivals = Some(Arrivals {
        observed: Duration::from_secs(3600),
        gap: Some(Duration::from_millis(10)),
    });
    let policy = Policy {
        quiet: Duration::from_secs(60),
        settle_max: Duration::from_secs(60),
        ..Policy::default()
    };
    let hold = harness.drains.hold(order(pod("a"), policy.clone())).await;
    let settle = released(&hold).await.settle.unwrap();
    assert_eq!((settle.rule, settle.gap_ms), (SettleRule::Gap, Some(10)));

    let fixed = Policy {
        quiet_is_set: true,
        ..policy
    };
    let hold = harness.drains.hold(order(pod("b"), fixed)).await;
    assert!(
        timeout(Duration::from_secs(1), hold.released())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn the_last_close_releases_at_once_and_the_report_has_the_lag() {
    let harness = harness(vec![sample(1)]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    harness
        .until_view(|v| v.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    tokio::time::sleep(QUIET).await;
    harness.close_all();
    harness.event(closes(1)).await;
    let report = released(&hold).await;
    assert_eq!(
        (report.reason, report.ended.unwrap()),
        (Some(ReleaseReason::Drained), 1)
    );
    assert!(
        report.release_lag_us.expect("a close ended it") < 1_000_000,
        "{report:?}"
    );
    assert_eq!(report.released_by, Some(ReleasedBy::Lookup));
    assert_eq!((report.dumps_ended, report.lookups), (2, 1));
}

/// A drain whose one flow holds, in the drain phase, after its first dump.
async fn held_by_one(harness: &Harness) -> Hold {
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    harness
        .until_view(|v| v.active.iter().any(|r| r.dumps_ended == 2))
        .await;
    hold
}

#[tokio::test]
async fn lookups_are_repeated_after_events_that_were_under_way() {
    let harness = harness(vec![sample(1)]);
    let hold = held_by_one(&harness).await;
    harness.close_all();
    harness.kernel.script().sent = 3;
    harness.send(closes(1)).await;
    harness.send(closes(2)).await;
    while harness.asked("lookup") == 0 {
        tokio::task::yield_now().await;
    }
    harness.send(closes(3)).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    // Unless this test was so slow that the event was given up.
    if report.released_by == Some(ReleasedBy::Lookup) {
        assert_eq!((harness.asked("dump"), report.lookups), (2, 1));
        assert!(harness.asked("lookup") > 1);
    }
}

#[tokio::test]
async fn an_event_that_never_comes_causes_a_dump() {
    let harness = harness(vec![sample(1)]);
    let hold = held_by_one(&harness).await;
    harness.close_all();
    harness.kernel.script().sent = 1;
    harness.event(closes(1)).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert_eq!(report.dumps.get(&DumpReason::EventsLate), Some(&1));
    assert_eq!(report.released_by, Some(ReleasedBy::Dump));
    assert_eq!((harness.asked("dump"), report.lookups), (3, 0));
}

#[tokio::test]
async fn an_opening_whose_event_was_lost_uncounted_cuts_no_client() {
    let harness = harness(vec![sample(1)]);
    let hold = held_by_one(&harness).await;
    {
        let mut script = harness.kernel.script();
        script.samples = vec![sample(2)];
        script.sent = 1;
    }
    harness.event(closes(1)).await;
    let early = timeout(5 * QUIET, hold.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
    assert_eq!(harness.asked("dump"), 3);
}

#[tokio::test]
async fn a_state_change_that_the_kernel_missed_causes_a_dump() {
    let harness = harness(vec![sample(1)]);
    let hold = held_by_one(&harness).await;
    {
        // A connection was opened, and no event was sent.
        let mut script = harness.kernel.script();
        script.samples = vec![sample(2)];
        script.missed_changes = 1;
    }
    harness.event(closes(1)).await;
    let early = timeout(5 * QUIET, hold.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
    assert_eq!(harness.asked("dump"), 3);
    harness.close_all();
    harness.event(closes(2)).await;
    let report = released(&hold).await;
    assert_eq!(report.dumps.get(&DumpReason::ChangesMissed), Some(&1));
    assert_eq!(report.released_by, Some(ReleasedBy::Lookup), "none since");
}

#[tokio::test]
async fn events_of_an_earlier_watch_are_not_counted() {
    let harness = harness(vec![sample(1)]);
    let hold = held_by_one(&harness).await;
    {
        let mut script = harness.kernel.script();
        script.samples = vec![sample(2)];
        // The event that opened the second is still under way.
        script.sent = 1;
    }
    let earlier = SocketEvent {
        watch: WatchId(7),
        ..closes(9)
    };
    harness.send(earlier).await;
    harness.event(closes(1)).await;
    let early = timeout(5 * QUIET, hold.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn a_dump_follows_lookups_that_fail() {
    let harness = harness(vec![sample(1)]);
    harness.kernel.script().mute = true;
    let hold = held_by_one(&harness).await;
    harness.close_all();
    harness.event(closes(1)).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert_eq!(report.released_by, Some(ReleasedBy::Dump));
}

#[tokio::test]
async fn a_late_flow_prolongs_settle_and_its_peer_is_reported() {
    let harness = harness(vec![]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    tokio::time::sleep(QUIET / 2).await;
    harness.event(opens(5)).await;
    harness.event(closes(5)).await;
    let report = released(&hold).await;
    assert!(report.held_ms >= 60, "{report:?}");
    assert_eq!(
        (
            report.arrived.unwrap(),
            report.ended.unwrap(),
            report.late_peers.len()
        ),
        (1, 1, 1)
    );
}

#[tokio::test]
async fn events_of_other_pods_ignored_ports_probes_and_the_pod_itself_do_not_count() {
    let any = SocketAddr::from(([0, 0, 0, 0], 9090));
    let ignored = Sample::new(SocketCookie(8), any, any, TcpState::Listen);
    let harness = harness(vec![ignored]);
    let policy = Policy {
        ignore_ports: vec![9090],
        quiet: Duration::from_secs(60),
        settle_max: QUIET * 4,
        ..policy()
    };
    let hold = harness.drains.hold(order(pod("a"), policy)).await;
    harness
        .event(SocketEvent {
            netns: NetnsInode(1),
            watch: WatchId(2),
            ..opens(1)
        })
        .await;
    harness
        .event(SocketEvent {
            local: SocketAddr::from(([10, 0, 0, 1], 9090)),
            ..opens(2)
        })
        .await;
    harness
        .event(SocketEvent {
            remote: SocketAddr::from(([127, 0, 0, 1], 5)),
            ..opens(3)
        })
        .await;
    harness
        .event(SocketEvent {
            remote: SocketAddr::from(([10, 0, 0, 1], 5)),
            ..opens(4)
        })
        .await;
    harness
        .event(SocketEvent {
            exempt: true,
            ..opens(6)
        })
        .await;
    harness.event(opens(7)).await;
    assert_eq!(released(&hold).await.arrived.unwrap(), 1);
}

#[tokio::test]
async fn a_host_network_pod_is_known_by_its_cgroups() {
    let harness = harness(vec![]);
    let scope = Scope::HostNetwork(vec![CgroupId(76), CgroupId(77)]);
    let hold = harness
        .drains
        .hold(order(pod_in("a", scope), policy()))
        .await;
    harness.event(opens(1)).await;
    harness
        .event(SocketEvent {
            cgroup: CgroupId(78),
            watch: WatchId(2),
            ..opens(2)
        })
        .await;
    harness.event(closes(1)).await;
    assert_eq!(released(&hold).await.arrived.unwrap(), 1);
}

#[tokio::test]
async fn a_dump_follows_lost_events() {
    let harness = harness(vec![sample(1)]);
    let hold = harness.drains.hold(order(pod("a"), policy())).await;
    harness
        .until_view(|v| v.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    harness.close_all();
    let events = harness.events.as_ref().expect("events are on");
    events
        .send(KernelEvent::Lost)
        .await
        .expect("the driver lives");
    let report = released(&hold).await;
    assert_eq!(
        (report.reason, report.ended.unwrap()),
        (Some(ReleaseReason::Drained), 1)
    );
}

#[tokio::test]
async fn closing_idle_flows_ends_with_the_drain() {
    let idle = Sample {
        since_sent: Duration::from_secs(60),
        since_received: Duration::from_secs(61),
        since_ack: Duration::from_secs(60),
        ..sample(1)
    };
    let harness = harness(vec![idle]);
    harness.kernel.script().closes_slowly = true;
    let policy = Policy {
        idle_flows: IdleFlows::Close,
        ..policy()
    };
    let hold = harness.drains.hold(order(pod("a"), policy)).await;
    let asked = async |what| {
        while harness.asked(what) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let within = Duration::from_secs(5);
    timeout(within, asked("close")).await.expect("it is idle");
    assert_eq!(harness.asked("stopped closing"), 0);
    assert!(harness.drains.release(&PodUid::new("a")).await.is_some());
    timeout(within, asked("stopped closing"))
        .await
        .expect("nobody waits any more");
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Manual));
}
