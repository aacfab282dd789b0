//! The direction of a connection: each row of the table in `flow/origin.rs`, on each kind of address, and connections that
//! are older than the agent.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::Arc,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb::drains::driver::Drains;
use ebb_core::{
    drain_report::ReleaseReason,
    flow::{Direction, Flow},
};
use ebb_testkit::namespace::Namespace;
use rustix::net::{AddressFamily, SocketType, bind, connect, socket, sockopt};
use tokio::sync::mpsc;

use crate::{
    lookups::{order, until_dumped},
    starting::turn,
    support::{
        kernel,
        link::Linked,
        sockets::{self, listener_with, read_bytes, write_bytes},
        world::{World, scope_of_this_thread, world},
    },
};

ebb_testkit::trials![
    an_accepted_connection_stays_inbound_after_its_listener_is_closed,
    a_dialled_connection_is_outbound_whatever_it_was_bound_to,
    a_listener_that_dials_is_outbound,
    a_connection_of_a_listener_without_backlog_is_inbound,
    a_connection_bound_to_an_interface_is_inbound_and_live,
    a_server_on_an_ephemeral_port_holds_its_drain_after_its_listener_closed_and_the_agent_restarted,
    connections_bound_and_dialled_before_the_agent_started_hold_no_drain,
    after_its_listener_closed_a_connection_older_than_the_agent_is_inbound_by_its_backlog,
];

const QUIET: Duration = Duration::from_millis(100);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOOPBACK_V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const ANY_V6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// The address that a server listens on, and the one that a client dials: IPv4, IPv6, and IPv4 on a dual-stack socket.
const KINDS: [(IpAddr, IpAddr); 3] = [
    (LOOPBACK, LOOPBACK),
    (LOOPBACK_V6, LOOPBACK_V6),
    (ANY_V6, LOOPBACK),
];

fn listen(at: SocketAddr, backlog: i32) -> Result<TcpListener> {
    listener_with(at, backlog, libc::IPPROTO_TCP, |_| Ok(()))
}

/// A socket of this address family that is not connected.
fn unconnected(ip: IpAddr) -> Result<OwnedFd> {
    let family = if ip.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    Ok(socket(family, SocketType::STREAM, None)?)
}

/// The flow with these addresses.
fn flow_at(w: &World, local: SocketAddr, remote: SocketAddr) -> Result<Flow> {
    let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let (local, remote) = (plain(local), plain(remote));
    let flows = w.snapshot()?.flows;
    let found = flows
        .iter()
        .find(|f| f.local == local && f.remote == remote);
    found
        .cloned()
        .with_context(|| format!("no flow from {local} to {remote}: {flows:#?}"))
}

fn is(w: &World, end: &TcpStream, direction: Direction) -> Result<()> {
    let flow = flow_at(w, end.local_addr()?, end.peer_addr()?)?;
    ensure!(flow.direction == direction, "{flow:?}");
    Ok(())
}

fn an_accepted_connection_stays_inbound_after_its_listener_is_closed() -> Result<()> {
    world(|w| {
        for (at, to) in KINDS {
            let listener = listen((at, 0).into(), 16)?;
            let client = TcpStream::connect((to, listener.local_addr()?.port()))?;
            let (server, _) = listener.accept()?;
            is(w, &server, Direction::Inbound)?;
            is(w, &client, Direction::Outbound)?;
            drop(listener);
            is(w, &server, Direction::Inbound)?;
        }
        Ok(())
    })
}

fn a_dialled_connection_is_outbound_whatever_it_was_bound_to() -> Result<()> {
    world(|w| {
        for (n, (at, to)) in (0..).zip(KINDS) {
            let listener = listen((at, 8000 + n).into(), 16)?;
            let server_at = SocketAddr::from((to, 8000 + n));
            // To a port outside of the ephemeral range, to one inside, and to an address alone.
            for port in [29_100 + n, 40_100 + n, 0] {
                let client = unconnected(to)?;
                bind(&client, &SocketAddr::from((to, port)))?;
                connect(&client, &server_at)?;
                let client = TcpStream::from(client);
                let (server, _) = listener.accept()?;
                is(w, &client, Direction::Outbound)
                    .with_context(|| format!("bound to port {port}"))?;
                is(w, &server, Direction::Inbound)?;
            }
        }
        Ok(())
    })
}

fn a_listener_that_dials_is_outbound() -> Result<()> {
    world(|w| {
        for (at, to) in KINDS {
            let elsewhere = listen((at, 0).into(), 16)?;
            let listener = listen((to, 0).into(), 16)?;
            sockets::shut_reading(&listener)?;
            let port = elsewhere.local_addr()?.port();
            connect(&listener, &SocketAddr::from((to, port)))?;
            let client = TcpStream::from(OwnedFd::from(listener));
            is(w, &client, Direction::Outbound)?;
        }
        Ok(())
    })
}

fn a_connection_of_a_listener_without_backlog_is_inbound() -> Result<()> {
    world(|w| {
        for (n, (at, to)) in (0..).zip(KINDS) {
            // On one address and on all, inside of the ephemeral range and outside.
            let port = if n % 2 == 0 { 40_200 + n } else { 8200 + n };
            let listener = listen((at, port).into(), 0)?;
            let client = TcpStream::connect((to, port))?;
            let (server, _) = listener.accept()?;
            is(w, &server, Direction::Inbound)?;
            is(w, &client, Direction::Outbound)?;
            drop(listener);
            is(w, &server, Direction::Inbound)?;
            w.has_opened(u64::from(n) + 1)?;
            drop((client, server));
            w.has(&[], 0)?;
        }
        Ok(())
    })
}

