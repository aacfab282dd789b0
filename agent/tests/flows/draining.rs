//! Drains of real connections in rare TCP states, with the real tracker and the real driver.

use std::{
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb::{
    drains::driver::{DrainHandle, Drains, Hold, HoldOrder},
    kernel::Tracker,
    pods::Pod,
};
use ebb_core::{
    drain_report::{ReleaseReason, Report},
    flow::{Direction, Exempt, FlowState, TcpState},
    ids::{CgroupId, PodUid},
    policy::{Policy, Until},
    scope::Scope,
};
use ebb_testkit::{
    namespace::{Namespace, ip, sysctl},
    trial::step,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    lookups::{order, until_dumped},
    starting::turn,
    support::{
        kernel,
        link::Linked,
        multipath,
        sockets::{
            self, destroy, listener_with, pair, read_bytes, read_to_end, unconnected_by,
            write_bytes,
        },
        worker::Worker,
        world::{scope_of_this_thread, world},
    },
};

ebb_testkit::trials![
    a_multipath_connection_holds_a_drain_until_its_last_subflow_is_closed,
    a_drain_treats_the_half_closed_connection_of_a_silent_server_as_idle,
    a_half_closed_connection_within_the_pod_stays_exempt_when_its_other_end_is_given_up,
    a_pod_that_cannot_be_watched_is_untracked,
    ebb_ends_an_idle_connection_through_its_owner_who_reads_no_later_request,
];

const MPTCP: i32 = 262;
const TIMEOUT: Duration = Duration::from_secs(30);

/// A driver of drains with a tracker of its own.
pub(crate) struct TestDriver {
    pub(crate) tracker: Tracker,
    pub(crate) drains: DrainHandle,
}

impl TestDriver {
    pub(crate) fn new() -> Result<Self> {
        let (tracker, events) = kernel::start()?;
        let (notices, _) = mpsc::unbounded_channel();
        let kernel = Arc::new(tracker.clone());
        let drains = kernel::wait(async { Drains::spawn(kernel, events, None, notices) });
        Ok(Self { tracker, drains })
    }

    /// Begins a hold and waits for the first dump of its drain phase.
    fn hold(&self, order: HoldOrder) -> Result<Hold> {
        let hold = kernel::wait(self.drains.hold(order));
        until_dumped(&self.drains)?;
        Ok(hold)
    }

    /// Releases the drain of the pod with this UID.
    pub(crate) fn release(&self, uid: &str) -> Result<()> {
        let released = kernel::wait(self.drains.release(&PodUid::new(uid)));
        ensure!(released.is_some(), "no drain of {uid}");
        Ok(())
    }

    pub(crate) fn lost_nothing(&self) -> Result<()> {
        kernel::lost_nothing(&self.tracker)
    }
}

pub(crate) fn stays_held(hold: &Hold, lasting: Duration) -> Result<()> {
    step("checking that the hold stays");
    let early = kernel::wait(async { timeout(lasting, hold.released()).await.ok() });
    ensure!(early.is_none(), "released: {early:?}");
    Ok(())
}

pub(crate) fn drained(hold: &Hold) -> Result<Arc<Report>> {
    step("waiting for a release");
    let report = kernel::wait(async { timeout(TIMEOUT, hold.released()).await });
    let report = report.context("still held")?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(report)
}

fn a_multipath_connection_holds_a_drain_until_its_last_subflow_is_closed() -> Result<()> {
    let _turn = turn();
    let pod = Linked::new()?;
    // The client's host has two addresses on the link.
    let [a, b, c, _] = pod.host_v4().octets();
    let second = Ipv4Addr::new(a, b, c, 3);
    ip(&format!("addr add {second}/24 dev flows{c}"))?;
    sysctl("mptcp/enabled", "1")?;
    multipath::open_a_subflow_from(second)?;
    let client = unconnected_by(MPTCP)?;
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        sysctl("mptcp/enabled", "1")?;
        let scope = scope_of_this_thread()?;
        let listener = listener_with((pod.v4(), 0).into(), 16, MPTCP, |_| Ok(()))?;
        rustix::net::connect(&client, &listener.local_addr()?)?;
        let client = TcpStream::from(client);
        let (server, _) = listener.accept()?;
        let talk = || -> Result<()> {
            write_bytes(&client, 10)?;
            read_bytes(&server, 10)?;
            write_bytes(&server, 10)?;
            read_bytes(&client, 10)
        };
        let subflows = || -> Result<Vec<(SocketAddr, SocketAddr)>> {
            let dump = kernel::wait(driver.tracker.dump(&scope))?;
            let open = dump
                .samples
                .iter()
                .filter(|s| s.state == TcpState::Established);
            Ok(open.map(|s| (s.local, s.remote)).collect())
        };
        step("waiting for the second subflow");
        let begun = Instant::now();
        while subflows()?.len() < 2 {
            talk()?;
            ensure!(begun.elapsed() < TIMEOUT, "no second subflow");
            sleep(Duration::from_millis(10));
        }
        let hold = driver.hold(order(0, &scope))?;
        // One subflow ends, as when a path fails. The other goes on.
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
            (report.arrived, report.ended) == (Some(0), Some(2)),
            "two subflows: {report:?}"
        );
        ensure!(report.cut_total == Some(0), "{report:?}");
        driver.lost_nothing()
    })
}

