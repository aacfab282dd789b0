//! How connections end (cases 11 to 14 and 17).

use std::{
    net::{Shutdown, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use ebb_core::flow::FlowState::{Active, Backlog, Flushing, Idle};
use ebb_testkit::{
    cgroup::Cgroup,
    namespace::{Namespace, sysctl},
    proc_net,
};

use crate::support::{
    cgroup::id_of,
    kernel, raw,
    sockets::{self, pair, read_to_end, write_bytes},
    worker::Worker,
    world::{World, world},
};

ebb_testkit::trials![
    case_11_a_connection_that_the_server_closes_first_counts_zero_in_time_wait,
    case_12_a_connection_that_the_server_shut_down_is_live_while_bytes_arrive_and_then_idle,
    case_13_a_killed_servers_connection_flushes_until_its_last_byte_is_acknowledged,
    case_14_a_deleted_pods_connections_count_until_their_unsent_data_is_given_up,
    case_17_accepted_and_queued_connections_count_zero_after_they_are_destroyed,
];

const A_WHILE: Duration = Duration::from_millis(100);

fn case_11_a_connection_that_the_server_closes_first_counts_zero_in_time_wait() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        write_bytes(&client, 10)?;
        sockets::read_bytes(&server, 10)?;
        drop(server);
        w.has_at_once(&[], 1)?; // FIN_WAIT2 here, CLOSE_WAIT there
        drop(client);
        w.has_at_once(&[], 0)?;
        w.keeps(&[], 0, A_WHILE)?;
        let port = listener.local_addr()?.port();
        ensure!(
            proc_net::rows()?
                .iter()
                .any(|row| row.state == 6 && row.local.port() == port),
            "not in TIME_WAIT: {:?}",
            proc_net::rows()?
        );
        w.has_opened(1)
    })
}

fn case_12_a_connection_that_the_server_shut_down_is_live_while_bytes_arrive_and_then_idle()
-> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        server.shutdown(Shutdown::Write)?;
        // The server may go on reading, as during an upload.
        w.keeps(&[(Active, 1)], 1, A_WHILE)?;
        write_bytes(&client, 10)?;
        sockets::read_bytes(&server, 10)?;
        w.keeps(&[(Active, 1)], 1, A_WHILE)?;
        w.idle_after(A_WHILE);
        w.has(&[(Idle, 1)], 1)?;
        write_bytes(&client, 10)?;
        w.has(&[(Active, 1)], 1)?;
        drop((server, client));
        w.has(&[], 0)?;
        w.has_opened(1)
    })
}

fn case_13_a_killed_servers_connection_flushes_until_its_last_byte_is_acknowledged() -> Result<()> {
    world(|w| {
        let mut server = Worker::start()?;
        let at = server.listen()?;
        w.serving_at(at);
        let client = TcpStream::connect(at)?;
        server.command("accept")?;
        let sent: u64 = server.command("fill")?.parse()?;
        w.has(&[(Active, 1)], 1)?;
        server.kill()?;
        w.keeps(&[(Flushing, 1)], 1, A_WHILE)?;
        let received = read_to_end(&client)?;
        ensure!(received == sent, "{received} of {sent} bytes");
        w.has(&[], 1)?;
        drop(client);
        w.has(&[], 0)
    })
}

fn case_14_a_deleted_pods_connections_count_until_their_unsent_data_is_given_up() -> Result<()> {
    let tracker = kernel::shared();
    // The counters are found by cgroup, because the kernel reuses the numbers of namespaces.
    let cgroup = Cgroup::new("deleted-pod")?;
    let id = id_of(&cgroup)?;
    let counted = || -> Option<i64> {
        let counts = tracker.counts();
        let own = counts.iter().find(|c| c.cgroup == id);
        own.map(|c| c.opened as i64 - c.closed as i64)
    };
    let pod = Namespace::new()?;
    let clients = pod.run(|| {
        let w = World::here(tracker.clone())?;
        // The kernel gives up orphaned connections after seconds instead of minutes.
        sysctl("ipv4/tcp_orphan_retries", "3")?;
        let mut server = Worker::start_in(&cgroup)?;
        let at = server.listen()?;
        w.serving_at(at);
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(at)?);
        }
        for client in &clients[..2] {
            raw::block_receive(client)?;
            server.command("accept")?;
            server.command("fill")?;
        }
        w.has(&[(Active, 2), (Backlog, 1)], 3)?;
        server.kill()?;
        // The queued one was reset with its listener.
        w.has(&[(Flushing, 2)], 2)?;
        Ok(clients)
    })?;
    // Only the unsent data is left of the pod. It keeps the namespace.
    drop((pod, clients));
    ensure!(counted() == Some(2), "{:?} while flushing", counted());
    let until = Instant::now() + Duration::from_secs(60);
    while counted() != Some(0) {
        ensure!(counted() > Some(0), "{:?}", counted());
        ensure!(Instant::now() < until, "still counted: {:?}", counted());
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn case_17_accepted_and_queued_connections_count_zero_after_they_are_destroyed() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        let queued = TcpStream::connect(listener.local_addr()?)?;
        w.has(&[(Active, 1), (Backlog, 1)], 2)?;
        sockets::destroy(server.local_addr()?, client.local_addr()?)?;
        w.has_at_once(&[(Backlog, 1)], 1)?;
        sockets::destroy(listener.local_addr()?, queued.local_addr()?)?;
        w.has_at_once(&[], 0)?;
        // Both can still be closed: one has a descriptor, and accept may return one for the other.
        drop(server);
        listener.set_nonblocking(true)?;
        drop(listener.accept());
        drop(client);
        w.keeps(&[], 0, A_WHILE)?;
        w.has_opened(2)
    })
}
