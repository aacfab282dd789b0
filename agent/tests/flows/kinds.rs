//! Address families and MPTCP (cases 21 and 22).

use std::{
    net::{Ipv4Addr, Ipv6Addr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::flow::{
    Direction,
    FlowState::{Active, Backlog},
};
use ebb_testkit::{namespace::sysctl, proc_net::Row};

use crate::support::{
    multipath,
    sockets::{ANY_PORT, destroy, dial, listener_with, read_bytes, write_bytes},
    world::{TIMEOUT, World, world},
};

ebb_testkit::trials![
    case_21_an_ipv4_client_of_a_dual_stack_listener_counts_once_as_ipv4,
    case_22_a_multipath_connection_with_one_subflow_counts_once,
    case_22_each_subflow_of_a_multipath_connection_is_a_flow,
    case_22_a_plain_client_of_a_multipath_listener_counts_once,
];

const MPTCP: i32 = 262;

fn case_21_an_ipv4_client_of_a_dual_stack_listener_counts_once_as_ipv4() -> Result<()> {
    world(|w| {
        let any = (Ipv6Addr::UNSPECIFIED, 0).into();
        let listener = w.serving(listener_with(any, 16, libc::IPPROTO_TCP, |_| Ok(()))?)?;
        let port = listener.local_addr()?.port();
        let v4 = TcpStream::connect(("127.0.0.1", port))?;
        w.has(&[(Backlog, 1)], 1)?;
        let accepted = listener.accept()?;
        w.has(&[(Active, 1)], 1)?;
        let snapshot = w.snapshot()?;
        ensure!(
            snapshot
                .flows
                .iter()
                .all(|f| f.local.is_ipv4() && f.remote.is_ipv4()),
            "{snapshot:?}"
        );
        let v6 = TcpStream::connect(("::1", port))?;
        w.has(&[(Active, 1), (Backlog, 1)], 2)?;
        drop((v4, v6, accepted, listener));
        w.has(&[], 0)
    })
}

fn case_22_a_multipath_connection_with_one_subflow_counts_once() -> Result<()> {
    world(|w| multipath(w, MPTCP))
}

fn case_22_a_plain_client_of_a_multipath_listener_counts_once() -> Result<()> {
    world(|w| multipath(w, libc::IPPROTO_TCP))
}

fn multipath(w: &World, client: i32) -> Result<()> {
    sysctl("mptcp/enabled", "1")?;
    let listener = w.serving(listener_with(ANY_PORT, 16, MPTCP, |_| Ok(()))?)?;
    let client = dial(listener.local_addr()?, client, |_| Ok(()))?;
    w.has(&[(Backlog, 1)], 1)?;
    let (server, _) = listener.accept()?;
    write_bytes(&client, 10)?;
    read_bytes(&server, 10)?;
    write_bytes(&server, 10)?;
    read_bytes(&client, 10)?;
    w.keeps(&[(Active, 1)], 1, Duration::from_millis(100))?;
    drop((client, server));
    w.has(&[], 0)?;
    w.has_opened(1)
}

fn case_22_each_subflow_of_a_multipath_connection_is_a_flow() -> Result<()> {
    world(|w| {
        sysctl("mptcp/enabled", "1")?;
        multipath::open_a_subflow_from(Ipv4Addr::new(127, 0, 0, 2))?;
        // The client binds its second subflow to an address, so that only the server's port gives the direction.
        let at = (ANY_PORT.ip(), 8022).into();
        let listener = w.serving(listener_with(at, 16, MPTCP, |_| Ok(()))?)?;
        let client = dial(listener.local_addr()?, MPTCP, |_| Ok(()))?;
        let (server, _) = listener.accept()?;
        for _ in 0..5 {
            write_bytes(&client, 10)?;
            read_bytes(&server, 10)?;
            write_bytes(&server, 10)?;
            read_bytes(&client, 10)?;
        }
        // Each subflow is a TCP connection, as in the kernel's tables.
        w.has_inbound(2, 2, TIMEOUT)?;
        let flows = w.snapshot()?.flows;
        let inbound = flows.iter().filter(|f| f.direction == Direction::Inbound);
        ensure!(inbound.map(|f| f.bytes_in).sum::<u64>() >= 50, "{flows:?}");
        // The first ends, as when a path fails. The second goes on.
        let (rows, _) = w.kernel_rows()?;
        let first = rows.iter().find(|row| row.remote == client_of(&rows));
        let first = first.context("no first subflow")?;
        destroy(first.local, first.remote)?;
        w.has_inbound(1, 1, TIMEOUT)?;
        drop((client, server));
        w.has(&[], 0)?;
        w.has_opened(2)
    })
}

/// The client's address of the first subflow.
fn client_of(rows: &[Row]) -> std::net::SocketAddr {
    let second = Ipv4Addr::new(127, 0, 0, 2);
    let first = rows.iter().find(|row| row.remote.ip() != second);
    first.map_or(ANY_PORT, |row| row.remote)
}
