//! Lookups and the count of events, which release a drain without a dump of the node's table.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drains::driver::{DrainHandle, Drains, HoldOrder},
    kernel::{FlowLookUp, KernelEvent, LookUpFailure, Tracker},
    pods::Pod,
};
use ebb_common::LOST_EVENT;
use ebb_core::{
    drain_report::{DumpReason, ReleaseReason, ReleasedBy, Report},
    flow::TcpState,
    ids::{PodName, PodUid, SandboxId, WatchId},
    policy::Policy,
    scope::Scope,
};
use ebb_testkit::{
    cgroup::Cgroup,
    namespace::{Namespace, sysctl},
};
use rustix::{
    net::{SendFlags, connect, sendto},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::sync::mpsc;

use crate::{
    starting::turn,
    support::{
        cgroup::id_of,
        kernel,
        link::Linked,
        raw,
        sockets::{self, ANY_PORT, listener_with, pair, read_bytes, write_bytes},
        worker::Worker,
        world::{World, scope_of_this_thread},
    },
};

ebb_testkit::trials![
    lookups_find_a_pods_flows_among_thousands_and_no_event_is_missing,
    lookups_fail_where_servers_may_use_fast_open,
    case_09_a_fast_open_child_closed_before_its_handshake_is_done_holds_a_drain,
    events_that_do_not_fit_into_the_ring_buffer_are_reported_as_lost,
    drains_are_released_by_lookups_although_others_have_thousands_of_connections,
];

/// Ends of connections outside of the pod.
const OTHERS: usize = 2_500;
const RELEASES: usize = 12;

/// A watched pod, and a tracker for this trial alone.
struct Watched<'a> {
    tracker: &'a Tracker,
    scope: Scope,
    watch: WatchId,
    events: &'a mut mpsc::Receiver<KernelEvent>,
    received: u64,
    lost: bool,
}

impl<'a> Watched<'a> {
    fn new(w: &'a World, events: &'a mut mpsc::Receiver<KernelEvent>) -> Result<Self> {
        Ok(Self {
            tracker: &w.tracker,
            scope: w.scope.clone(),
            watch: w.tracker.watch(&w.scope)?,
            events,
            received: 0,
            lost: false,
        })
    }

    fn look_up(&self, flows: &[&TcpStream]) -> Result<FlowLookUp> {
        let addresses = flows
            .iter()
            .map(|s| Ok((s.local_addr()?, s.peer_addr()?)))
            .collect::<Result<_>>()?;
        self.look_up_addresses(addresses)
    }

    fn look_up_addresses(&self, addresses: Vec<(SocketAddr, SocketAddr)>) -> Result<FlowLookUp> {
        Ok(kernel::wait(self.tracker.look_up(&self.scope, addresses))?)
    }

    /// Receives events until there are no more.
    fn receive(&mut self) {
        let next = async |events: &mut mpsc::Receiver<KernelEvent>| {
            tokio::time::timeout(Duration::from_millis(300), events.recv()).await
        };
        while let Ok(Some(event)) = kernel::wait(next(self.events)) {
            match event {
                KernelEvent::Socket(event) => {
                    self.received += u64::from(event.watch == self.watch);
                }
                KernelEvent::Lost => self.lost = true,
            }
        }
    }

    fn nothing_is_missing(&mut self) -> Result<()> {
        self.receive();
        let sent = self.look_up(&[])?.sent;
        ensure!(
            sent == self.received,
            "{sent} sent, {} received",
            self.received
        );
        Ok(())
    }
}

/// Runs `f` with a namespace and a tracker for it alone.
fn with_own_tracker(f: impl FnOnce(&World, Watched<'_>) -> Result<()> + Send) -> Result<()> {
    let _turn = turn();
    let (tracker, mut events) = kernel::start()?;
    Namespace::new()?.run(|| {
        let world = World::here(tracker)?;
        let watched = Watched::new(&world, &mut events)?;
        f(&world, watched)?;
        kernel::lost_nothing(&world.tracker)
    })
}

/// Open connections in another namespace.
struct Others(#[expect(dead_code, reason = "open as long as this lives")] Vec<OwnedFd>);

impl Others {
    fn open(n: usize) -> Result<Self> {
        let most = getrlimit(Resource::Nofile).maximum;
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: most,
                maximum: most,
            },
        )?;
        Namespace::new()?.run(|| {
            let listener = sockets::listener(16)?;
            let mut open = Vec::new();
            for _ in 0..n / 2 {
                let (server, client) = pair(&listener)?;
                open.extend([OwnedFd::from(server), client.into()]);
            }
            Ok(Self(open))
        })
    }
}

