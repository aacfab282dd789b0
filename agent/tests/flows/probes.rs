//! The kubelet's probes, which ebb recognises by the socket at their other end alone.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb::kernel::{KernelEvent, SocketChange, Tracker};
use ebb_core::{
    arrivals::Arrivals,
    flow::{
        Exempt,
        FlowState::{Active, Backlog},
        Snapshot,
    },
    scope::Scope,
};
use ebb_testkit::{cgroup::Cgroup, parts::Parts};
use tokio::time::timeout;

use crate::support::{
    cgroup::{self, id_of},
    kernel,
    link::Linked,
    sockets::{self, listener_with},
    worker::Worker,
    world::World,
};

ebb_testkit::trials![
    a_connection_of_the_kubelet_is_a_probe_before_and_after_it_is_accepted,
    a_client_in_another_cgroup_with_the_same_address_is_no_probe,
    a_client_masqueraded_to_the_kubelets_address_is_no_probe,
    a_connection_dialled_by_the_kubelets_cgroup_in_another_namespace_is_no_probe,
    a_client_that_reuses_a_probes_port_is_no_probe,
    probes_are_recognised_over_ipv6_and_on_dual_stack_listeners,
    a_probe_of_a_host_network_pod_is_recognised,
    the_event_of_an_opened_connection_says_whether_it_is_a_probe,
    a_restarted_kubelet_is_found_at_the_next_watch,
    probes_and_connections_within_the_pod_are_not_counted_as_a_clients,
    clients_that_connect_are_counted_with_the_gaps_between_them,
];

const A_WHILE: Duration = Duration::from_millis(100);
const TIMEOUT: Duration = Duration::from_secs(10);

/// A listener on all addresses of both families, or of IPv4 alone, in the calling thread's namespace.
fn listen(any: &str) -> Result<TcpListener> {
    listener_with(any.parse()?, 64, libc::IPPROTO_TCP, |_| Ok(()))
}

/// Runs `f` in a pod with a server. The kubelet and the client are on the host's network.
fn with_server(any: &str, f: impl FnOnce(&ServerPod<'_>) -> Result<()> + Send) -> Result<()> {
    with_server_and_tracker(kernel::shared(), any, f)
}

fn with_server_and_tracker(
    tracker: Tracker,
    any: &str,
    f: impl FnOnce(&ServerPod<'_>) -> Result<()> + Send,
) -> Result<()> {
    let pod = Linked::new()?;
    let own = Cgroup::new(&format!("client-of-{}", pod.v4()))?;
    let mut workers = [
        Worker::start_at(&cgroup::kubelet()?)?,
        Worker::start_in(&own)?,
    ];
    let [kubelet, client] = &mut workers;
    pod.namespace.run(|| {
        let world = World::here(tracker)?;
        let listener = world.serving(listen(any)?)?;
        let port = listener.local_addr()?.port();
        let server = ServerPod {
            pod: &pod,
            world,
            listener,
            port,
            kubelet: kubelet.into(),
            client: client.into(),
        };
        f(&server)?;
        kernel::lost_nothing(&server.world.tracker)
    })
}

struct ServerPod<'a> {
    pod: &'a Linked,
    world: World,
    listener: TcpListener,
    port: u16,
    kubelet: std::cell::RefCell<&'a mut Worker>,
    client: std::cell::RefCell<&'a mut Worker>,
}

impl ServerPod<'_> {
    fn kubelet(&self, line: &str) -> Result<String> {
        self.kubelet.borrow_mut().command(line)
    }

    fn client(&self, line: &str) -> Result<String> {
        self.client.borrow_mut().command(line)
    }

    fn server(&self) -> SocketAddr {
        (self.pod.v4(), self.port).into()
    }

    /// Why each flow does not hold, by its peer.
    fn exempt(&self) -> Result<ByPeer> {
        Ok(exempt(&self.world.snapshot()?))
    }

    /// Demands that there is one flow, and that it is exempt for this reason.
    fn has_one(&self, wanted: Option<Exempt>) -> Result<()> {
        let all = self.exempt()?;
        ensure!(
            all.len() == 1 && all.values().all(|e| *e == wanted),
            "{all:?}, not {wanted:?}"
        );
        Ok(())
    }
}

