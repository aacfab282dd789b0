//! `idle-flows: close`: no request that had reached the pod is lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::{policy::Policy, report::ReleaseReason},
    flow::FlowState::Idle,
};
use rustix::process::Signal;
use socket2::{SockFilter, SockRef};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    server,
    support::{
        drains::{PATIENCE, closing},
        pod::Pod,
    },
};

trials![
    close_nginx_loses_none_of_10_000_requests,
    close_axum_loses_none_of_10_000_requests,
    close_a_connection_that_two_processes_hold_ends_for_both,
    close_a_request_that_comes_before_the_server_has_noticed_never_reaches_it,
    close_a_flow_that_was_used_after_the_look_is_left_alone,
    close_a_flow_whose_server_has_a_filter_of_its_own_is_left_alone,
    close_a_pod_that_did_not_ask_keeps_its_idle_flows,
];

const REQUESTS: u32 = 10_000;
const CONNECTIONS: u32 = 200;
/// As short as may be. Clients think for about as long: many speak when they are about to be closed.
const IDLE_AFTER: Duration = Duration::from_millis(100);

fn close_nginx_loses_none_of_10_000_requests() -> Result<()> {
    let servers = "
        server {
            listen 8080;
            location / { return 200 'hello'; }
            location /slow { proxy_pass http://127.0.0.1:9000/slow; }
        }";
    loses_none(&Pod::nginx(servers)?, "access")
}

fn close_axum_loses_none_of_10_000_requests() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    loses_none(&pod, server::web::LOG)
}

/// What clients know of the attempts that they made to get their answers, each of which has a number.
#[derive(Default)]
struct Tally {
    next: AtomicU32,
    attempts: AtomicU32,
    answered: Mutex<BTreeSet<u32>>,
    /// What came instead of an answer, by the number of the attempt.
    unanswered: Mutex<BTreeMap<u32, String>>,
}

/// While clients make [`REQUESTS`], a drain after the other closes what is idle. Then what the server wrote
/// down has to be what was answered: of a request that it has a record of, the whole answer arrived, and one
/// that was not answered it never saw.
fn loses_none(pod: &Pod, log: &str) -> Result<()> {
    let tally = Arc::new(Tally::default());
    let closed = pod.meet(async |pod| {
        let mut clients = JoinSet::new();
        for n in 0..CONNECTIONS {
            clients.spawn(client(pod.at(8080), n, Arc::clone(&tally)));
        }
        let mut closed = 0;
        let asking = async {
            while let Some(client) = clients.join_next().await {
                client??;
            }
            anyhow::Ok(())
        };
        tokio::pin!(asking);
        loop {
            let drain = pod
                .drain(Policy {
                    idle_after: IDLE_AFTER,
                    quiet: Duration::ZERO,
                    max_hold: Some(Duration::from_millis(1500)),
                    ..closing()
                })
                .await;
            let done = tokio::select! {
                done = &mut asking => Some(done),
                _ = drain.over() => None,
            };
            let report = drain.over().await?;
            closed += report.idle_closed;
            if let Some(done) = done {
                return done.map(|()| closed);
            }
        }
    })?;
    let answered = tally.answered.lock().unwrap();
    let unanswered = tally.unanswered.lock().unwrap();
    let seen: BTreeSet<u32> = fs::read_to_string(pod.directory().join(log))?
        .lines()
        .filter_map(|line| line.split("id=").nth(1)?.split(' ').next()?.parse().ok())
        .collect();
    let lost: Vec<_> = unanswered
        .iter()
        .filter(|(n, _)| seen.contains(n))
        .collect();
    ensure!(
        lost.is_empty(),
        "{} had reached the pod: {lost:?}",
        lost.len()
    );
    ensure!(seen == *answered, "the server's record is incomplete");
    let answers = u32::try_from(answered.len())?;
    ensure!(answers == REQUESTS, "{answers} answers");
    // Enough for what is lost to be among them.
    ensure!(closed >= 200, "only {closed} were closed");
    eprintln!(
        "{answers} answers, {closed} idle flows closed, {} requests came too late",
        unanswered.len()
    );
    Ok(())
}

/// Asks again and again, each request until it is answered, and without looking whether the connection was
/// closed while it was thinking.
async fn client(server: SocketAddr, seed: u32, tally: Arc<Tally>) -> Result<()> {
    let mut connection = None;
    while tally.next.fetch_add(1, Ordering::Relaxed) < REQUESTS {
        loop {
            let n = tally.attempts.fetch_add(1, Ordering::Relaxed);
            let stream = match connection.as_mut() {
                Some(stream) => stream,
                None => connection.insert(TcpStream::connect(server).await?),
            };
            // Every third takes longer than `idle-after`.
            let path = if n.is_multiple_of(3) {
                "/slow?ms=300&"
            } else {
                "/?"
            };
            match timeout(PATIENCE, ask(stream, &format!("{path}id={n}"))).await? {
                Ok(()) => {
                    tally.answered.lock().unwrap().insert(n);
                    break;
                }
                Err(error) => {
                    tally
                        .unanswered
                        .lock()
                        .unwrap()
                        .insert(n, format!("{error:#}"));
                    connection = None;
                }
            }
        }
        // From 60 to 360 ms, in no order.
        let n = tally
            .attempts
            .load(Ordering::Relaxed)
            .wrapping_mul(2_654_435_761)
            ^ seed;
        sleep(Duration::from_millis(u64::from(60 + n % 301))).await;
    }
    Ok(())
}

