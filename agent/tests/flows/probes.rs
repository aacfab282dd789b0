//! The kubelet's probes: known by the socket at their other end, and by nothing else.

use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr, TcpListener},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    flow::{
        Exempt,
        FlowState::{Active, Backlog},
        Snapshot,
    },
    kernel::{KernelEvent, Tracker},
    pods::Scope,
};
use ebb_node::parts::Parts;

use crate::support::{
    cgroup::{self, Cgroup},
    kernel,
    link::Linked,
    puppet::Puppet,
    sockets::{self, listener_with},
    world::World,
};

trials![
    a_kubelets_connection_is_a_probe_before_it_is_accepted_and_for_as_long_as_it_lives,
    a_client_of_another_cgroup_on_the_same_address_is_no_probe,
    a_client_that_is_masqueraded_to_the_kubelets_address_is_no_probe,
    what_the_kubelets_cgroup_dials_in_another_namespace_is_no_probe,
    whoever_has_a_probes_port_after_it_is_no_probe,
    probes_are_known_by_ipv6_and_on_listeners_for_both,
    a_probe_of_a_pod_on_the_hosts_network_is_one,
    probes_that_live_a_moment_are_never_reported_as_edges,
    a_restarted_kubelet_is_known_from_the_next_watch_on,
];

const A_WHILE: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(10);

/// A listener on all addresses of both families, or of IPv4 alone, in the calling thread's namespace.
fn listen(any: &str) -> Result<TcpListener> {
    listener_with(any.parse()?, 64, libc::IPPROTO_TCP, |_| Ok(()))
}

