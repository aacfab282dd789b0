//! Who spoke last (case 24), also where the kernel's times do not tell.

use std::{
    net::{Shutdown, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use ebb::flow::{
    Direction::Inbound,
    FlowState::{self, Active, Awaiting, HalfClosed, Idle},
};

use crate::support::{
    sockets::{self, give, pair, take},
    world::{World, world},
};

trials![
    case_24_a_request_read_and_unanswered_is_awaiting_whatever_probes_pass,
    case_24_an_answered_request_is_idle_and_stays_so_under_keep_alive_probes,
    a_fast_answer_is_idle,
    a_fast_answer_acknowledged_with_delay_stays_idle_under_keep_alive_probes,
    a_request_hard_upon_the_last_answer_is_awaiting,
    a_large_request_hard_upon_the_last_answer_is_awaiting,
    an_unanswered_request_hard_upon_an_answer_stays_awaiting_under_keep_alive_probes,
    a_burst_of_exchanges_that_is_over_is_idle,
    thousands_whose_times_do_not_tell_are_told_apart_in_one_look,
    a_connection_on_which_nobody_has_spoken_is_never_idle,
    half_a_request_and_unread_bytes_are_never_idle,
    a_half_closed_connection_becomes_idle_whether_the_server_has_read_its_end_or_not,
];

const IDLE_AFTER: Duration = Duration::from_millis(200);

/// An accepted connection, with no delay for small writes on either side.
fn talking(f: impl FnOnce(&World, &TcpStream, &TcpStream) -> Result<()> + Send) -> Result<()> {
    world(|w| {
        w.idle_after(IDLE_AFTER);
        let listener = w.listen(16)?;
        let (server, client) = pair(&listener)?;
        f(w, &server, &client)?;
        drop((server, client));
        w.has(&[], 0)
    })
}

/// Client asks, server answers.
fn exchange(server: &TcpStream, client: &TcpStream, request: usize, answer: usize) -> Result<()> {
    give(client, request)?;
    take(server, request)?;
    give(server, answer)?;
    take(client, answer)
}

/// The flow becomes `state` and is nothing but `state` or active on the way and for `lasting` after.
fn is_and_stays(w: &World, state: FlowState, lasting: Duration) -> Result<()> {
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
            w.look()?
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

/// Probes every second, the shortest the kernel has.
fn probe(server: &TcpStream) -> Result<()> {
    sockets::set(server, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    sockets::set(server, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 1)?;
    sockets::set(server, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 1)
}

fn case_24_a_request_read_and_unanswered_is_awaiting_whatever_probes_pass() -> Result<()> {
    talking(|w, server, client| {
        probe(server)?;
        probe(client)?;
        exchange(server, client, 100, 100)?;
        sleep(Duration::from_millis(50));
        give(client, 100)?;
        take(server, 100)?;
        is_and_stays(w, Awaiting, Duration::from_secs(10))?;
        give(server, 100)?;
        take(client, 100)?;
        is_and_stays(w, Idle, Duration::from_millis(300))
    })
}

fn case_24_an_answered_request_is_idle_and_stays_so_under_keep_alive_probes() -> Result<()> {
    talking(|w, server, client| {
        probe(server)?;
        probe(client)?;
        give(client, 100)?;
        take(server, 100)?;
        sleep(Duration::from_millis(50));
        give(server, 100)?;
        take(client, 100)?;
        is_and_stays(w, Idle, Duration::from_secs(4))
    })
}

fn a_fast_answer_is_idle() -> Result<()> {
    talking(|w, server, client| {
        exchange(server, client, 100, 100)?;
        is_and_stays(w, Idle, Duration::from_secs(1))
    })
}

fn a_fast_answer_acknowledged_with_delay_stays_idle_under_keep_alive_probes() -> Result<()> {
    talking(|w, server, client| {
        probe(server)?;
        // As after a few exchanges. At once, it would be within the jiffy of the request: then the first probe
        // takes away what told the answer from another request, and the flow is taken for awaiting.
        sockets::set(client, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 0)?;
        exchange(server, client, 100, 100)?;
        // A look that a probe gets in between of may leave it undecided; the next one does not.
        sleep(Duration::from_millis(3500));
        w.has(&[(Idle, 1)], 1)
    })
}

fn a_request_hard_upon_the_last_answer_is_awaiting() -> Result<()> {
    talking(|w, server, client| {
        exchange(server, client, 100, 100)?;
        give(client, 100)?;
        take(server, 100)?;
        is_and_stays(w, Awaiting, Duration::from_secs(2))
    })
}

fn a_large_request_hard_upon_the_last_answer_is_awaiting() -> Result<()> {
    // Loopback's segments hold 65,483 bytes at most.
    talking(|w, server, client| {
        exchange(server, client, 100, 100)?;
        give(client, 200_000)?;
        take(server, 200_000)?;
        is_and_stays(w, Awaiting, Duration::from_secs(2))
    })
}

fn an_unanswered_request_hard_upon_an_answer_stays_awaiting_under_keep_alive_probes() -> Result<()>
{
    talking(|w, server, client| {
        probe(server)?;
        exchange(server, client, 100, 100)?;
        give(client, 100)?;
        take(server, 100)?;
        is_and_stays(w, Awaiting, Duration::from_secs(4))
    })
}

fn a_burst_of_exchanges_that_is_over_is_idle() -> Result<()> {
    talking(|w, server, client| {
        for _ in 0..20 {
            exchange(server, client, 300, 5000)?;
        }
        is_and_stays(w, Idle, Duration::from_secs(1))
    })
}

/// So many that both walks of a look are under way at once.
fn thousands_whose_times_do_not_tell_are_told_apart_in_one_look() -> Result<()> {
    const EACH: u32 = 1500;
    world(|w| {
        w.idle_after(IDLE_AFTER);
        let listener = w.listen(16)?;
        let mut open = Vec::new();
        for n in 0..2 * EACH {
            let (server, client) = pair(&listener)?;
            exchange(&server, &client, 100, 100)?;
            if n % 2 == 0 {
                give(&client, 100)?;
                take(&server, 100)?;
            }
            open.push((server, client));
        }
        let look = w.look()?;
        let ties = look.iter().filter(|s| s.since_sent == s.since_received);
        ensure!(ties.count() > 4096, "too few for that");
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

fn a_half_closed_connection_becomes_idle_whether_the_server_has_read_its_end_or_not() -> Result<()>
{
    for reads in [false, true] {
        talking(|w, server, client| {
            exchange(server, client, 100, 100)?;
            give(client, 100)?;
            client.shutdown(Shutdown::Write)?;
            // A byte before the end of the stream is one that the server has to read.
            sleep(2 * IDLE_AFTER);
            w.has(&[(HalfClosed, 1)], 0)?;
            take(server, 100)?;
            if reads {
                ensure!(sockets::drain(server)? == 0);
            }
            w.has(&[(Idle, 1)], 0)
        })?;
    }
    Ok(())
}

fn a_connection_on_which_nobody_has_spoken_is_never_idle() -> Result<()> {
    talking(|w, _, _| is_and_stays(w, Awaiting, Duration::from_secs(1)))
}

fn half_a_request_and_unread_bytes_are_never_idle() -> Result<()> {
    talking(|w, server, client| {
        exchange(server, client, 100, 100)?;
        sleep(Duration::from_millis(50));
        give(client, 100)?;
        is_and_stays(w, Active, Duration::from_secs(1))?;
        take(server, 50)?;
        is_and_stays(w, Active, Duration::from_millis(500))?;
        take(server, 50)?;
        is_and_stays(w, Awaiting, Duration::from_millis(300))
    })
}
