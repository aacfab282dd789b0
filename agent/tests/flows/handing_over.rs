//! Sockets that change hands or roles (cases 15, 16, 18, 19 and 20).

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    flow::FlowState::{Active, Backlog},
    ids::CgroupId,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, connect, listen, recvmsg, sendmsg, sockopt,
};

use crate::support::{
    cgroup::Cgroup,
    namespace::sysctl,
    puppet::Puppet,
    sockets::{self, ANY, disconnect, give, listener_with, pair, take},
    world::{World, world},
};

trials![
    case_15_a_forked_connection_counts_until_its_last_holder_closes,
    case_15_a_duplicated_connection_counts_until_its_last_holder_closes,
    case_15_a_connection_passed_over_a_unix_socket_counts_once_even_on_its_way,
    case_16_a_listener_made_in_one_cgroup_and_accepted_in_another_counts_for_the_first,
    case_16_a_listener_passed_to_another_cgroup_counts_for_the_first,
    case_18_an_accepted_socket_that_dials_out_is_outbound,
    case_19_a_listener_that_dials_out_is_outbound,
    case_19_a_socket_that_dialled_out_and_listens_again_is_inbound,
    case_20_a_closed_reuseport_sibling_takes_its_queue_along,
    case_20_a_closed_reuseport_sibling_leaves_its_queue_to_the_other_with_migration,
];

const A_WHILE: Duration = Duration::from_millis(100);

fn case_15_a_forked_connection_counts_until_its_last_holder_closes() -> Result<()> {
    world(|w| {
        let mut server = Puppet::start()?;
        let at = server.listen()?;
        w.serving_at(at);
        let client = TcpStream::connect(at)?;
        for verb in ["accept", "fork", "close"] {
            server.tell(verb)?;
            w.keeps(&[(Active, 1)], 1, Duration::from_millis(20))
                .with_context(|| format!("after {verb}"))?;
        }
        server.tell("kill-forks")?;
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

fn case_15_a_connection_passed_over_a_unix_socket_counts_once_even_on_its_way() -> Result<()> {
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
        ensure!(w.ever() == 1, "counted {} times", w.ever());
        Ok(())
    })
}

fn inbound_of(w: &World, cgroup: CgroupId) -> i64 {
    let counts = w.counts();
    let of_cgroup = counts.iter().filter(|c| c.cgroup == cgroup);
    of_cgroup.map(|c| c.inbound).sum()
}

/// Everybody agrees that `n` flows are inbound, all of `a`'s.
fn all_are_of(w: &World, a: &Cgroup, b: &Cgroup, n: u32) -> Result<()> {
    let (a, b) = (a.id()?, b.id()?);
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
    let look = w.look()?;
    let owners: Vec<_> = look
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

fn case_16_a_listener_made_in_one_cgroup_and_accepted_in_another_counts_for_the_first() -> Result<()>
{
    world(|w| {
        let (a, b) = (Cgroup::new("made-in-a")?, Cgroup::new("accepted-in-b")?);
        w.owned_by(a.id()?);
        let mut server = Puppet::start_in(&a)?;
        let at = server.listen()?;
        w.serving_at(at);
        server.move_to(&b)?;
        let client = TcpStream::connect(at)?;
        w.has(&[(Backlog, 1)], 1)?;
        all_are_of(w, &a, &b, 1)?;
        server.tell("accept")?;
        w.has(&[(Active, 1)], 1)?;
        all_are_of(w, &a, &b, 1)?;
        server.tell("close")?;
        w.has(&[], 1)?;
        all_are_of(w, &a, &b, 0)?;
        drop(client);
        server.kill()
    })
}

fn case_16_a_listener_passed_to_another_cgroup_counts_for_the_first() -> Result<()> {
    world(|w| {
        let (a, b) = (Cgroup::new("passed-by-a")?, Cgroup::new("passed-to-b")?);
        w.owned_by(a.id()?);
        let mut parent = Puppet::start_in(&a)?;
        let at = parent.listen()?;
        w.serving_at(at);
        // A child that inherits the listener and accepts in B, while the first holder is killed.
        parent.tell(&format!("worker {}", b.path().display()))?;
        let client = TcpStream::connect(at)?;
        w.has(&[(Active, 1)], 1)?;
        all_are_of(w, &a, &b, 1)?;
        let second = TcpStream::connect(at)?;
        w.has(&[(Active, 2)], 2)?;
        all_are_of(w, &a, &b, 2)?;
        parent.tell("kill-forks")?;
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
        // The other end is inbound, on a port of its own.
        w.serving_at(elsewhere.local_addr()?);
        w.has(&[(Backlog, 1)], 1)?;
        drop((server, elsewhere));
        w.has(&[], 0)?;
        drop(client);
        ensure!(w.ever() == 2, "counted {} times", w.ever());
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
        // Its port goes with it; what is inbound from now on is so elsewhere.
        w.serving_no_more();
        w.serving_at(elsewhere.local_addr()?);
        connect(&listener, &elsewhere.local_addr()?)?;
        w.has(&[(Backlog, 1)], 1)?;
        drop(listener);
        drop(elsewhere.accept()?);
        w.has(&[], 0)?;
        ensure!(w.ever() == 2, "counted {} times", w.ever());
        Ok(())
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
        rustix::net::bind(&socket, &ANY)?;
        listen(&socket, 16)?;
        let listener = w.serving(TcpListener::from(socket))?;
        let (server, client) = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        give(&client, 1)?;
        take(&server, 1)?;
        drop((server, client));
        w.has(&[], 0)
    })
}

fn case_20_a_closed_reuseport_sibling_takes_its_queue_along() -> Result<()> {
    world(|w| reuseport(w, false))
}

fn case_20_a_closed_reuseport_sibling_leaves_its_queue_to_the_other_with_migration() -> Result<()> {
    world(|w| {
        sysctl("ipv4/tcp_migrate_req", "1")?;
        reuseport(w, true)
    })
}

fn reuseport(w: &World, migrates: bool) -> Result<()> {
    let prepare = |s: &_| Ok(sockopt::set_socket_reuseport(s, true)?);
    let one = w.serving(listener_with(ANY, 64, libc::IPPROTO_TCP, prepare)?)?;
    let at = one.local_addr()?;
    let two = w.serving(listener_with(at, 64, libc::IPPROTO_TCP, prepare)?)?;
    let clients = (0..40)
        .map(|_| TcpStream::connect(at))
        .collect::<Result<Vec<_>, _>>()?;
    w.has(&[(Backlog, 40)], 40)?;
    // One accepted from each: those are nobody's queue's any more.
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
        // The servers' ends are over, the clients' wait for their owners.
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
