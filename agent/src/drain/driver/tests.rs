//! The driver, with a kernel that does what the test says.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Mutex, MutexGuard},
    task::Poll,
};

use tokio::time::timeout;

use super::*;
use crate::{
    drain::{
        policy::{IdleFlows, Policy, Until},
        report::{LookKind, Phase, ReleaseReason},
    },
    flow::{Acceptance, Flow, Origin, Sample, TcpState},
    ids::{PodName, SandboxId, SocketCookie},
    kernel::{Edge, Look, LookUp},
    pods::Container,
};

const NETNS: NetnsInode = NetnsInode(4_026_532_000);
const WATCH: WatchId = WatchId(1);
const QUIET: Duration = Duration::from_millis(40);

/// What the scripted kernel does and has been asked.
#[derive(Default)]
struct Script {
    samples: Vec<Sample>,
    fails: bool,
    panics: bool,
    hangs: bool,
    /// Edges that the kernel has counted.
    edges: u64,
    /// Lookups fail.
    mute: bool,
    /// It closes idle flows until it is told to stop.
    closes_slowly: bool,
    asked: Vec<&'static str>,
}

#[derive(Default)]
struct FakeKernel(Mutex<Script>);

impl FakeKernel {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Kernel for FakeKernel {
    async fn look(&self, _: &Scope) -> Result<Look, LookError> {
        let hangs = {
            let mut script = self.script();
            script.asked.push("look");
            assert!(!script.panics, "as the script says");
            if script.fails {
                return Err(LookError("no such namespace".into()));
            }
            script.hangs
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        Ok(Look {
            taken_at: BootTime::now(),
            samples: self.script().samples.clone(),
        })
    }

    async fn close_idle(
        &self,
        _: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> Result<Vec<SocketCookie>, LookError> {
        self.script().asked.push("close");
        let slow = self.script().closes_slowly;
        if slow {
            over.cancelled().await;
            self.script().asked.push("stopped closing");
            return Ok(vec![]);
        }
        let mut script = self.script();
        let closed: HashSet<_> = idle.iter().map(|f| f.cookie).collect();
        script.samples.retain(|s| !closed.contains(&s.cookie));
        Ok(closed.into_iter().collect())
    }

    async fn look_up(
        &self,
        _: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> Result<LookUp, LookError> {
        let mut script = self.script();
        script.asked.push("lookup");
        if script.mute {
            return Err(LookError("no such namespace".into()));
        }
        let asked_for = |s: &&Sample| flows.contains(&(s.local, s.remote));
        Ok(LookUp {
            taken_at: BootTime::now(),
            edges: script.edges,
            samples: script.samples.iter().filter(asked_for).cloned().collect(),
        })
    }

    fn watch(&self, _: &Scope) -> Result<WatchId, LookError> {
        self.script().asked.push("watch");
        Ok(WATCH)
    }

    fn unwatch(&self, _: &Scope) {
        self.script().asked.push("unwatch");
    }
}

struct House {
    kernel: Arc<FakeKernel>,
    events: Option<mpsc::Sender<KernelEvent>>,
    notices: mpsc::UnboundedReceiver<DrainNotice>,
    drains: DrainHandle,
}

fn house_with(kernel: FakeKernel, journal: Option<Journal>) -> House {
    let kernel = Arc::new(kernel);
    let (events_in, events) = mpsc::channel(64);
    let (notices_in, notices) = mpsc::unbounded_channel();
    let drains = Drains::spawn(kernel.clone(), events, journal, notices_in);
    House {
        kernel,
        events: Some(events_in),
        notices,
        drains,
    }
}

fn house(samples: Vec<Sample>) -> House {
    house_with(
        FakeKernel(Mutex::new(Script {
            samples,
            ..Script::default()
        })),
        None,
    )
}

impl House {
    /// The kernel counts an edge and reports it.
    async fn edge(&self, edge: Edge) {
        if edge.watch == WATCH {
            self.kernel.script().edges += 1;
        }
        self.report(edge).await;
    }

    async fn report(&self, edge: Edge) {
        let events = self.events.as_ref().expect("events are on");
        events
            .send(KernelEvent::Edge(edge))
            .await
            .expect("the driver lives");
    }

    fn close_all(&self) {
        self.kernel.script().samples.clear();
    }

    fn asked(&self, what: &str) -> usize {
        self.kernel
            .script()
            .asked
            .iter()
            .filter(|a| **a == what)
            .count()
    }

    /// Waits until a view is as wanted.
    async fn until_view(&self, wanted: impl FnMut(&Arc<DrainsView>) -> bool) -> Arc<DrainsView> {
        let mut view = self.drains.view();
        let view = timeout(Duration::from_secs(5), view.wait_for(wanted)).await;
        view.expect("in time").expect("the driver lives").clone()
    }
}

fn pod_in(uid: &str, scope: Scope) -> Arc<Pod> {
    Arc::new(Pod {
        name: PodName {
            uid: PodUid::new(uid),
            namespace: "shop".into(),
            name: format!("web-{uid}"),
        },
        sandbox: SandboxId::new("sandbox"),
        scope,
        ips: vec!["10.0.0.1".parse().expect("an address")],
        annotations: BTreeMap::new(),
        containers: vec![],
    })
}

fn pod(uid: &str) -> Arc<Pod> {
    pod_in(
        uid,
        Scope::Netns {
            inode: NETNS,
            pid: 1,
        },
    )
}

fn policy() -> Policy {
    Policy {
        quiet: QUIET,
        settle_max: QUIET * 4,
        ..Policy::default()
    }
}

fn order(pod: Arc<Pod>, policy: Policy) -> HoldOrder {
    HoldOrder {
        pod,
        policy,
        warnings: vec![],
        grace: Some(Duration::from_secs(60)),
        patience: None,
        deleted: None,
    }
}

fn sample(cookie: u64) -> Sample {
    Sample {
        cookie: SocketCookie(cookie),
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: SocketAddr::from(([10, 0, 0, 2], 40_000)),
        state: TcpState::Established,
        unread: 0,
        unacked: 0,
        inode: 1,
        bytes_received: 10,
        bytes_acked: 20,
        since_sent: Duration::ZERO,
        since_received: Duration::ZERO,
        since_ack: Duration::ZERO,
        bare_ack: false,
        to_wait_port: false,
        cgroup: None,
        origin: Origin::Accepted(Acceptance {
            opened_at: BootTime::from_nanos(1),
            seeded: false,
            probe: false,
        }),
    }
}

fn edge(cookie: u64, from: TcpState, to: TcpState) -> Edge {
    Edge {
        own: false,
        cgroup: CgroupId(77),
        netns: NETNS,
        watch: WATCH,
        cookie: SocketCookie(cookie),
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: SocketAddr::from(([10, 0, 0, 2], 40_000)),
        from,
        to,
        at: BootTime::now(),
    }
}

fn opens(cookie: u64) -> Edge {
    edge(cookie, TcpState::SynRecv, TcpState::Established)
}

fn closes(cookie: u64) -> Edge {
    edge(cookie, TcpState::LastAck, TcpState::Close)
}

async fn released(hold: &Hold) -> Arc<Report> {
    timeout(Duration::from_secs(10), hold.released())
        .await
        .expect("released in time")
}

#[tokio::test]
async fn a_pod_without_flows_is_watched_looked_at_and_released() {
    let mut house = house(vec![]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert!(report.held_ms >= 40, "{report:?}");
    assert_eq!(
        house.kernel.script().asked,
        ["watch", "look", "look", "unwatch"]
    );
    assert!(
        matches!(house.notices.recv().await, Some(DrainNotice::Began(r)) if r.reason.is_none())
    );
    assert_eq!(
        house.notices.recv().await,
        Some(DrainNotice::Finished(report))
    );
}

#[tokio::test]
async fn the_last_close_releases_at_once_and_the_report_says_how_fast() {
    let house = house(vec![sample(1)]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    house
        .until_view(|v| v.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    tokio::time::sleep(QUIET).await;
    house.close_all();
    house.edge(closes(1)).await;
    let report = released(&hold).await;
    assert_eq!(
        (report.reason, report.ended.unwrap()),
        (Some(ReleaseReason::Drained), 1)
    );
    assert!(
        report.release_lag_us.expect("a close ended it") < 1_000_000,
        "{report:?}"
    );
    assert_eq!(report.released_by, Some(LookKind::Lookup));
    assert_eq!((report.walks, report.lookups), (2, 1));
}

/// A drain whose one flow holds, in the drain phase, when it has looked.
async fn held_by_one(house: &House) -> Hold {
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    house
        .until_view(|v| v.active.iter().any(|r| r.walks == 2))
        .await;
    hold
}

#[tokio::test]
async fn lookups_wait_for_edges_that_are_under_way_and_are_made_anew() {
    let house = house(vec![sample(1)]);
    let hold = held_by_one(&house).await;
    house.close_all();
    house.kernel.script().edges = 3;
    house
        .report(edge(1, TcpState::FinWait1, TcpState::FinWait2))
        .await;
    house
        .report(edge(2, TcpState::SynRecv, TcpState::Close))
        .await;
    while house.asked("lookup") == 0 {
        tokio::task::yield_now().await;
    }
    house
        .report(edge(1, TcpState::FinWait2, TcpState::Close))
        .await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    // Unless this test was so slow that the edge was given up.
    if report.released_by == Some(LookKind::Lookup) {
        assert_eq!((house.asked("look"), report.lookups), (2, 1));
        assert!(house.asked("lookup") > 1);
    }
}

#[tokio::test]
async fn an_edge_that_never_comes_costs_a_walk() {
    let house = house(vec![sample(1)]);
    let hold = held_by_one(&house).await;
    house.close_all();
    house.kernel.script().edges = 1;
    house.edge(closes(1)).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert_eq!(report.released_by, Some(LookKind::Walk));
    assert_eq!((house.asked("look"), report.lookups), (3, 0));
}

#[tokio::test]
async fn an_open_edge_that_was_lost_in_silence_cuts_nobody() {
    let house = house(vec![sample(1)]);
    let hold = held_by_one(&house).await;
    {
        let mut script = house.kernel.script();
        script.samples = vec![sample(2)];
        script.edges = 1;
    }
    house.edge(closes(1)).await;
    let early = timeout(5 * QUIET, hold.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
    assert_eq!(house.asked("look"), 3);
}

#[tokio::test]
async fn a_fast_open_flow_that_is_closed_before_its_handshake_is_done_holds() {
    for to in [TcpState::FinWait1, TcpState::CloseWait] {
        let house = house(vec![sample(1)]);
        let hold = held_by_one(&house).await;
        house.kernel.script().samples = vec![Sample {
            state: to,
            unacked: 5,
            remote: SocketAddr::from(([10, 0, 0, 2], 40_002)),
            ..sample(2)
        }];
        let early = Edge {
            remote: SocketAddr::from(([10, 0, 0, 2], 40_002)),
            ..edge(2, TcpState::SynRecv, to)
        };
        house.edge(early).await;
        house.edge(closes(1)).await;
        let early = timeout(5 * QUIET, hold.released()).await;
        assert!(early.is_err(), "a flow holds: {early:?}");
        house.close_all();
        house
            .edge(Edge {
                remote: SocketAddr::from(([10, 0, 0, 2], 40_002)),
                ..edge(2, to, TcpState::Close)
            })
            .await;
        let report = released(&hold).await;
        assert_eq!(report.reason, Some(ReleaseReason::Drained), "{to:?}");
    }
}

#[tokio::test]
async fn edges_of_an_earlier_watch_are_not_counted() {
    let house = house(vec![sample(1)]);
    let hold = held_by_one(&house).await;
    {
        let mut script = house.kernel.script();
        script.samples = vec![sample(2)];
        // The edge that opened the second is still under way.
        script.edges = 1;
    }
    let earlier = Edge {
        watch: WatchId(7),
        ..closes(9)
    };
    house.report(earlier).await;
    house.edge(closes(1)).await;
    let early = timeout(5 * QUIET, hold.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn lookups_that_fail_are_made_up_for_by_a_walk() {
    let house = house(vec![sample(1)]);
    house.kernel.script().mute = true;
    let hold = held_by_one(&house).await;
    house.close_all();
    house.edge(closes(1)).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Drained));
    assert_eq!(report.released_by, Some(LookKind::Walk));
}

#[tokio::test]
async fn a_late_flow_prolongs_settle_and_its_peer_is_told() {
    let house = house(vec![]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    tokio::time::sleep(QUIET / 2).await;
    house.edge(opens(5)).await;
    house.edge(closes(5)).await;
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
async fn edges_of_other_pods_ignored_ports_and_the_pod_itself_are_not_heard() {
    let house = house(vec![]);
    let policy = Policy {
        ignore_ports: vec![9090],
        quiet: Duration::from_secs(60),
        settle_max: QUIET * 4,
        ..policy()
    };
    let hold = house.drains.hold(order(pod("a"), policy)).await;
    house
        .edge(Edge {
            netns: NetnsInode(1),
            watch: WatchId(2),
            ..opens(1)
        })
        .await;
    house
        .edge(Edge {
            local: SocketAddr::from(([10, 0, 0, 1], 9090)),
            ..opens(2)
        })
        .await;
    house
        .edge(Edge {
            remote: SocketAddr::from(([127, 0, 0, 1], 5)),
            ..opens(3)
        })
        .await;
    house
        .edge(Edge {
            remote: SocketAddr::from(([10, 0, 0, 1], 5)),
            ..opens(4)
        })
        .await;
    house
        .edge(edge(6, TcpState::Established, TcpState::CloseWait))
        .await;
    house.edge(opens(7)).await;
    assert_eq!(released(&hold).await.arrived.unwrap(), 1);
}

#[tokio::test]
async fn a_host_network_pod_is_known_by_its_cgroups() {
    let house = house(vec![]);
    let scope = Scope::HostNetwork(vec![CgroupId(76), CgroupId(77)]);
    let hold = house.drains.hold(order(pod_in("a", scope), policy())).await;
    house.edge(opens(1)).await;
    house
        .edge(Edge {
            cgroup: CgroupId(78),
            watch: WatchId(2),
            ..opens(2)
        })
        .await;
    house.edge(closes(1)).await;
    assert_eq!(released(&hold).await.arrived.unwrap(), 1);
}

#[tokio::test]
async fn holds_of_one_pod_join_one_drain_and_a_late_one_gets_the_same_report() {
    let house = house(vec![sample(1)]);
    let one = house.drains.hold(order(pod("a"), policy())).await;
    let two = house.drains.hold(order(pod("a"), policy())).await;
    house
        .until_view(|v| v.active.len() == 1 && v.active[0].holds == 2)
        .await;
    house.close_all();
    house.edge(closes(1)).await;
    let report = released(&one).await;
    assert!(Arc::ptr_eq(&report, &released(&two).await));
    let late = house.drains.hold(order(pod("a"), policy())).await;
    assert!(Arc::ptr_eq(&report, &released(&late).await));
    assert_eq!(house.asked("watch"), 1);
    assert_eq!(house.drains.view().borrow().finished.len(), 1);
}

#[tokio::test]
async fn a_hold_long_after_a_drain_is_checked_anew_against_the_kernel() {
    let house = house(vec![]);
    let first = house.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(released(&first).await.reason, Some(ReleaseReason::Drained));
    tokio::time::sleep(SAME_ANSWER + QUIET).await;

    let again = house.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(again.deadline(), first.deadline(), "the same termination");
    assert_eq!(released(&again).await.reason, Some(ReleaseReason::Drained));
    tokio::time::sleep(SAME_ANSWER + QUIET).await;

    house.kernel.script().samples = vec![sample(1)];
    let held = house.drains.hold(order(pod("a"), policy())).await;
    let early = timeout(5 * QUIET, held.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn who_goes_on_asking_does_not_keep_the_first_deadline_for_ever() {
    let house = house(vec![]);
    let first = house.drains.hold(order(pod("a"), policy())).await;
    released(&first).await;
    let begun = BootTime::now();
    // More often than it is forgotten.
    let fresh = loop {
        tokio::time::sleep(SAME_ANSWER + QUIET).await;
        let again = house.drains.hold(order(pod("a"), policy())).await;
        released(&again).await;
        if again.deadline() != first.deadline() {
            break again.deadline();
        }
        let asked_for = BootTime::now().since(begun);
        assert!(asked_for < 3 * journal::KEEP, "never a new one");
    };
    assert!(BootTime::now().since(begun) > journal::KEEP);
    assert!(fresh > first.deadline());
}

#[tokio::test]
async fn a_deletion_after_the_drain_of_a_restart_has_a_deadline_of_its_own() {
    let house = house(vec![]);
    let restart = house.drains.hold(order(pod("a"), policy())).await;
    released(&restart).await;
    house.kernel.script().samples = vec![sample(1)];
    let now = BootTime::now();
    let deleted = |deleted| HoldOrder {
        deleted: Some(deleted),
        ..order(pod("a"), policy())
    };
    // Its news came somewhat late: it is what the first hold was for.
    let same = house.drains.hold(deleted(now + NEWS_WITHIN / 2)).await;
    assert_eq!(same.deadline(), restart.deadline());
    let later = house.drains.hold(deleted(now + 2 * NEWS_WITHIN)).await;
    assert!(later.deadline() > restart.deadline());
    let early = timeout(5 * QUIET, later.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn after_the_restart_of_a_container_a_stop_has_a_deadline_of_its_own() {
    let house = house(vec![]);
    let with = |ids: &[(&str, bool)]| {
        let containers = ids.iter().map(|(id, running)| Container {
            id: ContainerId::new(*id),
            name: "app".into(),
            running: *running,
            grace: None,
            wait_port: Ok(None),
        });
        let pod = Pod {
            containers: containers.collect(),
            ..(*pod("a")).clone()
        };
        order(Arc::new(pod), policy())
    };
    let restart = house.drains.hold(with(&[("c1", true)])).await;
    released(&restart).await;
    let same = house.drains.hold(with(&[("c1", false)])).await;
    assert_eq!(same.deadline(), restart.deadline());
    house.kernel.script().samples = vec![sample(1)];
    let later = house
        .drains
        .hold(with(&[("c1", false), ("c2", true)]))
        .await;
    assert!(later.deadline() > restart.deadline());
    let early = timeout(5 * QUIET, later.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn in_a_new_sandbox_a_pod_has_a_deadline_of_its_own_also_before_its_containers_run() {
    let house = house(vec![]);
    let before = house.drains.hold(order(pod("a"), policy())).await;
    released(&before).await;
    house.kernel.script().samples = vec![sample(1)];
    let again = Pod {
        sandbox: SandboxId::new("another"),
        ..(*pod("a")).clone()
    };
    let later = house.drains.hold(order(Arc::new(again), policy())).await;
    assert!(later.deadline() > before.deadline());
    let early = timeout(5 * QUIET, later.released()).await;
    assert!(early.is_err(), "a flow holds: {early:?}");
}

#[tokio::test]
async fn a_shorter_grace_brings_the_end_of_a_drain_forward_and_a_longer_one_does_not_put_it_off() {
    let house = house(vec![sample(1)]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    let (a, deadline) = (PodUid::new("a"), hold.deadline());
    house.drains.limit(&a, deadline + QUIET);
    house.drains.limit(&PodUid::new("b"), BootTime::now());
    house.drains.limit(&a, BootTime::now() + 4 * QUIET);
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Deadline));
    assert!(hold.deadline() < deadline);
}

#[tokio::test]
async fn a_dropped_hold_is_given_up_and_the_drain_goes_on() {
    let house = house(vec![sample(1)]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    house
        .until_view(|v| v.active.iter().any(|r| r.holds == 1))
        .await;
    drop(hold);
    house
        .until_view(|v| v.active.iter().any(|r| r.holds == 0))
        .await;
    house.close_all();
    house.edge(closes(1)).await;
    let view = house.until_view(|v| v.finished.len() == 1).await;
    assert_eq!(view.finished[0].reason, Some(ReleaseReason::Drained));
}

#[tokio::test]
async fn a_caller_that_goes_before_it_has_its_hold_is_not_counted() {
    let house = house(vec![sample(1)]);
    let _hold = house.drains.hold(order(pod("a"), policy())).await;
    {
        let gone = house.drains.hold(order(pod("a"), policy()));
        let mut gone = std::pin::pin!(gone);
        // Asked for, answered, and never picked up.
        let pending = std::future::poll_fn(|cx| Poll::Ready(gone.as_mut().poll(cx).is_pending()));
        assert!(pending.await);
        house
            .until_view(|v| v.active.iter().any(|r| r.holds == 2))
            .await;
    }
    house
        .until_view(|v| v.active.iter().any(|r| r.holds == 1))
        .await;
}

#[tokio::test]
async fn a_second_hold_shortens_the_deadline_for_all_unless_its_grace_is_unknown() {
    let house = house(vec![sample(1)]);
    let first = house.drains.hold(order(pod("a"), policy())).await;
    let deadline = first.deadline();
    let unknown = HoldOrder {
        grace: None,
        ..order(pod("a"), policy())
    };
    assert_eq!(house.drains.hold(unknown).await.deadline(), deadline);
    let shorter = HoldOrder {
        grace: Some(Duration::from_millis(300)),
        ..order(pod("a"), policy())
    };
    let second = house.drains.hold(shorter).await;
    assert!(second.deadline() < deadline);
    assert_eq!(second.deadline(), first.deadline());
    assert_eq!(second.reserve(), Duration::from_millis(100));
    let report = released(&first).await;
    assert_eq!(
        (report.reason, report.cut_total.unwrap()),
        (Some(ReleaseReason::Deadline), 1)
    );
}

#[tokio::test]
async fn a_limit_brings_the_deadline_of_its_own_pod_forward_and_never_back() {
    let house = house(vec![sample(1)]);
    let first = house.drains.hold(order(pod("a"), policy())).await;
    let other = house.drains.hold(order(pod("b"), policy())).await;
    let (deadline, others) = (first.deadline(), other.deadline());
    let uid = PodUid::new("a");
    house.drains.limit(&uid, deadline + Duration::from_secs(60));
    house.drains.limit(&PodUid::new("c"), BootTime::now());
    house
        .drains
        .limit(&uid, BootTime::now() + Duration::from_millis(300));
    let report = released(&first).await;
    assert_eq!(
        (report.reason, report.cut_total),
        (Some(ReleaseReason::Deadline), Some(1))
    );
    assert!(first.deadline() < deadline);
    assert_eq!(other.deadline(), others);
}

#[tokio::test]
async fn manual_release_answers_whether_there_was_a_drain() {
    let house = house(vec![sample(1)]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    assert!(!house.drains.release(&PodUid::new("b")).await);
    assert!(house.drains.release(&PodUid::new("a")).await);
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Manual));
    assert!(!house.drains.release(&PodUid::new("a")).await);
}

#[tokio::test]
async fn shutdown_releases_the_holds_there_are_and_those_to_come() {
    let house = house(vec![sample(1)]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    house.drains.shutdown();
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Shutdown));
    let later = house.drains.hold(order(pod("b"), policy())).await;
    assert_eq!(released(&later).await.reason, Some(ReleaseReason::Shutdown));
    assert!(!house.drains.release(&PodUid::new("b")).await);
}

#[test]
fn the_end_of_the_drivers_runtime_releases_its_holds() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
    };
    let drivers = runtime();
    let (house, hold) = drivers.block_on(async {
        let house = house(vec![sample(1)]);
        let hold = house.drains.hold(order(pod("a"), policy())).await;
        (house, hold)
    });
    drop(drivers);
    let report = runtime().block_on(async { released(&hold).await });
    assert_eq!(report.reason, Some(ReleaseReason::Shutdown));
    assert_eq!(report.pod, pod("a").name);
    drop(house);
}

#[tokio::test]
async fn a_pod_that_can_not_be_seen_is_held_for_the_settle_time() {
    let house = house(vec![]);
    let scope = Scope::Untracked("a sandboxed runtime".into());
    let hold = house.drains.hold(order(pod_in("a", scope), policy())).await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Untracked));
    assert_eq!(report.detail.as_deref(), Some("a sandboxed runtime"));
    assert!(report.held_ms >= 160, "{report:?}");
    assert_eq!(house.kernel.script().asked, Vec::<&str>::new());
}

#[tokio::test]
async fn panicking_and_failing_looks_never_release_as_drained() {
    for script in [
        Script {
            panics: true,
            ..Script::default()
        },
        Script {
            fails: true,
            ..Script::default()
        },
    ] {
        let house = house_with(FakeKernel(Mutex::new(script)), None);
        let hold = house.drains.hold(order(pod("a"), policy())).await;
        let report = released(&hold).await;
        assert_eq!(report.reason, Some(ReleaseReason::Untracked));
        assert!(report.detail.is_some());
    }
}

#[tokio::test]
async fn a_look_that_hangs_does_not_outlast_the_deadline() {
    let house = house_with(
        FakeKernel(Mutex::new(Script {
            hangs: true,
            ..Script::default()
        })),
        None,
    );
    let grace = Some(Duration::from_millis(450));
    let hold = house
        .drains
        .hold(HoldOrder {
            grace,
            ..order(pod("a"), policy())
        })
        .await;
    let report = released(&hold).await;
    assert_eq!(report.reason, Some(ReleaseReason::Deadline));
    assert_eq!(house.asked("look"), 1, "one at a time");
}

#[tokio::test]
async fn without_events_drains_are_untracked() {
    let mut house = house(vec![]);
    let before = house.drains.hold(order(pod("a"), policy())).await;
    house.events = None;
    assert_eq!(
        released(&before).await.reason,
        Some(ReleaseReason::Untracked)
    );
    let after = house.drains.hold(order(pod("b"), policy())).await;
    assert_eq!(
        released(&after).await.reason,
        Some(ReleaseReason::Untracked)
    );
}

#[tokio::test]
async fn a_driver_that_is_gone_or_hears_nothing_is_not_well() {
    let mut house = house(vec![]);
    assert_eq!(house.drains.health(), Ok(()));
    house.events = None;
    house.until_view(|v| v.blind.is_some()).await;
    assert!(
        house
            .drains
            .health()
            .unwrap_err()
            .contains("events have ended")
    );
    house.drains.shutdown();
    timeout(Duration::from_secs(5), house.drains.commands.closed())
        .await
        .expect("in time");
    assert!(house.drains.health().unwrap_err().contains("nobody"));
}

#[tokio::test]
async fn finished_drains_are_kept_newest_first_and_bounded() {
    let house = house(vec![]);
    let policy = Policy {
        until: Until::Settled,
        quiet: Duration::ZERO,
        ..policy()
    };
    for n in 0..MAX_FINISHED + 3 {
        let hold = house
            .drains
            .hold(order(pod(&format!("{n}")), policy.clone()))
            .await;
        released(&hold).await;
    }
    let view = house.until_view(|v| v.active.is_empty()).await;
    assert_eq!(view.finished.len(), MAX_FINISHED);
    assert_eq!(
        view.finished[0].pod.uid,
        PodUid::new(format!("{}", MAX_FINISHED + 2))
    );
}

#[tokio::test]
async fn views_are_numbered_and_published_only_when_something_changes() {
    let house = house(vec![sample(1)]);
    let _hold = house.drains.hold(order(pod("a"), policy())).await;
    let drain = house
        .until_view(|v| v.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    tokio::time::sleep(VIEW_PACE * 2).await;
    let mut view = house.drains.view();
    let calm = view.borrow_and_update().version;
    assert!(calm >= drain.version);
    tokio::time::sleep(VIEW_PACE * 2).await;
    assert_eq!(house.drains.view().borrow().version, calm);
    house.edge(opens(9)).await;
    let next = house
        .until_view(|v| v.active[0].arrived.unwrap() == 1)
        .await;
    assert_eq!(next.version, calm + 1);
}

#[tokio::test]
async fn a_hold_repeated_after_a_restart_keeps_its_first_deadline() {
    let dir = tempfile::tempdir().expect("a directory");
    let open = || Some(Journal::open(dir.path()).expect("a journal"));
    let first_house = house_with(
        FakeKernel(Mutex::new(Script {
            samples: vec![sample(1)],
            ..Script::default()
        })),
        open(),
    );
    let first = first_house.drains.hold(order(pod("a"), policy())).await;
    let deadline = first.deadline();
    let written = dir.path().join("a.json");
    timeout(Duration::from_secs(5), async {
        while !written.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("journalled in time");
    first_house.drains.shutdown();
    released(&first).await;

    let house = house_with(FakeKernel::default(), open());
    let again = house.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(again.deadline(), deadline);
    assert_eq!(released(&again).await.reason, Some(ReleaseReason::Drained));
}

#[tokio::test]
async fn a_journal_that_fails_stops_no_hold() {
    let dir = tempfile::tempdir().expect("a directory");
    let journal = Journal::open(dir.path()).expect("a journal");
    dir.close().expect("removed");
    let house = house_with(FakeKernel::default(), Some(journal));
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Drained));
}

#[tokio::test]
async fn lost_events_are_made_up_for_by_a_look() {
    let house = house(vec![sample(1)]);
    let hold = house.drains.hold(order(pod("a"), policy())).await;
    house
        .until_view(|v| v.active.iter().any(|r| r.phase == Phase::Drain))
        .await;
    house.close_all();
    let events = house.events.as_ref().expect("events are on");
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
    let house = house(vec![idle]);
    house.kernel.script().closes_slowly = true;
    let policy = Policy {
        idle_flows: IdleFlows::Close,
        ..policy()
    };
    let hold = house.drains.hold(order(pod("a"), policy)).await;
    let asked = async |what| {
        while house.asked(what) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let within = Duration::from_secs(5);
    timeout(within, asked("close")).await.expect("it is idle");
    assert_eq!(house.asked("stopped closing"), 0);
    assert!(house.drains.release(&PodUid::new("a")).await);
    timeout(within, asked("stopped closing"))
        .await
        .expect("nobody waits any more");
    assert_eq!(released(&hold).await.reason, Some(ReleaseReason::Manual));
}