fn lookups_find_a_pods_flows_among_thousands_and_no_event_is_missing() -> Result<()> {
    let _others = Others::open(OTHERS)?;
    with_own_tracker(|_, mut watched| {
        ensure!(watched.look_up(&[])?.sent == 0);
        let listeners = [
            sockets::listener(16)?,
            TcpListener::bind("[::1]:0")?,
            TcpListener::bind("[::]:0")?,
        ];
        let mut open = vec![pair(&listeners[0])?, pair(&listeners[1])?];
        // IPv4 on a dual-stack socket: ebb returns the addresses as IPv4.
        let port = listeners[2].local_addr()?.port();
        let client = TcpStream::connect((ANY_PORT.ip(), port))?;
        open.push((listeners[2].accept()?.0, client));
        for (server, client) in &open {
            let v4 = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
            let (local, remote) = (v4(server.local_addr()?), v4(client.local_addr()?));
            let found = watched.look_up_addresses(vec![(local, remote)])?.samples;
            ensure!(
                found.len() == 1
                    && found[0].state == TcpState::Established
                    && found[0].cookie.0 == rustix::net::sockopt::socket_cookie(server)?
                    && (found[0].local, found[0].remote) == (local, remote),
                "{found:?}"
            );
        }
        watched.nothing_is_missing()?;
        ensure!(watched.received == 3, "{} received", watched.received);

        // Each way to close makes one event.
        let (a, b) = open.pop().context("three")?;
        let ends = vec![(a.local_addr()?, a.peer_addr()?)];
        drop(a);
        drop(b);
        let (a, b) = open.pop().context("three")?;
        drop(b);
        drop(a);
        let (a, b) = open.pop().context("three")?;
        sockets::reset(a)?;
        drop(b);
        watched.nothing_is_missing()?;
        let left = watched.look_up_addresses(ends)?.samples;
        ensure!(left.is_empty(), "{left:?}");
        ensure!(watched.received == 6, "{} received", watched.received);

        // A second watch starts its count at 0, and does not count the events of the first.
        let (server, client) = pair(&listeners[0])?;
        let again = watched.tracker.watch(&watched.scope)?;
        ensure!(again != watched.watch && watched.look_up(&[])?.sent == 0);
        watched.watch = again;
        watched.received = 0;
        watched.nothing_is_missing()?;
        drop((server, client));
        watched.nothing_is_missing()?;
        ensure!(watched.received == 1);
        Ok(())
    })
}

