//! Drains of real connections in the corners that TCP has, with the real tracker behind the real driver.

use std::{
    fs,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::{
        driver::{DrainHandle, Drains, Hold, HoldOrder},
        policy::{Policy, Until},
        report::{LookKind, ReleaseReason, Report},
    },
    flow::{Exempt, FlowState, TcpState},
    ids::CgroupId,
    kernel::Tracker,
    pods::{Pod, Scope},
};
use ebb_common::LOST_STORAGE;
use tokio::{sync::mpsc, time::timeout};

use crate::{
    lookups::{order, until_looked_at},
    seeding::turn,
    support::{
        kernel,
        link::{Linked, ip},
        multipath,
        namespace::{Namespace, scope_of_this_thread, sysctl},
        sockets::{self, destroy, give, listener_with, pair, take, unconnected_by},
        steps::step,
    },
};

trials![
    a_multipath_connection_holds_until_its_last_subflow_is_gone,
    a_half_closed_connection_of_a_silent_server_is_idle_to_a_drain,
    a_half_closed_connection_within_the_pod_stays_exempt_when_its_other_end_is_given_up,
    a_connection_that_finds_no_memory_for_its_record_holds_its_drain,
    a_pod_that_can_not_be_watched_is_untracked,
];

const MPTCP: i32 = 262;
const LONGEST: Duration = Duration::from_secs(30);

/// A driver of drains with a tracker of its own.
struct Stage {
    tracker: Tracker,
    drains: DrainHandle,
}

impl Stage {
    fn new() -> Result<Self> {
        let (tracker, events) = kernel::start()?;
        let (notices, _) = mpsc::unbounded_channel();
        let kernel = Arc::new(tracker.clone());
        let drains = kernel::wait(async { Drains::spawn(kernel, events, None, notices) });
        Ok(Self { tracker, drains })
    }

    /// Holds the pod in whose namespace the calling thread is, until its drain phase has been looked at.
    fn hold(&self, order: HoldOrder) -> Result<Hold> {
        let hold = kernel::wait(self.drains.hold(order));
        until_looked_at(&self.drains)?;
        Ok(hold)
    }

    fn exact(&self, scope: &Scope) -> Result<()> {
        kernel::exact(&self.tracker, Some(scope))
    }
}

fn stays_held(hold: &Hold, lasting: Duration) -> Result<()> {
    step("waiting for nothing to be released");
    let early = kernel::wait(async { timeout(lasting, hold.released()).await.ok() });
    ensure!(early.is_none(), "cut: {early:?}");
    Ok(())
}

fn drained(hold: &Hold) -> Result<Arc<Report>> {
    step("waiting for a release");
    let report = kernel::wait(async { timeout(LONGEST, hold.released()).await });
    let report = report.context("still held")?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(report)
}

fn a_multipath_connection_holds_until_its_last_subflow_is_gone() -> Result<()> {
    let _turn = turn();
    let pod = Linked::new()?;
    // Its client's host has two ways to it.
    let [a, b, c, _] = pod.host_v4().octets();
    let second = Ipv4Addr::new(a, b, c, 3);
    ip(&format!("addr add {second}/24 dev flows{c}"))?;
    sysctl("mptcp/enabled", "1")?;
    multipath::open_a_subflow_from(second)?;
    let client = unconnected_by(MPTCP)?;
    let stage = Stage::new()?;
    pod.namespace.run(|| {
        sysctl("mptcp/enabled", "1")?;
        let scope = scope_of_this_thread()?;
        let listener = listener_with((pod.v4(), 0).into(), 16, MPTCP, |_| Ok(()))?;
        rustix::net::connect(&client, &listener.local_addr()?)?;
        let client = TcpStream::from(client);
        let (server, _) = listener.accept()?;
        let talk = || -> Result<()> {
            give(&client, 10)?;
            take(&server, 10)?;
            give(&server, 10)?;
            take(&client, 10)
        };
        let subflows = || -> Result<Vec<(SocketAddr, SocketAddr)>> {
            let look = kernel::wait(stage.tracker.look(&scope))?;
            let open = look
                .samples
                .iter()
                .filter(|s| s.state == TcpState::Established);
            Ok(open.map(|s| (s.local, s.remote)).collect())
        };
        step("waiting for the second subflow");
        let begun = Instant::now();
        while subflows()?.len() < 2 {
            talk()?;
            ensure!(begun.elapsed() < LONGEST, "no second subflow");
            sleep(Duration::from_millis(10));
        }
        let hold = stage.hold(order(0, &scope))?;
        // The one that the connection is known by goes, as when a path fails; the other goes on.
        let first = subflows()?.into_iter().find(|(_, r)| r.ip() != second);
        let (local, remote) = first.context("no first subflow")?;
        destroy(local, remote)?;
        stays_held(&hold, Duration::from_secs(1))?;
        ensure!(subflows()?.len() == 1, "{:?}", subflows()?);
        talk()?;
        drop(client);
        drop(server);
        let report = drained(&hold)?;
        ensure!(
            (report.arrived, report.ended) == (Some(0), Some(1)),
            "one connection: {report:?}"
        );
        ensure!(report.cut_total == Some(0), "{report:?}");
        stage.exact(&scope)
    })
}

