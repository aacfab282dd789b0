//! What a pod dials has no record, as a rule: its port tells. Where it would not, there is one.

use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Result, ensure};
use ebb::flow::{Direction, FlowState::Active, Since};

use crate::support::{
    namespace::sysctl,
    sockets::{dial_from, pair},
    world::{PATIENCE, World, world},
};

trials![
    what_is_dialled_from_any_port_is_outbound_and_has_no_age,
    what_is_dialled_from_a_port_outside_the_ephemeral_range_is_outbound,
    what_is_dialled_from_the_port_of_a_listener_is_outbound,
    no_listeners_port_is_given_to_what_dials,
    what_was_dialled_from_a_port_that_is_ephemeral_no_longer_counts_as_inbound,
];

fn outbound(w: &World) -> Result<Vec<ebb::flow::Flow>> {
    let mut flows = w.snapshot()?.flows;
    flows.retain(|f| f.direction == Direction::Outbound);
    Ok(flows)
}

fn what_is_dialled_from_any_port_is_outbound_and_has_no_age() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let both = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        let dialled = outbound(w)?;
        ensure!(
            dialled.len() == 1 && dialled[0].age.is_none() && dialled[0].since == Since::Opening,
            "{dialled:?}"
        );
        drop(both);
        w.has(&[], 0)?;
        w.has_no_drift()
    })
}

fn is_outbound_from(w: &World, port: u16) -> Result<()> {
    let listener = w.listen(16)?;
    let from = SocketAddr::from(([127, 0, 0, 1], port));
    let client = dial_from(from, listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    w.has(&[(Active, 1)], 1)?;
    w.has_no_drift()?;
    drop((client, server));
    w.has(&[], 0)
}

fn what_is_dialled_from_a_port_outside_the_ephemeral_range_is_outbound() -> Result<()> {
    world(|w| is_outbound_from(w, 1023))
}

fn what_is_dialled_from_the_port_of_a_listener_is_outbound() -> Result<()> {
    world(|w| {
        let other = TcpListener::bind("127.0.0.2:0")?;
        is_outbound_from(w, other.local_addr()?.port())
    })
}

fn no_listeners_port_is_given_to_what_dials() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        sysctl("ipv4/ip_local_port_range", "40000 40001")?;
        // On an address that nobody dials from.
        let _taken = TcpListener::bind("127.0.0.2:40000")?;
        let both = pair(&listener)?;
        ensure!(both.1.local_addr()?.port() == 40_001, "{both:?}");
        let none = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE);
        ensure!(none.is_err(), "the listener's port was given away");
        w.has(&[(Active, 1)], 1)?;
        w.has_no_drift()
    })
}

/// Not knowing must not cut anybody off.
fn what_was_dialled_from_a_port_that_is_ephemeral_no_longer_counts_as_inbound() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let _both = pair(&listener)?;
        ensure!(outbound(w)?.len() == 1);
        sysctl("ipv4/ip_local_port_range", "1024 1025")?;
        ensure!(outbound(w)?.is_empty());
        let counted: i64 = w.counts().iter().map(|c| c.inbound).sum();
        ensure!(counted == 1, "{counted}");
        Ok(())
    })
}
