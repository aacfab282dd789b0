//! Exact lookups and the count of edges: what releases a drain without a walk of the node's table.

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
    drain::{
        driver::{DrainHandle, Drains, HoldOrder},
        policy::Policy,
        report::{LookKind, ReleaseReason, Report},
    },
    flow::TcpState,
    ids::{PodName, PodUid, SandboxId, WatchId},
    kernel::{KernelEvent, LookUp, Tracker},
    pods::{Pod, Scope},
};
use ebb_common::LOST_EVENT;
use rustix::{
    net::{SendFlags, connect, sendto},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::sync::mpsc;

use crate::{
    seeding::turn,
    support::{
        cgroup::Cgroup,
        kernel,
        link::Linked,
        namespace::{Namespace, scope_of_this_thread, sysctl},
        puppet::Puppet,
        raw,
        sockets::{self, ANY, give, listener_with, pair, take},
        world::World,
    },
};

trials![
    lookups_find_a_pods_flows_among_thousands_and_no_edge_is_missing,
    a_fast_open_child_is_missing_until_its_first_edge,
    case_09_a_fast_open_child_that_is_closed_before_its_handshake_holds_a_drain,
    an_edge_that_does_not_fit_into_the_ring_is_missing_for_good,
    drains_are_released_by_lookups_however_many_connections_others_have,
];

/// Connections of others.
const OTHERS: usize = 2_500;
const RELEASES: usize = 12;

/// A pod that is watched, by a tracker of the trial's own.
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

    fn look_up(&self, flows: &[&TcpStream]) -> Result<LookUp> {
        let ends = flows
            .iter()
            .map(|s| Ok((s.local_addr()?, s.peer_addr()?)))
            .collect::<Result<_>>()?;
        self.ends(ends)
    }

    fn ends(&self, ends: Vec<(SocketAddr, SocketAddr)>) -> Result<LookUp> {
        Ok(kernel::wait(self.tracker.look_up(&self.scope, ends))?)
    }

    /// Receives what has been reported, until nothing more comes.
    fn receive(&mut self) {
        let next = async |events: &mut mpsc::Receiver<KernelEvent>| {
            tokio::time::timeout(Duration::from_millis(300), events.recv()).await
        };
        while let Ok(Some(event)) = kernel::wait(next(self.events)) {
            match event {
                KernelEvent::Edge(edge) => self.received += u64::from(edge.watch == self.watch),
                KernelEvent::Lost => self.lost = true,
            }
        }
    }

    fn nothing_is_missing(&mut self) -> Result<()> {
        self.receive();
        let counted = self.look_up(&[])?.edges;
        ensure!(
            counted == self.received,
            "{counted} counted, {} received",
            self.received
        );
        Ok(())
    }
}

