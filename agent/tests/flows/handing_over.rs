//! Sockets that get another owner or another role (cases 15, 16, 18, 19 and 20).

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::{
    flow::FlowState::{Active, Backlog},
    ids::CgroupId,
};
use ebb_testkit::{cgroup::Cgroup, namespace::sysctl};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, connect, listen, recvmsg, sendmsg, sockopt,
};

use crate::support::{
    cgroup::id_of,
    sockets::{self, ANY_PORT, disconnect, listener_with, pair, read_bytes, write_bytes},
    worker::Worker,
    world::{World, world},
};

ebb_testkit::trials![
    case_15_a_forked_connection_counts_until_its_last_holder_closes,
    case_15_a_duplicated_connection_counts_until_its_last_holder_closes,
    case_15_a_connection_passed_over_a_unix_socket_counts_once_even_in_transit,
    case_16_connections_count_for_the_cgroup_that_made_their_listener_not_for_the_one_that_accepts,
    case_16_connections_of_a_listener_passed_to_another_cgroup_count_for_the_one_that_made_it,
    case_18_an_accepted_socket_that_dials_out_is_outbound,
    case_19_a_listener_that_dials_out_is_outbound,
    case_19_a_socket_that_dialled_out_and_listens_again_is_inbound,
    case_20_closing_one_of_two_reuseport_listeners_ends_its_queued_connections,
    case_20_closing_one_of_two_reuseport_listeners_moves_its_queue_to_the_other_with_migration,
];

const A_WHILE: Duration = Duration::from_millis(100);

fn case_15_a_forked_connection_counts_until_its_last_holder_closes() -> Result<()> {
    world(|w| {
        let mut server = Worker::start()?;
        let at = server.listen()?;
        w.serving_at(at);
        let client = TcpStream::connect(at)?;
        for verb in ["accept", "fork", "close"] {
            server.command(verb)?;
            w.keeps(&[(Active, 1)], 1, Duration::from_millis(20))
                .with_context(|| format!("after {verb}"))?;
        }
        server.command("kill-forks")?;
        w.has(&[], 1)?;
        drop(client);
        w.has(&[], 0)
    })
}

fn case_15_a_duplicated_connection_counts_until_its_last_holder_closes() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        let second = server.try_clone()?;
        drop(server);
        w.keeps(&[(Active, 1)], 1, A_WHILE)?;
        drop(second);
        w.has(&[], 1)?;
        drop(client);
        w.has(&[], 0)
    })
}

fn case_15_a_connection_passed_over_a_unix_socket_counts_once_even_in_transit() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        let (here, there) = UnixStream::pair()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        let fds = [server.as_fd()];
        ensure!(message.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(
            &here,
            &[IoSlice::new(b"x")],
            &mut message,
            SendFlags::empty(),
        )?;
        drop(server);
        w.keeps(&[(Active, 1)], 1, A_WHILE)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(
            &there,
            &mut [IoSliceMut::new(&mut byte)],
            &mut message,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let received = message.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        w.keeps(&[(Active, 1)], 1, A_WHILE)?;
        drop(received.context("nothing received")?);
        w.has(&[], 1)?;
        drop(client);
        w.has(&[], 0)?;
        w.has_opened(1)
    })
}

fn inbound_of(w: &World, cgroup: CgroupId) -> i64 {
    let counts = w.counts();
    let of_cgroup = counts.iter().filter(|c| c.cgroup == cgroup);
    of_cgroup.map(|c| c.opened as i64 - c.closed as i64).sum()
}

/// Demands that all readings have `n` inbound flows, and that `a` owns all of them.
fn all_are_of(w: &World, a: &Cgroup, b: &Cgroup, n: u32) -> Result<()> {
    let (a, b) = (id_of(a)?, id_of(b)?);
    let counted = (inbound_of(w, a), inbound_of(w, b));
    ensure!(
        counted == (n.into(), 0),
        "{n} wanted, A and B have {counted:?}"
    );
    let client_ports: Vec<_> = w
        .kernel_rows()?
        .0
        .iter()
        .map(|row| row.remote.port())
        .collect();
    let dump = w.dump()?;
    let owners: Vec<_> = dump
        .iter()
        .filter(|s| client_ports.contains(&s.remote.port()))
        .map(|s| s.cgroup)
        .collect();
    ensure!(
        owners == vec![Some(a); n as usize],
        "{owners:?}, A is {a:?}"
    );
    Ok(())
}

fn case_16_connections_count_for_the_cgroup_that_made_their_listener_not_for_the_one_that_accepts()
-> Result<()> {
    world(|w| {
        let (a, b) = (Cgroup::new("made-in-a")?, Cgroup::new("accepted-in-b")?);
        w.owned_by(id_of(&a)?);
        let mut server = Worker::start_in(&a)?;
        let at = server.listen()?;
        w.serving_at(at);
        server.move_to(&b)?;
        let client = TcpStream::connect(at)?;
        w.has(&[(Backlog, 1)], 1)?;
        all_are_of(w, &a, &b, 1)?;
        server.command("accept")?;
        w.has(&[(Active, 1)], 1)?;
        all_are_of(w, &a, &b, 1)?;
        server.command("close")?;
        w.has(&[], 1)?;
        all_are_of(w, &a, &b, 0)?;
        drop(client);
        server.kill()
    })
}