/// A connection to the server that has been asked and answered, and is idle.
async fn answered(pod: &Pod, path: &str) -> Result<TcpStream> {
    let mut client = TcpStream::connect(pod.at(8080)).await?;
    ask(&mut client, path).await?;
    pod.becomes(Idle).await?;
    Ok(client)
}

/// One request and its whole answer.
async fn ask(stream: &mut TcpStream, path: &str) -> Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .context("sending")?;
    let mut answer = Vec::new();
    loop {
        let n = stream.read_buf(&mut answer).await;
        let n = n.with_context(|| format!("after {} bytes", answer.len()))?;
        ensure!(n > 0, "the end after {} bytes", answer.len());
        let text = str::from_utf8(&answer)?;
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let head = head.to_ascii_lowercase();
        let length = head
            .split("content-length: ")
            .nth(1)
            .and_then(|s| s.lines().next());
        if body.len() == length.context("no length")?.parse::<usize>()? {
            ensure!(head.starts_with("http/1.1 200"), "{head}");
            return Ok(());
        }
    }
}

fn close_a_connection_that_two_processes_hold_ends_for_both() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::INETD, &[], 8080)?;
    pod.meet(async |pod| {
        let mut client = TcpStream::connect(pod.at(8080)).await?;
        client.write_all(b"hello").await?;
        let mut echo = [0; 5];
        timeout(PATIENCE, client.read_exact(&mut echo)).await??;
        pod.becomes(Idle).await?;
        let report = pod.drain(closing()).await.drained(0).await?;
        ensure!(report.idle_closed == 1, "{report:#?}");
        ensure!(
            timeout(PATIENCE, client.read(&mut echo)).await?? == 0,
            "no end"
        );
        Ok(())
    })
}

/// Had it reached the server, together with the end of the stream, axum would begin and then give it up.
fn close_a_request_that_comes_before_the_server_has_noticed_never_reaches_it() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.meet(async |pod| {
        let mut client = answered(pod, "/?id=1").await?;
        pod.signal(Signal::STOP)?;
        let closed = pod.close(pod.flows(IDLE_AFTER).await?).await?;
        ensure!(closed.len() == 1, "{closed:?}");
        client
            .write_all(b"GET /slow?id=2 HTTP/1.1\r\nHost: x\r\n\r\n")
            .await?;
        sleep(Duration::from_millis(100)).await;
        pod.signal(Signal::CONT)?;
        let end = timeout(PATIENCE, client.read(&mut [0; 1024])).await??;
        ensure!(end == 0, "an answer");
        let seen = fs::read_to_string(pod.directory().join(server::web::LOG))?;
        ensure!(seen == "id=1\n", "{seen}");
        Ok(())
    })
}

fn close_a_flow_that_was_used_after_the_look_is_left_alone() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.meet(async |pod| {
        let mut client = answered(pod, "/").await?;
        let idle = pod.flows(IDLE_AFTER).await?;
        // Asked and answered since: it is at rest again, but not as it was.
        ask(&mut client, "/").await?;
        ensure!(pod.close(idle).await?.is_empty(), "closed");
        pod.becomes(Idle).await?;
        let idle = pod.flows(IDLE_AFTER).await?;
        // A request under way.
        client
            .write_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            .await?;
        sleep(Duration::from_millis(50)).await;
        ensure!(pod.close(idle).await?.is_empty(), "closed");
        let mut answer = [0; 1024];
        let n = timeout(PATIENCE, client.read(&mut answer)).await??;
        ensure!(answer[..n].ends_with(b"hello"), "no answer");
        Ok(())
    })
}

fn close_a_flow_whose_server_has_a_filter_of_its_own_is_left_alone() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.meet(async |pod| {
        let mut client = answered(pod, "/").await?;
        let socket = pod.socket(client.local_addr()?)?;
        let socket = SockRef::from(&socket);
        // It takes everything, but it is the server's.
        socket.attach_filter(&[SockFilter::new(0x06, 0, 0, u32::MAX)])?;
        ensure!(
            pod.close(pod.flows(IDLE_AFTER).await?).await?.is_empty(),
            "closed"
        );
        socket
            .detach_filter()
            .context("the server's filter is gone")?;
        ask(&mut client, "/").await?;
        pod.becomes(Idle).await?;
        let closed = pod.close(pod.flows(IDLE_AFTER).await?).await?;
        ensure!(closed.len() == 1, "{closed:?}");
        Ok(())
    })
}

fn close_a_pod_that_did_not_ask_keeps_its_idle_flows() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.meet(async |pod| {
        let mut client = answered(pod, "/").await?;
        let drain = pod
            .drain(Policy {
                idle_flows: ebb::drain::policy::IdleFlows::Keep,
                max_hold: Some(Duration::from_millis(2000)),
                ..closing()
            })
            .await;
        let report = drain.over().await?;
        ensure!(
            report.reason == Some(ReleaseReason::Deadline),
            "{report:#?}"
        );
        ensure!(
            report.idle_closed == 0 && report.cut_total == Some(1),
            "{report:#?}"
        );
        ask(&mut client, "/").await
    })
}