type ByPeer = BTreeMap<SocketAddr, Option<Exempt>>;

fn exempt(snapshot: &Snapshot) -> ByPeer {
    snapshot
        .flows
        .iter()
        .map(|f| (f.remote, f.exempt))
        .collect()
}

const PROBE: Option<Exempt> = Some(Exempt::Probe);

fn a_connection_of_the_kubelet_is_a_probe_before_and_after_it_is_accepted() -> Result<()> {
    with_server("0.0.0.0:0", |s| {
        s.kubelet(&format!("connect {}", s.server()))?;
        s.world.has(&[(Backlog, 1)], 0)?;
        s.has_one(PROBE)?;
        let (server, from) = s.listener.accept()?;
        s.world.has(&[(Active, 1)], 0)?;
        ensure!(s.exempt()? == [(from, PROBE)].into(), "{:?}", s.exempt()?);
        s.kubelet("close")?;
        s.world
            .has(&[(ebb_core::flow::FlowState::HalfClosed, 1)], 0)?;
        drop(server);
        s.world.has(&[], 0)
    })
}

fn a_client_in_another_cgroup_with_the_same_address_is_no_probe() -> Result<()> {
    with_server("0.0.0.0:0", |s| {
        s.kubelet(&format!("connect {}", s.server()))?;
        s.client(&format!("connect {}", s.server()))?;
        s.world.has(&[(Backlog, 2)], 0)?;
        let (of_kubelet, of_client): (SocketAddr, SocketAddr) =
            (s.kubelet("local")?.parse()?, s.client("local")?.parse()?);
        ensure!(of_kubelet.ip() == of_client.ip(), "two addresses");
        let wanted = [(of_kubelet, PROBE), (of_client, None)].into();
        ensure!(s.exempt()? == wanted, "{:?}, not {wanted:?}", s.exempt()?);
        s.world.has(&[(Backlog, 2)], 0)
    })
}

fn a_client_masqueraded_to_the_kubelets_address_is_no_probe() -> Result<()> {
    let elsewhere = Linked::new()?;
    let mut iptables = Parts::iptables()?;
    let rule = format!(
        "-w -t nat -A POSTROUTING -s {} -j MASQUERADE",
        elsewhere.v4()
    );
    let out = iptables.args(rule.split(' ')).output()?;
    ensure!(out.status.success(), "iptables {rule}: {out:?}");
    let mut client = elsewhere.namespace.run(Worker::start)?;
    with_server("0.0.0.0:0", |s| {
        s.kubelet(&format!("connect {}", s.server()))?;
        client.command(&format!("connect {}", s.server()))?;
        s.world.has(&[(Backlog, 2)], 0)?;
        let of_kubelet: SocketAddr = s.kubelet("local")?.parse()?;
        let own: SocketAddr = client.command("local")?.parse()?;
        let seen = s.exempt()?;
        ensure!(
            seen.iter()
                .all(|(from, _)| from.ip() == of_kubelet.ip() && *from != own),
            "not masqueraded: {seen:?}"
        );
        for (from, exempt) in &seen {
            let wanted = if *from == of_kubelet { PROBE } else { None };
            ensure!(*exempt == wanted, "{seen:?}");
        }
        Ok(())
    })
}

fn a_connection_dialled_by_the_kubelets_cgroup_in_another_namespace_is_no_probe() -> Result<()> {
    let elsewhere = Linked::new()?;
    let mut client = elsewhere
        .namespace
        .run(|| Worker::start_at(&cgroup::kubelet()?))?;
    with_server("0.0.0.0:0", |s| {
        client.command(&format!("connect {}", s.server()))?;
        s.world.has(&[(Backlog, 1)], 0)?;
        s.has_one(None)
    })
}

fn a_client_that_reuses_a_probes_port_is_no_probe() -> Result<()> {
    with_server("0.0.0.0:0", |s| {
        let from = SocketAddr::from((s.pod.host_v4(), 29_999));
        for (by_kubelet, wanted) in [(true, PROBE), (false, None), (true, PROBE), (false, None)] {
            let line = format!("connect-from {from} {}", s.server());
            if by_kubelet {
                s.kubelet(&line)?;
            } else {
                s.client(&line)?;
            }
            s.world.has(&[(Backlog, 1)], 0)?;
            ensure!(s.exempt()? == [(from, wanted)].into(), "{:?}", s.exempt()?);
            // A reset, so that no TIME_WAIT socket keeps the port.
            sockets::reset(s.listener.accept()?.0)?;
            s.world.has(&[], 0)?;
            if by_kubelet {
                s.kubelet("close")?;
            } else {
                s.client("close")?;
            }
        }
        Ok(())
    })
}

