//! Which end sent last (case 24), also where the kernel's times are equal.

use std::{
    net::{Shutdown, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use ebb_core::flow::{
    Direction::Inbound,
    FlowState::{self, Active, Awaiting, HalfClosed, Idle},
};

use crate::support::{
    sockets::{self, pair, read_bytes, write_bytes},
    world::{World, world},
};

ebb_testkit::trials![
    case_24_a_read_and_unanswered_request_stays_awaiting_under_keep_alive_probes,
    case_24_an_answered_request_stays_idle_under_keep_alive_probes,
    a_connection_is_idle_after_a_fast_answer,
    a_fast_answer_with_a_delayed_ack_stays_idle_under_keep_alive_probes,
    a_request_right_after_an_answer_is_awaiting,
    a_large_request_right_after_an_answer_is_awaiting,
    an_unanswered_request_right_after_an_answer_stays_awaiting_under_keep_alive_probes,
    a_connection_is_idle_after_a_burst_of_exchanges,
    one_dump_finds_the_last_sender_of_thousands_of_connections_with_equal_times,
    a_connection_without_any_data_is_never_idle,
    a_connection_with_half_a_request_or_unread_bytes_is_never_idle,
    a_half_closed_connection_becomes_idle_whether_or_not_the_server_has_read_its_end,
];

const IDLE_AFTER: Duration = Duration::from_millis(200);

/// Runs a trial on an accepted connection without a delay for small writes on either side.
fn with_connection(
    f: impl FnOnce(&World, &TcpStream, &TcpStream) -> Result<()> + Send,
) -> Result<()> {
    world(|w| {
        w.idle_after(IDLE_AFTER);
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        f(w, &server, &client)?;
        drop((server, client));
        w.has(&[], 0)
    })
}

/// The client sends a request and the server answers.
fn exchange(server: &TcpStream, client: &TcpStream, request: usize, answer: usize) -> Result<()> {
    write_bytes(client, request)?;
    read_bytes(server, request)?;
    write_bytes(server, answer)?;
    read_bytes(client, answer)
}

/// Demands that the flow becomes `state`, is active until then, and stays `state` for as long as `lasting`.
fn becomes_and_stays(w: &World, state: FlowState, lasting: Duration) -> Result<()> {
    let begun = Instant::now();
    let mut reached = None;
    loop {
        let snapshot = w.snapshot()?;
        let mut inbound = snapshot.flows.iter().filter(|f| f.direction == Inbound);
        let now = inbound.next().map(|f| f.state);
        ensure!(
            now == Some(state) || (reached.is_none() && now == Some(Active)),
            "{now:?} after {:?}, wanted {state}: {:#?}",
            begun.elapsed(),
            w.dump()?
        );
        if now == Some(state) {
            let since = reached.get_or_insert_with(Instant::now);
            if since.elapsed() >= lasting {
                return w.has(&[(state, 1)], 1);
            }
        }
        ensure!(
            begun.elapsed() < lasting + Duration::from_secs(5),
            "still {now:?}"
        );
        sleep(Duration::from_millis(25));
    }
}

/// Sends keep-alive probes every second, the kernel's shortest interval.
fn send_keep_alives(server: &TcpStream) -> Result<()> {
    sockets::set(server, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    sockets::set(server, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 1)?;
    sockets::set(server, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 1)
}

fn case_24_a_read_and_unanswered_request_stays_awaiting_under_keep_alive_probes() -> Result<()> {
    with_connection(|w, server, client| {
        send_keep_alives(server)?;
        send_keep_alives(client)?;
        exchange(server, client, 100, 100)?;
        sleep(Duration::from_millis(50));
        write_bytes(client, 100)?;
        read_bytes(server, 100)?;
        becomes_and_stays(w, Awaiting, Duration::from_secs(10))?;
        write_bytes(server, 100)?;
        read_bytes(client, 100)?;
        becomes_and_stays(w, Idle, Duration::from_millis(300))
    })
}

fn case_24_an_answered_request_stays_idle_under_keep_alive_probes() -> Result<()> {
    with_connection(|w, server, client| {
        send_keep_alives(server)?;
        send_keep_alives(client)?;
        write_bytes(client, 100)?;
        read_bytes(server, 100)?;
        sleep(Duration::from_millis(50));
        write_bytes(server, 100)?;
        read_bytes(client, 100)?;
        becomes_and_stays(w, Idle, Duration::from_secs(4))
    })
}

fn a_connection_is_idle_after_a_fast_answer() -> Result<()> {
    with_connection(|w, server, client| {
        exchange(server, client, 100, 100)?;
        becomes_and_stays(w, Idle, Duration::from_secs(1))
    })
}

fn a_fast_answer_with_a_delayed_ack_stays_idle_under_keep_alive_probes() -> Result<()> {
    with_connection(|w, server, client| {
        send_keep_alives(server)?;
        // As after a few exchanges. An immediate ACK would come within the jiffy of the request. The first probe would
        // then make the answer look like another request, and the flow would be awaiting.
        sockets::set(client, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 0)?;
        exchange(server, client, 100, 100)?;
        // A probe during a dump may leave it undecided; the next dump decides.
        sleep(Duration::from_millis(3500));
        w.has(&[(Idle, 1)], 1)
    })
}

fn a_request_right_after_an_answer_is_awaiting() -> Result<()> {
    with_connection(|w, server, client| {
        exchange(server, client, 100, 100)?;
        write_bytes(client, 100)?;
        read_bytes(server, 100)?;
        becomes_and_stays(w, Awaiting, Duration::from_secs(2))
    })
}

fn a_large_request_right_after_an_answer_is_awaiting() -> Result<()> {
    // A segment of loopback holds at most 65,483 bytes.
    with_connection(|w, server, client| {
        exchange(server, client, 100, 100)?;
        write_bytes(client, 200_000)?;
        read_bytes(server, 200_000)?;
        becomes_and_stays(w, Awaiting, Duration::from_secs(2))
    })
}

fn an_unanswered_request_right_after_an_answer_stays_awaiting_under_keep_alive_probes() -> Result<()>
{
    with_connection(|w, server, client| {
        send_keep_alives(server)?;
        exchange(server, client, 100, 100)?;
        write_bytes(client, 100)?;
        read_bytes(server, 100)?;
        becomes_and_stays(w, Awaiting, Duration::from_secs(4))
    })
}

fn a_connection_is_idle_after_a_burst_of_exchanges() -> Result<()> {
    with_connection(|w, server, client| {
        for _ in 0..20 {
            exchange(server, client, 300, 5000)?;
        }
        becomes_and_stays(w, Idle, Duration::from_secs(1))
    })
}

/// So many that both parts of a dump run at the same time.
fn one_dump_finds_the_last_sender_of_thousands_of_connections_with_equal_times() -> Result<()> {
    const EACH: u32 = 1500;
    world(|w| {
        w.idle_after(IDLE_AFTER);
        let listener = w.listen(16)?;
        let mut open = Vec::new();
        for n in 0..2 * EACH {
            let (server, client) = pair(&listener)?;
            exchange(&server, &client, 100, 100)?;
            if n % 2 == 0 {
                write_bytes(&client, 100)?;
                read_bytes(&server, 100)?;
            }
            open.push((server, client));
        }
        let samples = w.dump()?;
        let equal = samples.iter().filter(|s| s.since_sent == s.since_received);
        ensure!(equal.count() > 4096, "too few with equal times");
        w.has(&[(Idle, EACH), (Awaiting, EACH)], 2 * EACH)?;
        for _ in 0..20 {
            let snapshot = w.snapshot()?;
            let inbound = || snapshot.flows.iter().filter(|f| f.direction == Inbound);
            let of = |state| inbound().filter(|f| f.state == state).count();
            let (idle, awaiting) = (of(Idle), of(Awaiting));
            ensure!(
                (idle, awaiting) == (EACH as usize, EACH as usize),
                "{idle} idle, {awaiting} awaiting"
            );
        }
        drop(open);
        w.has(&[], 0)
    })
}

fn a_half_closed_connection_becomes_idle_whether_or_not_the_server_has_read_its_end() -> Result<()>
{
    for reads in [false, true] {
        with_connection(|w, server, client| {
            exchange(server, client, 100, 100)?;
            write_bytes(client, 100)?;
            client.shutdown(Shutdown::Write)?;
            // The server still has to read the bytes before the end of the stream.
            sleep(2 * IDLE_AFTER);
            // The client may still receive.
            w.has(&[(HalfClosed, 1)], 1)?;
            read_bytes(server, 100)?;
            if reads {
                ensure!(sockets::read_to_end(server)? == 0);
            }
            w.has(&[(Idle, 1)], 1)
        })?;
    }
    Ok(())
}

fn a_connection_without_any_data_is_never_idle() -> Result<()> {
    with_connection(|w, _, _| becomes_and_stays(w, Awaiting, Duration::from_secs(1)))
}

fn a_connection_with_half_a_request_or_unread_bytes_is_never_idle() -> Result<()> {
    with_connection(|w, server, client| {
        exchange(server, client, 100, 100)?;
        sleep(Duration::from_millis(50));
        write_bytes(client, 100)?;
        becomes_and_stays(w, Active, Duration::from_secs(1))?;
        read_bytes(server, 50)?;
        becomes_and_stays(w, Active, Duration::from_millis(500))?;
        read_bytes(server, 50)?;
        becomes_and_stays(w, Awaiting, Duration::from_millis(300))
    })
}