fn case_16_connections_of_a_listener_passed_to_another_cgroup_count_for_the_one_that_made_it()
-> Result<()> {
    world(|w| {
        let (a, b) = (Cgroup::new("passed-by-a")?, Cgroup::new("passed-to-b")?);
        w.owned_by(id_of(&a)?);
        let mut parent = Worker::start_in(&a)?;
        let at = parent.listen()?;
        w.serving_at(at);
        // A child that inherits the listener and accepts in B, while the first holder is killed.
        parent.command(&format!("acceptor {}", b.path().display()))?;
        let client = TcpStream::connect(at)?;
        w.has(&[(Active, 1)], 1)?;
        all_are_of(w, &a, &b, 1)?;
        let second = TcpStream::connect(at)?;
        w.has(&[(Active, 2)], 2)?;
        all_are_of(w, &a, &b, 2)?;
        parent.command("kill-forks")?;
        w.has(&[], 2)?;
        all_are_of(w, &a, &b, 0)?;
        drop((client, second));
        parent.kill()
    })
}

fn case_18_an_accepted_socket_that_dials_out_is_outbound() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let elsewhere = sockets::listener(16)?;
        let (server, client) = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        disconnect(&server)?;
        w.has(&[], 0)?;
        connect(&server, &elsewhere.local_addr()?)?;
        // The other end is inbound, on `elsewhere`'s port.
        w.serving_at(elsewhere.local_addr()?);
        w.has(&[(Backlog, 1)], 1)?;
        drop((server, elsewhere));
        w.has(&[], 0)?;
        drop(client);
        w.has_opened(2)?;
        w.has(&[], 0)
    })
}

fn case_19_a_listener_that_dials_out_is_outbound() -> Result<()> {
    world(|w| {
        let listener = w.listen(16)?;
        let elsewhere = sockets::listener(16)?;
        let (server, client) = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        drop((server, client));
        w.has(&[], 0)?;
        sockets::shut_reading(&listener)?;
        // From now on inbound flows are those on `elsewhere`'s port.
        w.serving_no_port();
        w.serving_at(elsewhere.local_addr()?);
        connect(&listener, &elsewhere.local_addr()?)?;
        w.has(&[(Backlog, 1)], 1)?;
        drop(listener);
        drop(elsewhere.accept()?);
        w.has(&[], 0)?;
        w.has_opened(2)
    })
}

fn case_19_a_socket_that_dialled_out_and_listens_again_is_inbound() -> Result<()> {
    world(|w| {
        let elsewhere = w.listen(16)?;
        let socket = sockets::unconnected()?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        connect(&socket, &elsewhere.local_addr()?)?;
        w.has(&[(Backlog, 1)], 1)?;
        drop(elsewhere.accept()?);
        disconnect(&socket)?;
        w.has(&[], 0)?;
        rustix::net::bind(&socket, &ANY_PORT)?;
        listen(&socket, 16)?;
        let listener = w.serving(TcpListener::from(socket))?;
        let (server, client) = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        write_bytes(&client, 1)?;
        read_bytes(&server, 1)?;
        drop((server, client));
        w.has(&[], 0)
    })
}

fn case_20_closing_one_of_two_reuseport_listeners_ends_its_queued_connections() -> Result<()> {
    world(|w| reuseport(w, false))
}

fn case_20_closing_one_of_two_reuseport_listeners_moves_its_queue_to_the_other_with_migration()
-> Result<()> {
    world(|w| {
        sysctl("ipv4/tcp_migrate_req", "1")?;
        reuseport(w, true)
    })
}

fn reuseport(w: &World, migrates: bool) -> Result<()> {
    let prepare = |s: &_| Ok(sockopt::set_socket_reuseport(s, true)?);
    let one = w.serving(listener_with(ANY_PORT, 64, libc::IPPROTO_TCP, prepare)?)?;
    let at = one.local_addr()?;
    let two = w.serving(listener_with(at, 64, libc::IPPROTO_TCP, prepare)?)?;
    let clients = (0..40)
        .map(|_| TcpStream::connect(at))
        .collect::<Result<Vec<_>, _>>()?;
    w.has(&[(Backlog, 40)], 40)?;
    // One accepted from each, so that it leaves the queue.
    let accepted = [one.accept()?, two.accept()?];
    w.has(&[(Active, 2), (Backlog, 38)], 40)?;
    drop(one);
    if migrates {
        w.keeps(&[(Active, 2), (Backlog, 38)], 40, A_WHILE)?;
        let migrated = (0..38)
            .map(|_| two.accept())
            .collect::<Result<Vec<_>, _>>()?;
        w.has(&[(Active, 40)], 40)?;
        drop(migrated);
        // The servers' ends are closed. The clients still have theirs.
        w.has(&[(Active, 2)], 40)?;
    } else {
        let (inbound, _) = w.agrees()?;
        ensure!(
            (3..39).contains(&inbound),
            "{inbound} of 40 left: the queues were not shared"
        );
        w.keeps(&[(Active, 2), (Backlog, inbound - 2)], inbound, A_WHILE)?;
    }
    drop((accepted, clients, two));
    w.has(&[], 0)
}