fn lookups_fail_where_servers_may_use_fast_open() -> Result<()> {
    with_own_tracker(|w, watched| {
        ensure!(watched.look_up(&[]).is_ok(), "not by default");
        sysctl("ipv4/tcp_fastopen", "0x607")?;
        let listener = listener_with(ANY_PORT, 16, libc::IPPROTO_TCP, |s| {
            sockets::set(s, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)
        })?;
        let client = sockets::unconnected()?;
        raw::block_receive(&client)?;
        let flags = SendFlags::DONTWAIT | SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
        sendto(&client, b"early", flags, &listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        read_bytes(&server, 5)?;
        // It holds the drain, although it has made no event yet.
        let found = kernel::wait(w.tracker.look_up(&w.scope, vec![]));
        ensure!(matches!(found, Err(LookUpFailure::FastOpen)), "{found:?}");
        let flows = w.snapshot()?.flows;
        ensure!(flows.len() == 1, "{flows:?}");
        Ok(())
    })
}

fn case_09_a_fast_open_child_closed_before_its_handshake_is_done_holds_a_drain() -> Result<()> {
    let _turn = turn();
    let pod = Linked::new()?;
    // Made here, so that they are on the host's network.
    let (first, early) = (sockets::unconnected()?, sockets::unconnected()?);
    let (tracker, events) = kernel::start()?;
    pod.namespace.run(|| {
        sysctl("ipv4/tcp_fastopen", "0x607")?;
        let at = (pod.v4(), 0).into();
        let listener = listener_with(at, 16, libc::IPPROTO_TCP, |s| {
            sockets::set(s, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)
        })?;
        connect(&first, &listener.local_addr()?)?;
        let (server, _) = listener.accept()?;

        let (notices, _) = mpsc::unbounded_channel();
        let drains =
            kernel::wait(async { Drains::spawn(Arc::new(tracker), events, None, notices) });
        let hold = kernel::wait(drains.hold(order(0, &scope_of_this_thread()?)));
        until_dumped(&drains)?;
        raw::block_receive(&early)?;
        sockets::set(&early, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_NO_COOKIE, 1)?;
        let flags = SendFlags::DONTWAIT | SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
        sendto(&early, b"early", flags, &listener.local_addr()?)?;
        let (child, _) = listener.accept()?;
        read_bytes(&child, 5)?;
        write_bytes(&child, 100)?;
        // From SYN_RECV to FIN_WAIT1, because the client has received nothing yet.
        drop(child);
        drop((server, first));
        let released = async {
            tokio::time::timeout(Duration::from_millis(500), hold.released())
                .await
                .ok()
        };
        let early_end = kernel::wait(released);
        ensure!(early_end.is_none(), "the answer is lost: {early_end:?}");
        raw::unblock_receive(&early)?;
        let client = TcpStream::from(early);
        read_bytes(&client, 100)?;
        drop(client);
        let report = kernel::wait(hold.released());
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(
            (report.arrived, report.ended) == (Some(1), Some(2)),
            "{report:?}"
        );
        ensure!(
            report.dumps.contains_key(&DumpReason::FastOpen),
            "{report:?}"
        );
        Ok(())
    })
}

fn events_that_do_not_fit_into_the_ring_buffer_are_reported_as_lost() -> Result<()> {
    let _turn = turn();
    let (tracker, mut events) = kernel::start()?;
    Namespace::new()?.run(|| {
        let w = &World::here(tracker)?;
        let mut watched = Watched::new(w, &mut events)?;
        let listener = sockets::listener(16)?;
        // Meanwhile the trial receives no events.
        while w.tracker.losses()?[LOST_EVENT as usize] == 0 {
            for _ in 0..100 {
                let (server, client) = pair(&listener)?;
                sockets::reset(client)?;
                drop(server);
            }
        }
        watched.receive();
        ensure!(watched.lost, "the loss was not reported");
        let sent = watched.look_up(&[])?.sent;
        ensure!(
            sent > watched.received,
            "{sent} sent, {} received",
            watched.received
        );
        let lost = w.tracker.losses()?[LOST_EVENT as usize];
        ensure!(sent == watched.received + lost, "{lost} lost");
        // The counters are still right.
        w.agrees().map(drop)
    })
}

fn drains_are_released_by_lookups_although_others_have_thousands_of_connections() -> Result<()> {
    let _others = Others::open(OTHERS)?;
    let _turn = turn();
    let (tracker, events) = kernel::start()?;
    // On the host network, so that the clients are outside of the pod.
    let cgroup = Cgroup::new("drained")?;
    let scope = Scope::HostNetwork(vec![id_of(&cgroup)?]);
    let mut server = Worker::start_in(&cgroup)?;
    let at = server.listen()?;
    let (notices, _) = mpsc::unbounded_channel();
    let drains = kernel::wait(async { Drains::spawn(Arc::new(tracker), events, None, notices) });
    let mut lags = Vec::new();
    let mut by_lookup = 0;
    for n in 0..RELEASES {
        let client = TcpStream::connect(at)?;
        server.command("accept")?;
        let hold = kernel::wait(drains.hold(order(n, &scope)));
        until_dumped(&drains)?;
        if n % 2 == 0 {
            server.command("close")?;
            drop(client);
        } else {
            drop(client);
            server.command("close")?;
        }
        let report: Arc<Report> = kernel::wait(hold.released());
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.ended == Some(1), "{report:?}");
        by_lookup += usize::from(report.released_by == Some(ReleasedBy::Lookup));
        lags.push(report.release_lag_us.context("a close ended it")?);
    }
    lags.sort_unstable();
    let at = |percent: usize| lags[(lags.len() - 1) * percent / 100];
    eprintln!(
        "{by_lookup} of {RELEASES} released by lookups; lag p50 {} µs, p90 {} µs, p99 {} µs",
        at(50),
        at(90),
        at(99)
    );
    // Not all, because an agent on a busy machine dumps instead.
    ensure!(by_lookup > 0, "all were released by dumps");
    server.kill()
}

/// Waits for the first dump of the drain phase.
pub(crate) fn until_dumped(drains: &DrainHandle) -> Result<()> {
    let begun = Instant::now();
    while !drains
        .view()
        .borrow()
        .active
        .iter()
        .any(|r| r.dumps_ended == 2)
    {
        ensure!(begun.elapsed() < Duration::from_secs(8), "not dumped");
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

pub(crate) fn order(n: usize, scope: &Scope) -> HoldOrder {
    let quiet = Duration::from_millis(50);
    HoldOrder {
        pod: Arc::new(Pod {
            name: PodName {
                uid: PodUid::new(n.to_string()),
                namespace: "trial".into(),
                name: n.to_string(),
            },
            sandbox: SandboxId::new("sandbox"),
            scope: scope.clone(),
            ips: vec![],
            workload: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            containers: vec![],
        }),
        policy: Policy {
            quiet,
            settle_max: quiet,
            ..Policy::default()
        },
        warnings: vec![],
        grace: Some(Duration::from_secs(60)),
        rpc_timeout: None,
        deletion: None,
        is_stop: true,
        is_not_deleted: false,
        is_unanswered: false,
        traceparent: None,
        is_listed: true,
    }
}