/// The kernel's lookup does not find it, because it is made on loopback. ebb keeps what sock_diag says.
fn a_connection_bound_to_an_interface_is_inbound_and_live() -> Result<()> {
    let pod = Linked::new()?;
    // Made here, so that it is on the host's network.
    let client = sockets::unconnected()?;
    pod.namespace.run(|| {
        let w = World::here(kernel::shared())?;
        let at = (pod.v4(), 8300).into();
        let listener = listener_with(at, 16, libc::IPPROTO_TCP, |s| {
            Ok(socket2::SockRef::from(s).bind_device(Some(b"eth0"))?)
        })?;
        connect(&client, &listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        let client = TcpStream::from(client);
        // After a request and its answer, its times alone would make it idle.
        for (from, to) in [(&client, &server), (&server, &client)] {
            write_bytes(from, 10)?;
            read_bytes(to, 10)?;
            sleep(QUIET);
        }
        w.idle_after(QUIET);
        sleep(2 * QUIET);
        let flow = flow_at(&w, server.local_addr()?, server.peer_addr()?)?;
        ensure!(
            flow.direction == Direction::Inbound && flow.exempt.is_none() && flow.state.is_live(),
            "{flow:?}"
        );
        ensure!(
            flow.age.known().is_none() && flow.bytes_in == 10,
            "{flow:?}"
        );
        drop((client, server));
        ensure!(w.agrees()? == (0, 0));
        Ok(())
    })
}

/// Like a gRPC server on its usual port, which closes its listener on the stop signal and keeps its streams.
fn a_server_on_an_ephemeral_port_holds_its_drain_after_its_listener_closed_and_the_agent_restarted()
-> Result<()> {
    const GRPC: u16 = 50_051;
    let _turn = turn();
    let pod = Linked::new()?;
    // Made here, so that it is on the host's network.
    let client = sockets::unconnected()?;
    let (first, _) = kernel::start()?;
    let (listener, server) = pod.namespace.run(|| {
        let listener = listen((pod.v4(), GRPC).into(), 16)?;
        connect(&client, &listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        Ok((listener, server))
    })?;
    drop(listener);
    drop(first);
    let (tracker, events) = kernel::start()?;
    pod.namespace.run(|| {
        let (notices, _) = mpsc::unbounded_channel();
        let drains =
            kernel::wait(async { Drains::spawn(Arc::new(tracker), events, None, notices) });
        let hold = kernel::wait(drains.hold(order(0, &scope_of_this_thread()?)));
        until_dumped(&drains)?;
        let early = kernel::wait(async {
            let limit = Duration::from_millis(500);
            tokio::time::timeout(limit, hold.released()).await.ok()
        });
        ensure!(early.is_none(), "the stream is cut: {early:?}");
        drop((server, client));
        let report = kernel::wait(hold.released());
        ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
        ensure!(report.ended == Some(1), "{report:?}");
        Ok(())
    })
}

/// Like those of HAProxy's `source` and Java's `socket.bind`.
fn connections_bound_and_dialled_before_the_agent_started_hold_no_drain() -> Result<()> {
    let _turn = turn();
    let pod = Linked::new()?;
    let listener = listen((pod.host_v4(), 5432).into(), 16)?;
    let to = listener.local_addr()?;
    let clients = pod.namespace.run(|| {
        let dial = |port: u16| -> Result<TcpStream> {
            let client = unconnected(pod.v4().into())?;
            sockopt::set_socket_reuseaddr(&client, true)?;
            bind(&client, &SocketAddr::from((pod.v4(), port)))?;
            connect(&client, &to)?;
            Ok(client.into())
        };
        [0, 9000, 45_000]
            .map(dial)
            .into_iter()
            .collect::<Result<Vec<_>>>()
    })?;
    let (tracker, _) = kernel::start()?;
    pod.namespace.run(|| {
        let world = World::here(tracker)?;
        world.older_than_tracker();
        let snapshot = world.snapshot()?;
        ensure!(snapshot.flows.len() == clients.len(), "{snapshot:?}");
        // If bind() chose the port, the other end's port decides: a server's is outside of the ephemeral range.
        let inbound = |f: &&Flow| f.direction == Direction::Inbound;
        let held: Vec<_> = snapshot.flows.iter().filter(inbound).collect();
        ensure!(held.is_empty(), "{held:?}");
        Ok(())
    })
}

/// Its ports alone would make it outbound: the server's is ephemeral, and the client's is not.
fn after_its_listener_closed_a_connection_older_than_the_agent_is_inbound_by_its_backlog()
-> Result<()> {
    let _turn = turn();
    Namespace::new()?.run(|| {
        let mut connections = Vec::new();
        for (n, (backlog, (at, to))) in (0..).zip(
            KINDS
                .map(|k| (16, k))
                .into_iter()
                .chain(KINDS.map(|k| (0, k))),
        ) {
            let listener = listen((at, 50_051 + n).into(), backlog)?;
            let client = unconnected(to)?;
            bind(&client, &SocketAddr::from((to, 9000 + n)))?;
            connect(&client, &SocketAddr::from((to, 50_051 + n)))?;
            let (server, _) = listener.accept()?;
            connections.push((backlog, listener, server, TcpStream::from(client)));
        }
        let (tracker, _) = kernel::start()?;
        let world = World::here(tracker)?;
        for (backlog, listener, server, client) in connections {
            let context = || format!("backlog {backlog}, {server:?}");
            is(&world, &client, Direction::Outbound).with_context(context)?;
            is(&world, &server, Direction::Inbound).with_context(context)?;
            drop(listener);
            // Without a backlog nothing but the ports is left to go by.
            let direction = if backlog > 0 {
                Direction::Inbound
            } else {
                Direction::Outbound
            };
            is(&world, &server, direction).with_context(context)?;
        }
        Ok(())
    })
}
