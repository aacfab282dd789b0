//! How connections end (cases 11 to 14 and 17).

use std::{
    net::{Shutdown, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use ebb::flow::FlowState::{Active, Backlog, Flushing};

use crate::support::{
    cgroup::Cgroup,
    kernel,
    namespace::{Namespace, sysctl},
    proc_net,
    puppet::Puppet,
    raw,
    sockets::{self, drain, give, pair},
    world::{World, world},
};

trials![
    case_11_a_server_that_closes_first_counts_zero_at_time_wait,
    case_12_a_server_that_shut_down_its_side_is_over_although_the_client_is_silent,
    case_13_a_killed_server_flushes_until_its_last_byte_is_acknowledged,
    case_14_a_deleted_pod_with_unsent_data_counts_until_it_is_given_up_and_is_forgotten,
    case_17_destroyed_connections_accepted_and_queued_count_zero_once,
    a_connection_that_was_made_deaf_hears_again_by_itself,
];

const A_WHILE: Duration = Duration::from_millis(100);

fn case_11_a_server_that_closes_first_counts_zero_at_time_wait() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        give(&client, 10)?;
        sockets::take(&server, 10)?;
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
        ensure!(w.ever() == 1, "counted {} times", w.ever());
        Ok(())
    })
}

fn case_12_a_server_that_shut_down_its_side_is_over_although_the_client_is_silent() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        server.shutdown(Shutdown::Write)?;
        w.keeps(&[], 1, A_WHILE)?;
        // What the client may still say does not revive it.
        give(&client, 10)?;
        w.keeps(&[], 1, A_WHILE)?;
        drop((server, client));
        w.has(&[], 0)?;
        ensure!(w.ever() == 1, "counted {} times", w.ever());
        Ok(())
    })
}

fn case_13_a_killed_server_flushes_until_its_last_byte_is_acknowledged() -> Result<()> {
    world(|w| {
        let mut server = Puppet::start()?;
        let at = server.listen()?;
        w.serving_at(at);
        let client = TcpStream::connect(at)?;
        server.tell("accept")?;
        let sent: u64 = server.tell("fill")?.parse()?;
        w.has(&[(Active, 1)], 1)?;
        server.kill()?;
        w.keeps(&[(Flushing, 1)], 1, A_WHILE)?;
        let received = drain(&client)?;
        ensure!(received == sent, "{received} of {sent} bytes");
        w.has(&[], 1)?;
        drop(client);
        w.has(&[], 0)
    })
}

fn case_14_a_deleted_pod_with_unsent_data_counts_until_it_is_given_up_and_is_forgotten()
-> Result<()> {
    // Not the shared one: forgetting is for all of a tracker's workloads.
    let (tracker, _) = kernel::start()?;
    // What is counted for the pod is known by its cgroup; namespaces' numbers are used again.
    let cgroup = Cgroup::new("deleted-pod")?;
    let id = cgroup.id()?;
    let counted = || -> Option<i64> {
        let counts = tracker.counts();
        counts.iter().find(|c| c.cgroup == id).map(|c| c.inbound)
    };
    let pod = Namespace::new()?;
    let clients = pod.run(|| {
        let w = World::here(tracker.clone())?;
        // Nobody's connections are given up after seconds instead of after minutes.
        sysctl("ipv4/tcp_orphan_retries", "3")?;
        let mut server = Puppet::start_in(&cgroup)?;
        let at = server.listen()?;
        w.serving_at(at);
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(at)?);
        }
        for client in &clients[..2] {
            raw::deafen(client)?;
            server.tell("accept")?;
            server.tell("fill")?;
        }
        w.has(&[(Active, 2), (Backlog, 1)], 3)?;
        server.kill()?;
        // The queued one was reset with its listener.
        w.has(&[(Flushing, 2)], 2)?;
        Ok(clients)
    })?;
    // Nothing is left of the pod but what it has not sent yet, and that keeps its namespace.
    drop((pod, clients));
    tracker.prune();
    tracker.prune();
    ensure!(counted() == Some(2), "{:?} while flushing", counted());
    let until = Instant::now() + Duration::from_secs(60);
    while counted() != Some(0) {
        ensure!(counted() > Some(0), "{:?}", counted());
        ensure!(Instant::now() < until, "still counted: {:?}", counted());
        sleep(Duration::from_millis(20));
    }
    tracker.prune();
    tracker.prune();
    ensure!(counted().is_none(), "not forgotten: {:?}", counted());
    Ok(())
}

fn case_17_destroyed_connections_accepted_and_queued_count_zero_once() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        let queued = TcpStream::connect(listener.local_addr()?)?;
        w.has(&[(Active, 1), (Backlog, 1)], 2)?;
        sockets::destroy(server.local_addr()?, client.local_addr()?)?;
        w.has_at_once(&[(Backlog, 1)], 1)?;
        sockets::destroy(listener.local_addr()?, queued.local_addr()?)?;
        w.has_at_once(&[], 0)?;
        // Both still have a descriptor, or can be given one.
        drop(server);
        listener.set_nonblocking(true)?;
        drop(listener.accept());
        drop(client);
        w.keeps(&[], 0, A_WHILE)?;
        ensure!(w.ever() == 2, "counted {} times", w.ever());
        Ok(())
    })
}

/// As when an agent is killed after it has made it deaf.
fn a_connection_that_was_made_deaf_hears_again_by_itself() -> Result<()> {
    world(|w| {
        let lasting = Duration::from_secs(1);
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        let begun = Instant::now();
        w.tracker.deafen(&server.try_clone()?.into(), lasting)?;
        give(&client, 10)?;
        sockets::take(&server, 10)?;
        ensure!(begun.elapsed() >= lasting, "it was not deaf");
        // Acknowledgements got through all the time, and the other direction does.
        give(&server, 10)?;
        sockets::take(&client, 10)?;
        drop((server, client));
        w.has(&[], 0)
    })
}