fn a_drain_treats_the_half_closed_connection_of_a_silent_server_as_idle() -> Result<()> {
    let pod = Linked::new()?;
    let client = sockets::unconnected()?;
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let listener = listener_with((pod.v4(), 0).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
        rustix::net::connect(&client, &listener.local_addr()?)?;
        let client = TcpStream::from(client);
        let (server, _) = listener.accept()?;
        write_bytes(&client, 10)?;
        read_bytes(&server, 10)?;
        // The request is unanswered, and the server has not read the end of the stream.
        client.shutdown(Shutdown::Write)?;
        let mut order = order(0, &scope);
        order.policy = Policy {
            until: Until::Idle,
            idle_after: Duration::from_millis(500),
            ..order.policy
        };
        let hold = kernel::wait(driver.drains.hold(order));
        let report = drained(&hold)?;
        ensure!(
            report.cut.len() == 1 && report.cut[0].state == FlowState::Idle,
            "{report:?}"
        );
        drop((client, server));
        driver.lost_nothing()
    })
}

fn a_half_closed_connection_within_the_pod_stays_exempt_when_its_other_end_is_given_up()
-> Result<()> {
    let driver = TestDriver::new()?;
    Namespace::new()?.run(|| {
        let scope = scope_of_this_thread()?;
        // How long an orphaned socket waits for the other side's FIN.
        sysctl("ipv4/tcp_fin_timeout", "1")?;
        let listener = sockets::listener(16)?;
        let (server, client) = pair(&listener)?;
        let port = client.local_addr()?.port();
        drop(client);
        step("waiting for the client's end to be given up");
        let begun = Instant::now();
        loop {
            let dump = kernel::wait(driver.tracker.dump(&scope))?;
            let is_client = |s: &&ebb_core::flow::Sample| s.local.port() == port;
            if !dump.samples.iter().any(|s| is_client(&s)) {
                break;
            }
            ensure!(begun.elapsed() < TIMEOUT, "{:?}", dump.samples);
            sleep(Duration::from_millis(50));
        }
        let snapshot = kernel::wait(driver.tracker.dump(&scope))?;
        let pod: Pod = Arc::unwrap_or_clone(order(0, &scope).pod);
        let snapshot = ebb_core::flow::Snapshot::new(
            snapshot.taken_at,
            &snapshot.samples,
            TIMEOUT,
            |_| true,
            |ip| pod.is_own_ip(ip),
        );
        let exempt: Vec<_> = snapshot.flows.iter().map(|f| f.exempt).collect();
        ensure!(exempt == [Some(Exempt::InPod)], "{:?}", snapshot.flows);
        let report = drained(&kernel::wait(driver.drains.hold(order(0, &scope))))?;
        ensure!(report.cut_total == Some(0), "{report:?}");
        drop(server);
        driver.lost_nothing()
    })
}

/// The size of `maps::WATCHED`.
const WATCHES: u64 = 4096;

fn a_pod_that_cannot_be_watched_is_untracked() -> Result<()> {
    let driver = TestDriver::new()?;
    Namespace::new()?.run(|| {
        let scope = scope_of_this_thread()?;
        // Cgroups that do not exist.
        let others = (1 << 40..).map(CgroupId).take(WATCHES as usize);
        let others = Scope::HostNetwork(others.collect());
        kernel::wait(async { driver.tracker.watch(&others) })?;
        let listener = sockets::listener(16)?;
        let both = pair(&listener)?;
        let hold = kernel::wait(driver.drains.hold(order(0, &scope)));
        let report = kernel::wait(async { timeout(TIMEOUT, hold.released()).await })?;
        ensure!(
            report.reason == Some(ReleaseReason::Untracked) && report.flows_now.is_none(),
            "{report:?}"
        );
        ensure!(report.detail.is_some(), "{report:?}");
        // The map has space again, and the failed watch left nothing behind.
        driver.tracker.unwatch(&others);
        drop(both);
        let report = drained(&kernel::wait(driver.drains.hold(order(1, &scope))))?;
        ensure!(report.flows_now.is_some(), "{report:?}");
        driver.lost_nothing()
    })
}

fn ebb_ends_an_idle_connection_through_its_owner_who_reads_no_later_request() -> Result<()> {
    const QUIET: Duration = Duration::from_millis(100);
    world(|w| {
        // A process of its own, because ebb finds a socket's owner by the namespace of its process.
        let mut server = Worker::start()?;
        let at = server.listen()?;
        w.serving_at(at);
        let client = TcpStream::connect(at)?;
        server.command("accept")?;
        write_bytes(&client, 10)?;
        server.command("answer")?;
        read_bytes(&client, 10)?;
        w.idle_after(QUIET);
        sleep(2 * QUIET);
        let mut flows = w.snapshot()?.flows;
        flows.retain(|f| f.direction == Direction::Inbound);
        let [flow] = &*flows else { bail!("{flows:?}") };
        ensure!(flow.state == FlowState::Idle, "{flow:?}");
        let cookie = flow.cookie;
        let over = CancellationToken::new();
        let closed = kernel::wait(w.tracker.close_idle(&w.scope, flows, over))?;
        ensure!(closed == [cookie], "{closed:?}");
        write_bytes(&client, 10)?;
        let read = server.command("read-to-end")?;
        ensure!(read == "0", "the server has read {read} bytes");
        server.command("close")?;
        let rest = read_to_end(&client)?;
        ensure!(rest == 0, "{rest} bytes");
        drop(client);
        w.has(&[], 0)
    })
}