fn a_half_closed_connection_of_a_silent_server_is_idle_to_a_drain() -> Result<()> {
    let pod = Linked::new()?;
    let client = sockets::unconnected()?;
    let stage = Stage::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let listener = listener_with((pod.v4(), 0).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
        rustix::net::connect(&client, &listener.local_addr()?)?;
        let client = TcpStream::from(client);
        let (server, _) = listener.accept()?;
        give(&client, 10)?;
        take(&server, 10)?;
        // Asked and not answered, and the server has not looked whether there is more.
        client.shutdown(Shutdown::Write)?;
        let mut order = order(0, &scope);
        order.policy = Policy {
            until: Until::Idle,
            idle_after: Duration::from_millis(500),
            ..order.policy
        };
        let hold = kernel::wait(stage.drains.hold(order));
        let report = drained(&hold)?;
        ensure!(
            report.cut.len() == 1 && report.cut[0].state == FlowState::Idle,
            "{report:?}"
        );
        drop((client, server));
        stage.exact(&scope)
    })
}

fn a_half_closed_connection_within_the_pod_stays_exempt_when_its_other_end_is_given_up()
-> Result<()> {
    let stage = Stage::new()?;
    Namespace::new()?.run(|| {
        let scope = scope_of_this_thread()?;
        // A socket that nobody has any more waits for the other side's end for so long.
        sysctl("ipv4/tcp_fin_timeout", "1")?;
        let listener = sockets::listener(16)?;
        let (server, client) = pair(&listener)?;
        let port = client.local_addr()?.port();
        drop(client);
        step("waiting for the client's end to be given up");
        let begun = Instant::now();
        loop {
            let look = kernel::wait(stage.tracker.look(&scope))?;
            let is_client = |s: &&ebb::flow::Sample| s.local.port() == port;
            if !look.samples.iter().any(|s| is_client(&s)) {
                break;
            }
            ensure!(begun.elapsed() < LONGEST, "{:?}", look.samples);
            sleep(Duration::from_millis(50));
        }
        let snapshot = kernel::wait(stage.tracker.look(&scope))?;
        let pod: Pod = Arc::unwrap_or_clone(order(0, &scope).pod);
        let snapshot = ebb::flow::Snapshot::new(
            snapshot.taken_at,
            &snapshot.samples,
            LONGEST,
            |_| true,
            |ip| pod.has_to_itself(ip),
        );
        let exempt: Vec<_> = snapshot.flows.iter().map(|f| f.exempt).collect();
        ensure!(exempt == [Some(Exempt::InPod)], "{:?}", snapshot.flows);
        let report = drained(&kernel::wait(stage.drains.hold(order(0, &scope))))?;
        ensure!(report.cut_total == Some(0), "{report:?}");
        drop(server);
        stage.exact(&scope)
    })
}

fn a_connection_that_finds_no_memory_for_its_record_holds_its_drain() -> Result<()> {
    // Other trials have trackers of their own that must lose nothing.
    let _turn = turn();
    kernel::shared();
    let pod = Linked::new()?;
    let clients = [sockets::unconnected()?, sockets::unconnected()?];
    let stage = Stage::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let listener = listener_with((pod.v4(), 0).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
        let at = listener.local_addr()?;
        let connect = |client: &OwnedFd| -> Result<TcpStream> {
            rustix::net::connect(client, &at)?;
            Ok(listener.accept()?.0)
        };
        let first = connect(&clients[0])?;
        let hold = stage.hold(order(0, &scope))?;
        let limit = "/proc/sys/net/core/optmem_max";
        let before = fs::read_to_string(limit).context("the limit of socket storage")?;
        kernel::STARVED.fetch_add(1, Ordering::Relaxed);
        sysctl("core/optmem_max", "0")?;
        let second = connect(&clients[1])?;
        sysctl("core/optmem_max", before.trim())?;
        let lost = stage.tracker.losses()?[LOST_STORAGE as usize];
        ensure!(lost == 1, "{lost} lost");
        drop(first);
        stays_held(&hold, Duration::from_secs(1))?;
        drop(second);
        let report = drained(&hold)?;
        ensure!(
            report.released_by == Some(LookKind::Walk) && report.cut_total == Some(0),
            "{report:?}"
        );
        ensure!(report.arrived == Some(1), "{report:?}");
        Ok(())
    })
}

/// As many as `maps::WATCHED` has places.
const WATCHES: u64 = 4096;

fn a_pod_that_can_not_be_watched_is_untracked() -> Result<()> {
    let stage = Stage::new()?;
    Namespace::new()?.run(|| {
        let scope = scope_of_this_thread()?;
        // Cgroups that nobody has.
        let others = (1 << 40..).map(CgroupId).take(WATCHES as usize);
        let others = Scope::HostNetwork(others.collect());
        kernel::wait(async { stage.tracker.watch(&others) })?;
        let listener = sockets::listener(16)?;
        let both = pair(&listener)?;
        let hold = kernel::wait(stage.drains.hold(order(0, &scope)));
        let report = kernel::wait(async { timeout(LONGEST, hold.released()).await })?;
        ensure!(
            report.reason == Some(ReleaseReason::Untracked) && report.flows_now.is_none(),
            "{report:?}"
        );
        ensure!(report.detail.is_some(), "{report:?}");
        // There is room again, and what was half begun is undone.
        stage.tracker.unwatch(&others);
        drop(both);
        let report = drained(&kernel::wait(stage.drains.hold(order(1, &scope))))?;
        ensure!(report.flows_now.is_some(), "{report:?}");
        stage.exact(&scope)
    })
}
