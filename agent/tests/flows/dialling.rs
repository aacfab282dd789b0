//! ebb knows from the socket that a pod dialled a connection, whatever the port.

use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Result, ensure};
use ebb_core::flow::{Direction, FlowState::Active};
use ebb_testkit::namespace::sysctl;

use crate::support::{
    sockets::{dial_from, pair},
    world::{TIMEOUT, World, world},
};

ebb_testkit::trials![
    a_connection_dialled_from_any_port_is_outbound_and_has_no_known_age,
    a_connection_dialled_from_outside_the_ephemeral_range_is_outbound,
    a_connection_dialled_from_the_port_of_a_listener_is_outbound,
    the_kernel_does_not_choose_a_listeners_port_for_a_dialled_connection,
    a_dialled_connection_stays_outbound_when_its_port_leaves_the_ephemeral_range,
];

fn outbound(w: &World) -> Result<Vec<ebb_core::flow::Flow>> {
    let mut flows = w.snapshot()?.flows;
    flows.retain(|f| f.direction == Direction::Outbound);
    Ok(flows)
}

fn a_connection_dialled_from_any_port_is_outbound_and_has_no_known_age() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let both = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        let dialled = outbound(w)?;
        ensure!(
            dialled.len() == 1 && dialled[0].age.known().is_none(),
            "{dialled:?}"
        );
        drop(both);
        w.has(&[], 0)
    })
}

fn is_outbound_from(w: &World, port: u16) -> Result<()> {
    let listener = w.listen(16)?;
    let from = SocketAddr::from(([127, 0, 0, 1], port));
    let client = dial_from(from, listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    w.has(&[(Active, 1)], 1)?;
    drop((client, server));
    w.has(&[], 0)
}

fn a_connection_dialled_from_outside_the_ephemeral_range_is_outbound() -> Result<()> {
    world(|w| is_outbound_from(w, 1023))
}

fn a_connection_dialled_from_the_port_of_a_listener_is_outbound() -> Result<()> {
    world(|w| {
        let other = TcpListener::bind("127.0.0.2:0")?;
        is_outbound_from(w, other.local_addr()?.port())
    })
}

fn the_kernel_does_not_choose_a_listeners_port_for_a_dialled_connection() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        sysctl("ipv4/ip_local_port_range", "40000 40001")?;
        // On an address from which no client dials.
        let _taken = TcpListener::bind("127.0.0.2:40000")?;
        let both = pair(&listener)?;
        ensure!(both.1.local_addr()?.port() == 40_001, "{both:?}");
        let none = TcpStream::connect_timeout(&listener.local_addr()?, TIMEOUT);
        ensure!(none.is_err(), "the client has the listener's port");
        w.has(&[(Active, 1)], 1)
    })
}

fn a_dialled_connection_stays_outbound_when_its_port_leaves_the_ephemeral_range() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let _both = pair(&listener)?;
        ensure!(outbound(w)?.len() == 1);
        sysctl("ipv4/ip_local_port_range", "1024 1025")?;
        ensure!(outbound(w)?.len() == 1);
        w.has(&[(Active, 1)], 1)
    })
}