fn probes_are_recognised_over_ipv6_and_on_dual_stack_listeners() -> Result<()> {
    with_server("[::]:0", |s| {
        let mapped: Ipv6Addr = s.pod.v4().to_ipv6_mapped();
        let servers: [SocketAddr; 3] = [
            s.server(),
            (mapped, s.port).into(),
            (s.pod.v6(), s.port).into(),
        ];
        for server in servers {
            s.kubelet(&format!("connect {server}"))?;
            s.world.has(&[(Backlog, 1)], 0)?;
            s.has_one(PROBE)
                .with_context(|| format!("a probe of {server}"))?;
            s.kubelet("close")?;
            drop(s.listener.accept()?);
            s.world.has(&[], 0)?;
            s.client(&format!("connect {server}"))?;
            s.world.has(&[(Backlog, 1)], 0)?;
            s.has_one(None)
                .with_context(|| format!("a client of {server}"))?;
            s.client("close")?;
            drop(s.listener.accept()?);
            s.world.has(&[], 0)?;
        }
        Ok(())
    })?;
    // From a dual-stack socket to an IPv4 socket.
    with_server("0.0.0.0:0", |s| {
        s.kubelet(&format!(
            "connect [{}]:{}",
            s.pod.v4().to_ipv6_mapped(),
            s.port
        ))?;
        s.world.has(&[(Backlog, 1)], 0)?;
        s.has_one(PROBE)
    })
}

fn a_probe_of_a_host_network_pod_is_recognised() -> Result<()> {
    let own = Cgroup::new("on-the-hosts-network")?;
    let mut server = Worker::start_in(&own)?;
    let mut kubelet = Worker::start_at(&cgroup::kubelet()?)?;
    let mut client = Worker::start()?;
    let at = server.listen()?;
    let tracker = kernel::shared();
    for dialler in [&mut kubelet, &mut client] {
        dialler.command(&format!("connect {at}"))?;
        server.command("accept")?;
    }
    let dump = kernel::wait(tracker.dump(&Scope::HostNetwork(vec![id_of(&own)?])))?;
    let snapshot = Snapshot::new(dump.taken_at, &dump.samples, TIMEOUT, |_| true, |_| false);
    let seen = exempt(&snapshot);
    let wanted = BTreeMap::from([
        (kubelet.command("local")?.parse()?, PROBE),
        (client.command("local")?.parse()?, None),
    ]);
    ensure!(seen == wanted, "{seen:?}, not {wanted:?}");
    Ok(())
}

fn the_event_of_an_opened_connection_says_whether_it_is_a_probe() -> Result<()> {
    const PROBES: u64 = 20;
    let (tracker, mut events) = kernel::start_with_kubelet(Some(&cgroup::kubelet()?))?;
    with_server_and_tracker(tracker.clone(), "[::]:0", |s| {
        tracker.watch(&s.world.scope)?;
        let mut received = 0;
        let mut next = |wanted: SocketChange| -> Result<bool> {
            let event = kernel::wait(async { timeout(TIMEOUT, events.recv()).await })?;
            let Some(KernelEvent::Socket(event)) = event else {
                anyhow::bail!("not an event of a connection: {event:?}");
            };
            received += 1;
            ensure!(event.change == wanted, "{event:?}, not {wanted:?}");
            Ok(event.exempt)
        };
        for n in 0..PROBES {
            s.kubelet(&format!("connect {}", s.server()))?;
            let accepted = s.listener.accept()?;
            // The kubelet's end is still open when ebb looks it up.
            ensure!(next(SocketChange::Opened)?, "probe {n} is a client");
            drop(accepted);
            s.kubelet("close")?;
            next(SocketChange::Closed)?;
        }
        s.client(&format!("connect {}", s.server()))?;
        drop(s.listener.accept()?);
        ensure!(!next(SocketChange::Opened)?, "the client is a probe");
        s.client("close")?;
        next(SocketChange::Closed)?;
        // Probes count as received. Otherwise lookups would find events missing.
        let sent = kernel::wait(tracker.look_up(&s.world.scope, vec![]))?.sent;
        ensure!(sent == received, "{sent} sent, {received} received");
        Ok(())
    })
}