/// Plays a trial with a server in a pod of its own. The puppets that `f` starts through [`Stage::puppet`] are on
/// the host's network.
fn on_stage(any: &str, f: impl FnOnce(&Stage<'_>) -> Result<()> + Send) -> Result<()> {
    on_stage_of(kernel::shared(), any, f)
}

fn on_stage_of(
    tracker: Tracker,
    any: &str,
    f: impl FnOnce(&Stage<'_>) -> Result<()> + Send,
) -> Result<()> {
    let pod = Linked::new()?;
    let own = Cgroup::new(&format!("client-of-{}", pod.v4()))?;
    let mut actors = [
        Puppet::start_at(&cgroup::kubelet()?)?,
        Puppet::start_in(&own)?,
    ];
    let [kubelet, client] = &mut actors;
    pod.namespace.run(|| {
        let world = World::here(tracker)?;
        let listener = world.serving(listen(any)?)?;
        let port = listener.local_addr()?.port();
        let stage = Stage {
            pod: &pod,
            world,
            listener,
            port,
            kubelet: kubelet.into(),
            client: client.into(),
        };
        f(&stage)?;
        kernel::exact(&stage.world.tracker, Some(&stage.world.scope))
    })
}

struct Stage<'a> {
    pod: &'a Linked,
    world: World,
    listener: TcpListener,
    port: u16,
    kubelet: std::cell::RefCell<&'a mut Puppet>,
    client: std::cell::RefCell<&'a mut Puppet>,
}

impl Stage<'_> {
    fn kubelet(&self, line: &str) -> Result<String> {
        self.kubelet.borrow_mut().tell(line)
    }

    fn client(&self, line: &str) -> Result<String> {
        self.client.borrow_mut().tell(line)
    }

    fn server(&self) -> SocketAddr {
        (self.pod.v4(), self.port).into()
    }

    /// Why each flow does not hold, by its peer.
    fn exempt(&self) -> Result<ByPeer> {
        Ok(exempt(&self.world.snapshot()?))
    }

    /// Demands that there is one flow, and that it is exempt for this reason.
    fn one_is(&self, wanted: Option<Exempt>) -> Result<()> {
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

fn a_kubelets_connection_is_a_probe_before_it_is_accepted_and_for_as_long_as_it_lives() -> Result<()>
{
    on_stage("0.0.0.0:0", |s| {
        s.kubelet(&format!("connect {}", s.server()))?;
        s.world.has(&[(Backlog, 1)], 0)?;
        s.one_is(PROBE)?;
        let (server, from) = s.listener.accept()?;
        s.world.has(&[(Active, 1)], 0)?;
        ensure!(s.exempt()? == [(from, PROBE)].into(), "{:?}", s.exempt()?);
        // Longer than what is noted of a connection that nobody accepts is believed.
        sleep(Duration::from_secs(3));
        s.one_is(PROBE)?;
        // The peer's end goes first.
        s.kubelet("close")?;
        s.world.has(&[(ebb::flow::FlowState::HalfClosed, 1)], 0)?;
        s.one_is(PROBE)?;
        drop(server);
        s.world.has(&[], 0)
    })
}

fn a_client_of_another_cgroup_on_the_same_address_is_no_probe() -> Result<()> {
    on_stage("0.0.0.0:0", |s| {
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

fn a_client_that_is_masqueraded_to_the_kubelets_address_is_no_probe() -> Result<()> {
    let elsewhere = Linked::new()?;
    let mut iptables = Parts::find()?.iptables()?;
    let rule = format!(
        "-w -t nat -A POSTROUTING -s {} -j MASQUERADE",
        elsewhere.v4()
    );
    let out = iptables.args(rule.split(' ')).output()?;
    ensure!(out.status.success(), "iptables {rule}: {out:?}");
    let mut client = elsewhere.namespace.run(Puppet::start)?;
    on_stage("0.0.0.0:0", |s| {
        s.kubelet(&format!("connect {}", s.server()))?;
        client.tell(&format!("connect {}", s.server()))?;
        s.world.has(&[(Backlog, 2)], 0)?;
        let of_kubelet: SocketAddr = s.kubelet("local")?.parse()?;
        let own: SocketAddr = client.tell("local")?.parse()?;
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

fn what_the_kubelets_cgroup_dials_in_another_namespace_is_no_probe() -> Result<()> {
    let elsewhere = Linked::new()?;
    let mut client = elsewhere
        .namespace
        .run(|| Puppet::start_at(&cgroup::kubelet()?))?;
    on_stage("0.0.0.0:0", |s| {
        client.tell(&format!("connect {}", s.server()))?;
        s.world.has(&[(Backlog, 1)], 0)?;
        s.one_is(None)
    })
}

fn whoever_has_a_probes_port_after_it_is_no_probe() -> Result<()> {
    on_stage("0.0.0.0:0", |s| {
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
            // A reset, which leaves no TIME_WAIT in the way of the next one.
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

fn probes_are_known_by_ipv6_and_on_listeners_for_both() -> Result<()> {
    on_stage("[::]:0", |s| {
        let mapped: Ipv6Addr = s.pod.v4().to_ipv6_mapped();
        let servers: [SocketAddr; 3] = [
            s.server(),
            (mapped, s.port).into(),
            (s.pod.v6(), s.port).into(),
        ];
        for server in servers {
            s.kubelet(&format!("connect {server}"))?;
            s.world.has(&[(Backlog, 1)], 0)?;
            s.one_is(PROBE)
                .with_context(|| format!("a probe of {server}"))?;
            s.kubelet("close")?;
            drop(s.listener.accept()?);
            s.world.has(&[], 0)?;
            s.client(&format!("connect {server}"))?;
            s.world.has(&[(Backlog, 1)], 0)?;
            s.one_is(None)
                .with_context(|| format!("a client of {server}"))?;
            s.client("close")?;
            drop(s.listener.accept()?);
            s.world.has(&[], 0)?;
        }
        Ok(())
    })?;
    // From a socket for both to one for IPv4 alone.
    on_stage("0.0.0.0:0", |s| {
        s.kubelet(&format!(
            "connect [{}]:{}",
            s.pod.v4().to_ipv6_mapped(),
            s.port
        ))?;
        s.world.has(&[(Backlog, 1)], 0)?;
        s.one_is(PROBE)
    })
}

fn a_probe_of_a_pod_on_the_hosts_network_is_one() -> Result<()> {
    let own = Cgroup::new("on-the-hosts-network")?;
    let mut server = Puppet::start_in(&own)?;
    let mut kubelet = Puppet::start_at(&cgroup::kubelet()?)?;
    let mut client = Puppet::start()?;
    let at = server.listen()?;
    let tracker = kernel::shared();
    for dialler in [&mut kubelet, &mut client] {
        dialler.tell(&format!("connect {at}"))?;
        server.tell("accept")?;
    }
    let look = kernel::wait(tracker.look(&Scope::HostNetwork(vec![own.id()?])))?;
    let snapshot = Snapshot::new(look.taken_at, &look.samples, PATIENCE, |_| true, |_| false);
    let seen = exempt(&snapshot);
    let wanted = BTreeMap::from([
        (kubelet.tell("local")?.parse()?, PROBE),
        (client.tell("local")?.parse()?, None),
    ]);
    ensure!(seen == wanted, "{seen:?}, not {wanted:?}");
    Ok(())
}

fn probes_that_live_a_moment_are_never_reported_as_edges() -> Result<()> {
    const PROBES: usize = 500;
    let (tracker, mut events) = kernel::start_knowing(Some(cgroup::kubelet()?))?;
    on_stage_of(tracker.clone(), "[::]:0", |s| {
        tracker.watch(&s.world.scope)?;
        thread::scope(|scope| {
            // Some are gone before they are accepted.
            let listener = s.listener.try_clone()?;
            let serving =
                scope.spawn(move || (0..=PROBES).try_for_each(|_| listener.accept().map(drop)));
            s.kubelet
                .borrow_mut()
                .tell(&format!("touch {PROBES} {}", s.server()))?;
            ensure!(
                s.world.ever() == PROBES as u64,
                "{} arrived",
                s.world.ever()
            );
            s.client(&format!("connect {}", s.server()))?;
            serving
                .join()
                .map_err(|_| anyhow::anyhow!("the server panicked"))??;
            Ok(())
        })?;
        let client: SocketAddr = s.client("local")?.parse()?;
        s.client("close")?;
        s.world.has(&[], 0)?;
        sleep(A_WHILE);
        let mut of_client = 0_u64;
        while let Ok(event) = events.try_recv() {
            match event {
                KernelEvent::Edge(edge) if edge.remote == client => of_client += 1,
                other => anyhow::bail!("reported: {other:?}"),
            }
        }
        ensure!(of_client >= 2, "the client's own edges are missing");
        // Nor do they count as edges that somebody still has to be told of: else every release would need a walk.
        let counted = kernel::wait(tracker.look_up(&s.world.scope, vec![]))?.edges;
        ensure!(
            counted == of_client,
            "{counted} edges counted, {of_client} reported"
        );
        Ok(())
    })
}

fn a_restarted_kubelet_is_known_from_the_next_watch_on() -> Result<()> {
    // Its name says nothing: it is named to the tracker.
    let first = Cgroup::new("restarted")?;
    let path = first.path().to_owned();
    let (tracker, _events) = kernel::start_knowing(Some(path.clone()))?;
    let before = first.id()?;
    drop(first);
    let again = Cgroup::new("restarted")?;
    ensure!(again.id()? != before, "the same cgroup");
    let mut kubelet = Puppet::start_at(&path)?;
    on_stage_of(tracker.clone(), "0.0.0.0:0", |s| {
        let scope = &s.world.scope;
        kubelet.tell(&format!("connect {}", s.server()))?;
        s.one_is(None)?;
        let until = Instant::now() + PATIENCE;
        // In the background, so not at once.
        kernel::wait(async { tracker.watch(scope) })?;
        loop {
            kubelet.tell(&format!("connect {}", s.server()))?;
            let newest: SocketAddr = kubelet.tell("local")?.parse()?;
            if s.exempt()?.get(&newest) == Some(&PROBE) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "not known: {:?}", s.exempt()?);
            sleep(A_WHILE);
        }
    })
}
