//! How connections begin, and how they end before they are accepted (cases 1 to 10).

use std::{
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Result, ensure};
use ebb_core::flow::FlowState::{Active, Backlog, HalfClosed};
use ebb_testkit::namespace::sysctl;
use rustix::net::{SendFlags, bind, connect, sendto, sockopt};

use crate::support::{
    raw,
    sockets::{self, ANY_PORT, dial, listener_with, pair, read_bytes, write_bytes},
    world::{World, world},
};

ebb_testkit::trials![
    case_01_an_accepted_connection_counts_once_until_it_is_closed,
    case_02_unaccepted_connections_are_backlog_until_the_listener_closes,
    case_03_a_connection_reset_while_queued_counts_zero_from_then_on,
    case_04_a_connection_closed_while_queued_counts_until_it_is_accepted_read_and_closed,
    case_05_a_backlog_of_one_queues_two_and_the_others_count_after_accepts,
    case_06_connections_made_with_syn_cookies_count_like_others,
    case_07_a_flood_of_unfinished_handshakes_counts_zero,
    case_08_deferred_accept_counts_from_the_first_data,
    case_09_a_fast_open_child_counts_once_before_and_after_its_handshake,
    case_10_a_socket_connected_to_itself_is_not_inbound,
    case_10_a_simultaneous_open_is_not_inbound,
];

const A_WHILE: Duration = Duration::from_millis(100);

fn case_01_an_accepted_connection_counts_once_until_it_is_closed() -> Result<()> {
    world(opened_and_closed)
}

fn opened_and_closed(w: &World) -> Result<()> {
    let listener = w.listen(16)?;
    w.has(&[], 0)?;
    let (server, client) = pair(&listener)?;
    w.has(&[(Active, 1)], 1)?;
    // The client closes first, so that the server's end passes CLOSE_WAIT and LAST_ACK.
    drop(client);
    w.has(&[(HalfClosed, 1)], 0)?;
    drop(server);
    w.keeps(&[], 0, A_WHILE)?;
    w.has_opened(1)
}

fn case_02_unaccepted_connections_are_backlog_until_the_listener_closes() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let clients = [
            TcpStream::connect(listener.local_addr()?)?,
            TcpStream::connect(listener.local_addr()?)?,
        ];
        w.has(&[(Backlog, 2)], 2)?;
        drop(listener);
        w.keeps(&[], 0, A_WHILE)?;
        drop(clients);
        w.has_opened(2)?;
        w.has(&[], 0)
    })
}

fn case_03_a_connection_reset_while_queued_counts_zero_from_then_on() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        w.has(&[(Backlog, 1)], 1)?;
        sockets::reset(client)?;
        w.has_at_once(&[], 0)?;
        // It is still in the queue.
        let (server, _) = listener.accept()?;
        w.has(&[], 0)?;
        drop(server);
        w.keeps(&[], 0, A_WHILE)?;
        w.has_opened(1)
    })
}

fn case_04_a_connection_closed_while_queued_counts_until_it_is_accepted_read_and_closed()
-> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        write_bytes(&client, 1000)?;
        drop(client);
        w.keeps(&[(Backlog, 1)], 0, A_WHILE)?;
        let (server, _) = listener.accept()?;
        w.has(&[(HalfClosed, 1)], 0)?;
        read_bytes(&server, 1000)?;
        w.has(&[(HalfClosed, 1)], 0)?;
        drop(server);
        w.has(&[], 0)
    })
}

fn case_05_a_backlog_of_one_queues_two_and_the_others_count_after_accepts() -> Result<()> {
    world(|w| {
        let listener = w.listen(1)?;
        let to = listener.local_addr()?;
        let mut clients = Vec::new();
        for n in 1..=4 {
            clients.push(dial(to, libc::IPPROTO_TCP, |_| Ok(()))?);
            // The server answers a SYN that comes before the queue is full, and the client's end is established.
            w.has(&[(Backlog, n.min(2))], n.min(2))?;
        }
        w.keeps(&[(Backlog, 2)], 2, A_WHILE)?;
        let mut servers = Vec::new();
        // The kernel dropped the other SYNs. Their clients send them again after a second.
        while servers.len() < 4 {
            servers.push(listener.accept()?.0);
        }
        w.has(&[(Active, 4)], 4)?;
        drop((servers, clients));
        w.has_opened(4)?;
        w.has(&[], 0)
    })
}

fn case_06_connections_made_with_syn_cookies_count_like_others() -> Result<()> {
    world(|w| {
        sysctl("ipv4/tcp_syncookies", "2")?;
        let sent = || -> Result<u64> { counter("SyncookiesRecv") };
        let before = sent()?;
        opened_and_closed(w)?;
        ensure!(sent()? > before, "no cookie was used");
        Ok(())
    })
}