fn a_restarted_kubelet_is_found_at_the_next_watch() -> Result<()> {
    // The tracker gets the name, because it can't find this one.
    let first = Cgroup::new("restarted")?;
    let path = first.path().to_owned();
    let (tracker, _events) = kernel::start_with_kubelet(Some(&path))?;
    let before = id_of(&first)?;
    drop(first);
    let again = Cgroup::new("restarted")?;
    ensure!(id_of(&again)? != before, "the same cgroup");
    let mut kubelet = Worker::start_at(&path)?;
    with_server_and_tracker(tracker.clone(), "0.0.0.0:0", |s| {
        let scope = &s.world.scope;
        kubelet.command(&format!("connect {}", s.server()))?;
        s.has_one(None)?;
        let until = Instant::now() + TIMEOUT;
        // The tracker looks for the kubelet in the background.
        kernel::wait(async { tracker.watch(scope) })?;
        loop {
            kubelet.command(&format!("connect {}", s.server()))?;
            let newest: SocketAddr = kubelet.command("local")?.parse()?;
            if s.exempt()?.get(&newest) == Some(&PROBE) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "not a probe: {:?}", s.exempt()?);
            sleep(A_WHILE);
        }
    })
}

impl ServerPod<'_> {
    /// How often clients have connected.
    fn arrivals(&self) -> Result<Arrivals> {
        let arrivals = kernel::wait(self.world.tracker.arrivals(&self.world.scope))?;
        arrivals.context("not known how often clients connect")
    }
}

fn probes_and_connections_within_the_pod_are_not_counted_as_a_clients() -> Result<()> {
    let (tracker, _events) = kernel::start_with_kubelet(Some(&cgroup::kubelet()?))?;
    with_server_and_tracker(tracker, "[::]:0", |s| {
        let servers: [SocketAddr; 3] = [
            s.server(),
            (s.pod.v4().to_ipv6_mapped(), s.port).into(),
            (s.pod.v6(), s.port).into(),
        ];
        for server in servers {
            s.kubelet(&format!("connect {server}"))?;
            drop(s.listener.accept()?);
            s.kubelet("close")?;
        }
        let within: [SocketAddr; 4] = [
            s.server(),
            (s.pod.v6(), s.port).into(),
            (Ipv4Addr::LOCALHOST, s.port).into(),
            (Ipv6Addr::LOCALHOST, s.port).into(),
        ];
        for server in within {
            let client = TcpStream::connect(server).with_context(|| format!("{server}"))?;
            drop((s.listener.accept()?, client));
        }
        let before = s.arrivals()?;
        ensure!(before.gap.is_none(), "{before:?}");
        for server in servers {
            s.client(&format!("connect {server}"))?;
            drop(s.listener.accept()?);
            s.client("close")?;
            let after = s.arrivals()?;
            ensure!(
                after.gap.is_some_and(|gap| gap <= after.observed),
                "{after:?}, from {server}"
            );
        }
        Ok(())
    })
}

fn clients_that_connect_are_counted_with_the_gaps_between_them() -> Result<()> {
    let (tracker, _events) = kernel::start_with_kubelet(Some(&cgroup::kubelet()?))?;
    with_server_and_tracker(tracker, "0.0.0.0:0", |s| {
        for _ in 0..60 {
            s.client(&format!("connect {}", s.server()))?;
            drop(s.listener.accept()?);
            s.client("close")?;
            sleep(Duration::from_millis(50));
        }
        let counted = s.arrivals()?;
        let gap = counted.gap.context("no client has connected")?;
        // The time before the first connection and the silence now are gaps, too.
        ensure!(
            gap >= Duration::from_millis(40) && gap < counted.observed / 2,
            "{counted:?}"
        );
        sleep(Duration::from_secs(6));
        let silent = s.arrivals()?;
        ensure!(
            silent.gap.is_some_and(|later| later > gap * 2),
            "{silent:?} after {counted:?}"
        );
        Ok(())
    })
}
