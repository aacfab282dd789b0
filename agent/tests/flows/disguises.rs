//! Connections that are not what they seem: peers that are gone, clients that say nothing, a pod that calls itself
//! through its Service, ports on which nothing listens, and traffic that only passes through the pod.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb::drains::driver::HoldOrder;
use ebb_core::{
    drain_report::{ReleaseReason, Report},
    flow::{Exempt, FlowState, Sample, Snapshot},
    policy::{Policy, Until},
    scope::Scope,
};
use ebb_testkit::{
    namespace::{Namespace, ip, sysctl},
    parts::Parts,
    trial::step,
};
use tokio::time::timeout;

use crate::{
    draining::{TestDriver, drained, stays_held},
    lookups::order,
    starting::turn,
    support::{
        kernel,
        link::Linked,
        raw,
        sockets::{self, fill_send_buffer, listener_with, read_bytes, write_bytes},
        world::scope_of_this_thread,
    },
};

ebb_testkit::trials![
    a_peer_that_is_gone_without_a_word_is_lost_and_does_not_hold,
    a_peer_with_a_closed_window_holds_while_it_answers_and_is_lost_when_it_does_not,
    a_client_that_says_nothing_is_idle_where_that_is_asked_for,
    a_pod_that_calls_itself_through_its_service_does_not_wait_for_itself,
    a_rule_about_ports_that_matches_no_listener_is_ignored_with_a_warning,
    a_connection_that_the_pod_dialled_holds_while_it_is_live_if_the_policy_says_so,
    a_pod_that_routes_traffic_to_another_namespace_is_untracked_and_not_drained,
    a_pod_that_translates_connections_to_another_node_is_untracked_and_not_a_worker,
    a_pod_that_bridges_traffic_is_untracked_and_waits_for_the_flows_that_it_has,
];

const TIMEOUT: Duration = Duration::from_secs(30);

/// A server in a pod, and a client outside of it.
struct Connection {
    listener: TcpListener,
    server: TcpStream,
    client: TcpStream,
}

impl Connection {
    /// Must be called in the namespace of `pod`; `client` is a socket of the host's.
    fn open(pod: &Linked, client: std::os::fd::OwnedFd) -> Result<Self> {
        let listener = listener_with((pod.v4(), 0).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
        rustix::net::connect(&client, &listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        Ok(Self {
            listener,
            server,
            client: client.into(),
        })
    }

    fn talk(&self) -> Result<()> {
        write_bytes(&self.client, 10)?;
        read_bytes(&self.server, 10)?;
        write_bytes(&self.server, 10)?;
        read_bytes(&self.client, 10)
    }

    /// The server's socket, from a dump.
    fn sample(&self, driver: &TestDriver, scope: &Scope) -> Result<Sample> {
        let (local, remote) = (self.server.local_addr()?, self.server.peer_addr()?);
        let dump = kernel::wait(driver.tracker.dump(scope))?;
        let mut all = dump.samples.into_iter();
        all.find(|s| (s.local, s.remote) == (local, remote))
            .context("the server's socket is gone")
    }
}

fn with_policy(scope: &Scope, policy: impl FnOnce(Policy) -> Policy) -> HoldOrder {
    let order = order(0, scope);
    HoldOrder {
        policy: policy(order.policy.clone()),
        ..order
    }
}

fn peer_timeout(peer_timeout: Duration) -> impl FnOnce(Policy) -> Policy {
    move |policy| Policy {
        peer_timeout,
        ..policy
    }
}

fn was_lost(report: &Report) -> Result<()> {
    let states: Vec<_> = report.cut.iter().map(|f| f.state).collect();
    ensure!(states == [FlowState::Lost], "{report:?}");
    Ok(())
}

fn a_peer_that_is_gone_without_a_word_is_lost_and_does_not_hold() -> Result<()> {
    let pod = Linked::new()?;
    let client = sockets::unconnected()?;
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let connection = Connection::open(&pod, client)?;
        connection.talk()?;
        let at_most = Duration::from_secs(3);
        let order = with_policy(&scope, peer_timeout(at_most));
        let hold = kernel::wait(driver.drains.hold(order));
        // The client is there, and silent for longer than that.
        stays_held(&hold, at_most + Duration::from_secs(1))?;
        raw::block_receive(&connection.client)?;
        let begun = Instant::now();
        write_bytes(&connection.server, 10)?;
        let report = drained(&hold)?;
        ensure!(begun.elapsed() >= at_most, "too early: {report:?}");
        was_lost(&report)?;
        // sock_diag and the socket itself agree.
        let sample = connection.sample(&driver, &scope)?;
        ensure!(sample.unanswered_for() >= Some(at_most), "{sample:?}");
        ensure!(sample.retransmissions.retransmits >= 3, "{sample:?}");
        // The peer comes back.
        raw::unblock_receive(&connection.client)?;
        read_bytes_within(&connection.client, 10)?;
        step("waiting for the acknowledgement");
        until(|| {
            Ok(connection
                .sample(&driver, &scope)?
                .unanswered_for()
                .is_none())
        })?;
        driver.lost_nothing()
    })
}