/// Runs `f` in a namespace of its own, with a tracker of its own.
fn alone(f: impl FnOnce(&World, Watched<'_>) -> Result<()> + Send) -> Result<()> {
    let _turn = turn();
    let (tracker, mut events) = kernel::start()?;
    Namespace::new()?.run(|| {
        let world = World::here(tracker)?;
        let watched = Watched::new(&world, &mut events)?;
        f(&world, watched)?;
        kernel::exact(&world.tracker, Some(&world.scope))
    })
}

/// Connections in a namespace of their own.
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

fn lookups_find_a_pods_flows_among_thousands_and_no_edge_is_missing() -> Result<()> {
    let _others = Others::open(OTHERS)?;
    alone(|_, mut watched| {
        ensure!(watched.look_up(&[])?.edges == 0);
        let listeners = [
            sockets::listener(16)?,
            TcpListener::bind("[::1]:0")?,
            TcpListener::bind("[::]:0")?,
        ];
        let mut open = vec![pair(&listeners[0])?, pair(&listeners[1])?];
        // IPv4 on a socket for both: its addresses are given as IPv4.
        let port = listeners[2].local_addr()?.port();
        let client = TcpStream::connect((ANY.ip(), port))?;
        open.push((listeners[2].accept()?.0, client));
        for (server, client) in &open {
            let v4 = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
            let (local, remote) = (v4(server.local_addr()?), v4(client.local_addr()?));
            let found = watched.ends(vec![(local, remote)])?.samples;
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

        // Each way to end has its own edges.
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
        let left = watched.ends(ends)?.samples;
        let over = |s| matches!(s, TcpState::TimeWait | TcpState::FinWait2);
        ensure!(left.iter().all(|s| over(s.state)), "{left:?}");

        // Another watch begins anew, and what the first one reported is not the second's.
        let (server, client) = pair(&listeners[0])?;
        let again = watched.tracker.watch(&watched.scope)?;
        ensure!(again != watched.watch && watched.look_up(&[])?.edges == 0);
        watched.watch = again;
        watched.received = 0;
        watched.nothing_is_missing()?;
        drop((server, client));
        watched.nothing_is_missing()?;
        ensure!(watched.received > 0);
        Ok(())
    })
}

fn a_fast_open_child_is_missing_until_its_first_edge() -> Result<()> {
    alone(|_, mut watched| {
        sysctl("ipv4/tcp_fastopen", "0x607")?;
        let listener = listener_with(ANY, 16, libc::IPPROTO_TCP, |s| {
            sockets::set(s, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)
        })?;
        let client = sockets::unconnected()?;
        raw::deafen(&client)?;
        let flags = SendFlags::DONTWAIT | SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
        sendto(&client, b"early", flags, &listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        take(&server, 5)?;
        watched.receive();
        // It holds, and no edge has told of it.
        let counted = watched.look_up(&[])?.edges;
        ensure!(watched.received == 0 && counted == 1, "{counted}");
        raw::undeafen(&client)?;
        let begun = Instant::now();
        while watched.received == 0 {
            ensure!(begun.elapsed() < Duration::from_secs(8), "no edge");
            watched.receive();
        }
        watched.nothing_is_missing()
    })
}

fn case_09_a_fast_open_child_that_is_closed_before_its_handshake_holds_a_drain() -> Result<()> {
    let _turn = turn();
    let pod = Linked::new()?;
    // They stay on the host's network, whoever uses them.
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
        until_looked_at(&drains)?;
        raw::deafen(&early)?;
        sockets::set(&early, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_NO_COOKIE, 1)?;
        let flags = SendFlags::DONTWAIT | SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
        sendto(&early, b"early", flags, &listener.local_addr()?)?;
        let (child, _) = listener.accept()?;
        take(&child, 5)?;
        give(&child, 100)?;
        // From SYN_RECV to FIN_WAIT1: the client has heard nothing yet.
        drop(child);
        drop((server, first));
        let released = async {
            tokio::time::timeout(Duration::from_millis(500), hold.released())
                .await
                .ok()
        };
        let early_end = kernel::wait(released);
        ensure!(early_end.is_none(), "the answer is lost: {early_end:?}");
        raw::undeafen(&early)?;
        let client = TcpStream::from(early);
        take(&client, 100)?;
        drop(client);
        let report = kernel::wait(hold.released());
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(
            (report.arrived, report.ended) == (Some(1), Some(2)),
            "{report:?}"
        );
        Ok(())
    })
}

fn an_edge_that_does_not_fit_into_the_ring_is_missing_for_good() -> Result<()> {
    let _turn = turn();
    let (tracker, mut events) = kernel::start()?;
    Namespace::new()?.run(|| {
        let w = &World::here(tracker)?;
        let mut watched = Watched::new(w, &mut events)?;
        let listener = sockets::listener(16)?;
        // Nobody receives meanwhile.
        while w.tracker.losses()?[LOST_EVENT as usize] == 0 {
            for _ in 0..100 {
                let (server, client) = pair(&listener)?;
                sockets::reset(client)?;
                drop(server);
            }
        }
        watched.receive();
        ensure!(watched.lost, "nobody was told");
        let counted = watched.look_up(&[])?.edges;
        ensure!(
            counted > watched.received,
            "{counted} counted, {} received",
            watched.received
        );
        let lost = w.tracker.losses()?[LOST_EVENT as usize];
        ensure!(counted == watched.received + lost, "{lost} lost");
        // The counters have missed nothing.
        w.has_no_drift()
    })
}

fn drains_are_released_by_lookups_however_many_connections_others_have() -> Result<()> {
    let _others = Others::open(OTHERS)?;
    let _turn = turn();
    let (tracker, events) = kernel::start()?;
    // On the host network, so that the clients are not in the pod.
    let cgroup = Cgroup::new("drained")?;
    let scope = Scope::HostNetwork(vec![cgroup.id()?]);
    let mut server = Puppet::start_in(&cgroup)?;
    let at = server.listen()?;
    let (notices, _) = mpsc::unbounded_channel();
    let drains = kernel::wait(async { Drains::spawn(Arc::new(tracker), events, None, notices) });
    let mut lags = Vec::new();
    let mut by_lookup = 0;
    for n in 0..RELEASES {
        let client = TcpStream::connect(at)?;
        server.tell("accept")?;
        let hold = kernel::wait(drains.hold(order(n, &scope)));
        until_looked_at(&drains)?;
        if n % 2 == 0 {
            // FIN_WAIT2 ends it, and another edge follows.
            server.tell("close")?;
            drop(client);
        } else {
            drop(client);
            server.tell("close")?;
        }
        let report: Arc<Report> = kernel::wait(hold.released());
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.ended == Some(1), "{report:?}");
        by_lookup += usize::from(report.released_by == Some(LookKind::Lookup));
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
    // Not all: an agent that gets no time walks.
    ensure!(by_lookup > 0, "all were released by walks");
    server.kill()
}

/// Waits until the first look of the drain phase has been made.
pub(crate) fn until_looked_at(drains: &DrainHandle) -> Result<()> {
    let begun = Instant::now();
    while !drains.view().borrow().active.iter().any(|r| r.walks == 2) {
        ensure!(begun.elapsed() < Duration::from_secs(8), "not looked at");
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
        patience: None,
        deleted: None,
    }
}