/// A counter of this namespace, from the `TcpExt` lines of `/proc/net/netstat`.
fn counter(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat")?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let found = names
        .split(' ')
        .zip(values.split(' '))
        .find(|(n, _)| *n == name);
    Ok(found
        .ok_or_else(|| anyhow::anyhow!("no counter {name}"))?
        .1
        .parse()?)
}

fn case_07_a_flood_of_unfinished_handshakes_counts_zero() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let to = listener.local_addr()?;
        let flood = (0..500)
            .map(|_| dial(to, libc::IPPROTO_TCP, |s| Ok(raw::block_receive(s)?)))
            .collect::<Result<Vec<_>>>()?;
        w.keeps(&[], 0, Duration::from_millis(500))?;
        // A client that finishes its handshake gets through, if need be by a SYN cookie.
        let (server, client) = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        drop((server, client, flood));
        w.has(&[], 0)?;
        w.has_opened(1)
    })
}

fn case_08_deferred_accept_counts_from_the_first_data() -> Result<()> {
    world(|w| {
        let listener = w.serving(listener_with(ANY_PORT, 16, libc::IPPROTO_TCP, |s| {
            sockets::set(s, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 30)
        })?)?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        // The client's end is established, the server's is not.
        w.keeps(&[], 1, A_WHILE)?;
        write_bytes(&client, 10)?;
        w.has(&[(Backlog, 1)], 1)?;
        let (server, _) = listener.accept()?;
        w.has(&[(Active, 1)], 1)?;
        drop((server, client));
        w.has(&[], 0)
    })
}

fn case_09_a_fast_open_child_counts_once_before_and_after_its_handshake() -> Result<()> {
    world(|w| {
        // Client and server, without cookies, on all listeners (Documentation/networking/ip-sysctl.rst).
        sysctl("ipv4/tcp_fastopen", "0x607")?;
        let listener = w.serving(listener_with(ANY_PORT, 16, libc::IPPROTO_TCP, |s| {
            sockets::set(s, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)
        })?)?;
        w.fast_open();
        let client = sockets::unconnected()?;
        raw::block_receive(&client)?;
        let flags = SendFlags::DONTWAIT | SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
        sendto(&client, b"early", flags, &listener.local_addr()?)?;
        w.has(&[(Backlog, 1)], 0)?;
        let (server, _) = listener.accept()?;
        read_bytes(&server, 5)?;
        // The client has acknowledged nothing yet, so the handshake is not done.
        ensure!(
            w.dump()?
                .iter()
                .any(|s| s.inode != 0 && s.state == ebb_core::flow::TcpState::SynRecv),
            "not accepted in SYN_RECV: {:?}",
            w.dump()?
        );
        w.has(&[(Active, 1)], 0)?;
        raw::unblock_receive(&client)?;
        // The server sends its SYN+ACK again after a second.
        w.has(&[(Active, 1)], 1)?;
        drop((server, client));
        w.has(&[], 0)?;
        w.has_opened(1)
    })
}

fn case_10_a_socket_connected_to_itself_is_not_inbound() -> Result<()> {
    world(|w| {
        let socket = sockets::unconnected()?;
        bind(&socket, &ANY_PORT)?;
        let own: SocketAddr = rustix::net::getsockname(&socket)?.try_into()?;
        connect(&socket, &own)?;
        w.has(&[], 1)?;
        drop(socket);
        w.has(&[], 0)?;
        w.has_opened(0)
    })
}

fn case_10_a_simultaneous_open_is_not_inbound() -> Result<()> {
    world(|w| {
        let (a, b) = (sockets::unconnected()?, sockets::unconnected()?);
        // Fixed ports, because each end dials the other's.
        for (socket, port) in [(&a, 29_001), (&b, 29_002)] {
            sockopt::set_socket_reuseaddr(socket, true)?;
            bind(socket, &SocketAddr::new(ANY_PORT.ip(), port))?;
        }
        let at = |s| -> Result<SocketAddr> { Ok(rustix::net::getsockname(s)?.try_into()?) };
        let (at_a, at_b) = (at(&a)?, at(&b)?);
        // The first does not receive the RST, so it goes on dialling until the second dials it.
        raw::block_receive(&a)?;
        rustix::io::ioctl_fionbio(&a, true)?;
        let pending = connect(&a, &at_b);
        ensure!(pending == Err(rustix::io::Errno::INPROGRESS), "{pending:?}");
        raw::unblock_receive(&a)?;
        connect(&b, &at_a)?;
        w.has(&[], 2)?;
        drop((a, b));
        w.has(&[], 0)?;
        w.has_opened(0)
    })
}