/// As `read_bytes`, but waits for a retransmission.
fn read_bytes_within(stream: &TcpStream, n: usize) -> Result<()> {
    use std::io::Read as _;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut stream = stream;
    Ok(stream.read_exact(&mut vec![0; n])?)
}

fn until(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !done()? {
        ensure!(begun.elapsed() < TIMEOUT, "not in time");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn a_peer_with_a_closed_window_holds_while_it_answers_and_is_lost_when_it_does_not() -> Result<()> {
    let pod = Linked::new()?;
    let clients = (sockets::unconnected()?, sockets::unconnected()?);
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let at_most = Duration::from_secs(1);
        let answers = Connection::open(&pod, clients.0)?;
        // The client does not read; the server probes its window, less and less often, and it answers.
        fill_send_buffer(&answers.server)?;
        let order = with_policy(&scope, peer_timeout(at_most));
        let hold = kernel::wait(driver.drains.hold(order));
        stays_held(&hold, at_most * 8)?;
        let sample = answers.sample(&driver, &scope)?;
        ensure!(sample.retransmissions.backoff >= 2, "no probes: {sample:?}");

        let gone = Connection::open(&pod, clients.1)?;
        fill_send_buffer(&gone.server)?;
        step("waiting for a probe of the window");
        until(|| Ok(gone.sample(&driver, &scope)?.retransmissions.backoff > 0))?;
        raw::block_receive(&gone.client)?;
        drop(answers);
        was_lost(&*drained(&hold)?)?;
        driver.lost_nothing()
    })
}

fn a_client_that_says_nothing_is_idle_where_that_is_asked_for() -> Result<()> {
    let pod = Linked::new()?;
    let clients = (sockets::unconnected()?, sockets::unconnected()?);
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let idle_after = Duration::from_millis(500);
        let waits = |until| {
            with_policy(&scope, |policy| Policy {
                until,
                idle_after,
                ..policy
            })
        };
        let silent = Connection::open(&pod, clients.0)?;
        let hold = kernel::wait(driver.drains.hold(waits(Until::Zero)));
        stays_held(&hold, idle_after * 4)?;
        driver.release("0")?;

        // Another client that says nothing, and that the server has not accepted.
        rustix::net::connect(&clients.1, &silent.listener.local_addr()?)?;
        let hold = kernel::wait(driver.drains.hold(again(waits(Until::Idle))));
        stays_held(&hold, idle_after * 4)?;
        let (accepted, _) = silent.listener.accept()?;
        let report = drained(&hold)?;
        let states: Vec<_> = report.cut.iter().map(|f| f.state).collect();
        ensure!(states == [FlowState::Idle, FlowState::Idle], "{report:?}");
        drop(accepted);
        driver.lost_nothing()
    })
}

/// The same for another pod, because a pod that was released is not drained twice.
fn again(order: HoldOrder) -> HoldOrder {
    HoldOrder {
        pod: crate::lookups::order(1, &order.pod.scope).pod,
        ..order
    }
}

/// Adds a rule about translation in the calling thread's namespace.
fn iptables(rule: &str) -> Result<()> {
    let rule = format!("-w -t nat {rule}");
    let out = Parts::iptables()?.args(rule.split(' ')).output()?;
    ensure!(out.status.success(), "iptables {rule}: {out:?}");
    Ok(())
}

fn a_pod_that_calls_itself_through_its_service_does_not_wait_for_itself() -> Result<()> {
    let _turn = turn();
    let pod = Linked::new()?;
    let service = SocketAddr::from(([10, 96, 0, pod.v4().octets()[2]], 80));
    // As kube-proxy and the node's masquerade do it.
    sysctl("ipv4/ip_forward", "1")?;
    iptables(&format!(
        "-A PREROUTING -p tcp -d {} --dport 80 -j DNAT --to-destination {}:8080",
        service.ip(),
        pod.v4()
    ))?;
    iptables(&format!(
        "-A POSTROUTING -s {0} -d {0} -j MASQUERADE",
        pod.v4()
    ))?;
    let outside = listener_with((pod.host_v4(), 0).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
    let client = sockets::unconnected()?;
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let listener = listener_with((pod.v4(), 8080).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
        let dialled = TcpStream::connect(service)?;
        let (accepted, peer) = listener.accept()?;
        ensure!(peer.ip() == pod.host_v4(), "not masqueraded: {peer}");
        for _ in 0..3 {
            write_bytes(&dialled, 1000)?;
            read_bytes(&accepted, 1000)?;
            write_bytes(&accepted, 500)?;
            read_bytes(&dialled, 500)?;
        }
        // Another connection that the pod dialled, and a client.
        let out = TcpStream::connect(outside.local_addr()?)?;
        let inbound = Connection::open(&pod, client)?;
        inbound.talk()?;

        let exempt = |remote: SocketAddr| -> Result<Option<Exempt>> {
            let dump = kernel::wait(driver.tracker.dump(&scope))?;
            let all = Snapshot::new(dump.taken_at, &dump.samples, TIMEOUT, |_| true, |_| false);
            let mut flows = all.flows.iter();
            let flow = flows.find(|f| f.remote == remote);
            Ok(flow.context("no such flow")?.exempt)
        };
        let (own, client) = (exempt(peer)?, exempt(inbound.server.peer_addr()?)?);
        ensure!(own == Some(Exempt::InPod), "{own:?}");
        ensure!(client.is_none(), "{client:?}");

        let hold = kernel::wait(driver.drains.hold(order(0, &scope)));
        stays_held(&hold, Duration::from_secs(1))?;
        drop(inbound);
        let report = drained(&hold)?;
        ensure!(report.cut_total == Some(0), "{report:?}");
        // The two ends differ by a FIN that one of them has sent.
        dialled.shutdown(std::net::Shutdown::Write)?;
        step("waiting for the FIN");
        until(|| Ok(exempt(peer)? == Some(Exempt::InPod)))?;
        let report = drained(&kernel::wait(driver.drains.hold(order(1, &scope))))?;
        ensure!(report.cut_total == Some(0), "{report:?}");
        drop((dialled, accepted, out));
        driver.lost_nothing()
    })
}

fn a_rule_about_ports_that_matches_no_listener_is_ignored_with_a_warning() -> Result<()> {
    let pod = Linked::new()?;
    let client = sockets::unconnected()?;
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let connection = Connection::open(&pod, client)?;
        let port = connection.listener.local_addr()?.port();
        let only = |ports: Vec<u16>| with_policy(&scope, |policy| Policy { ports, ..policy });
        let hold = kernel::wait(driver.drains.hold(only(vec![port ^ 1])));
        stays_held(&hold, Duration::from_secs(1))?;
        drop((connection.server, connection.client));
        let report = drained(&hold)?;
        let warning = report.warnings.first().context("no warning")?;
        ensure!(
            warning.contains("ebb.dev/ports") && warning.contains(&port.to_string()),
            "{warning}"
        );
        ensure!(report.ended == Some(1), "{report:?}");
        driver.lost_nothing()
    })
}

fn a_connection_that_the_pod_dialled_holds_while_it_is_live_if_the_policy_says_so() -> Result<()> {
    let pod = Linked::new()?;
    let queue = listener_with((pod.host_v4(), 0).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
    let port = queue.local_addr()?.port();
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let worker = TcpStream::connect(queue.local_addr()?)?;
        let (queue, _) = queue.accept()?;
        // A task that the pod works on.
        write_bytes(&queue, 10)?;
        read_bytes(&worker, 10)?;
        let waits = |rule: &str| -> Result<HoldOrder> {
            let outbound = rule.parse().map_err(anyhow::Error::msg)?;
            Ok(with_policy(&scope, |policy| Policy {
                outbound,
                idle_after: Duration::from_millis(500),
                ..policy
            }))
        };
        drained(&kernel::wait(
            driver.drains.hold(again(waits(&(port ^ 1).to_string())?)),
        ))?;
        let hold = kernel::wait(driver.drains.hold(waits(&port.to_string())?));
        stays_held(&hold, Duration::from_secs(3))?;
        // It is done, and the connection stays open.
        write_bytes(&worker, 10)?;
        read_bytes(&queue, 10)?;
        let report = drained(&hold)?;
        ensure!(report.arrived == Some(0), "{report:?}");
        let states: Vec<_> = report.cut.iter().map(|f| f.state).collect();
        ensure!(states == [FlowState::Idle], "{report:?}");
        driver.lost_nothing()
    })
}

/// Drains the pod of the calling thread's namespace, for longer than settling takes.
fn untracked(driver: &TestDriver, scope: &Scope) -> Result<Arc<Report>> {
    let order = with_policy(scope, |policy| Policy {
        settle_max: Duration::from_secs(2),
        ..policy
    });
    let hold = kernel::wait(driver.drains.hold(order));
    step("waiting for a release");
    let report = kernel::wait(async { timeout(TIMEOUT, hold.released()).await })?;
    ensure!(
        report.reason == Some(ReleaseReason::Untracked),
        "{report:?}"
    );
    ensure!(report.detail.is_some(), "{report:?}");
    ensure!(report.held_ms >= 2000, "{report:?}");
    Ok(report)
}

fn a_pod_that_routes_traffic_to_another_namespace_is_untracked_and_not_drained() -> Result<()> {
    let pod = Linked::new()?;
    let inner = Namespace::new()?;
    let client = sockets::unconnected()?;
    let driver = TestDriver::new()?;
    let server: SocketAddr = ([10, 79, 0, 2], 8080).into();
    ip(&format!("route add 10.79.0.0/24 via {}", pod.v4()))?;
    let listener = pod.namespace.run(|| {
        sysctl("ipv4/ip_forward", "1")?;
        let scope = scope_of_this_thread()?;
        // As every pod, which inherits the host's setting.
        drained(&kernel::wait(driver.drains.hold(order(1, &scope))))?;
        let me = rustix::thread::gettid();
        inner.run(|| {
            ip(&format!(
                "link add eth0 type veth peer name inner0 netns {me}"
            ))?;
            ip("addr add 10.79.0.2/24 dev eth0")?;
            ip("link set eth0 up")
        })?;
        ip("addr add 10.79.0.1/24 dev inner0")?;
        ip("link set inner0 up")?;
        inner.run(|| {
            ip("route add default via 10.79.0.1")?;
            listener_with(server, 16, libc::IPPROTO_TCP, |_| Ok(()))
        })
    })?;
    rustix::net::connect(&client, &server)?;
    let (accepted, _) = listener.accept()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let dump = kernel::wait(driver.tracker.dump(&scope))?;
        ensure!(dump.samples.is_empty(), "{:?}", dump.samples);
        let report = untracked(&driver, &scope)?;
        let detail = report.detail.clone().unwrap_or_default();
        ensure!(detail.contains("inner0"), "{detail}");
        drop(accepted);
        driver.lost_nothing()
    })
}

fn a_pod_that_translates_connections_to_another_node_is_untracked_and_not_a_worker() -> Result<()> {
    let pod = Linked::new()?;
    let client = sockets::unconnected()?;
    let driver = TestDriver::new()?;
    // As k3s' svclb: the pod has one link, and no process in it listens.
    let elsewhere = listener_with((pod.host_v4(), 0).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
    let to = elsewhere.local_addr()?;
    pod.namespace.run(|| {
        sysctl("ipv4/ip_forward", "1")?;
        iptables(&format!(
            "-A PREROUTING -p tcp --dport 8080 -j DNAT --to-destination {to}"
        ))?;
        iptables("-A POSTROUTING -j MASQUERADE")
    })?;
    rustix::net::connect(&client, &SocketAddr::from((pod.v4(), 8080)))?;
    let (accepted, _) = elsewhere.accept()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        let dump = kernel::wait(driver.tracker.dump(&scope))?;
        ensure!(dump.samples.is_empty(), "{:?}", dump.samples);
        let report = untracked(&driver, &scope)?;
        let detail = report.detail.clone().unwrap_or_default();
        ensure!(detail.contains("tracks connections"), "{detail}");
        // A server with rules of its own, as in a mesh, has its sockets.
        let _server = listener_with((pod.v4(), 9090).into(), 16, libc::IPPROTO_TCP, |_| Ok(()))?;
        drained(&kernel::wait(driver.drains.hold(order(1, &scope))))?;
        drop(accepted);
        driver.lost_nothing()
    })
}

fn a_pod_that_bridges_traffic_is_untracked_and_waits_for_the_flows_that_it_has() -> Result<()> {
    let pod = Linked::new()?;
    let client = sockets::unconnected()?;
    let driver = TestDriver::new()?;
    pod.namespace.run(|| {
        let scope = scope_of_this_thread()?;
        // As KubeVirt does it.
        ip("link add k6t-eth0 type bridge")?;
        ip("tuntap add dev tap0 mode tap")?;
        ip("link set tap0 master k6t-eth0")?;
        ip("link set tap0 up")?;
        ip("link set k6t-eth0 up")?;
        let connection = Connection::open(&pod, client)?;
        let hold = kernel::wait(driver.drains.hold(order(1, &scope)));
        stays_held(&hold, Duration::from_secs(1))?;
        drop(connection);
        step("waiting for a release");
        let report = kernel::wait(async { timeout(TIMEOUT, hold.released()).await })?;
        ensure!(
            report.reason == Some(ReleaseReason::Untracked),
            "{report:?}"
        );
        ensure!(report.ended == Some(1), "{report:?}");
        let detail = report.detail.clone().unwrap_or_default();
        ensure!(detail.contains("k6t-eth0"), "{detail}");
        untracked(&driver, &scope)?;
        driver.lost_nothing()
    })
}
