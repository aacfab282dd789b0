//! `idle-flows: close` loses no request that has reached the pod.

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
use ebb_core::{
    drain_report::ReleaseReason,
    flow::FlowState::{Awaiting, Idle},
    policy::Policy,
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
        drains::{TIMEOUT, closing},
        pod::Pod,
    },
};

ebb_testkit::trials![
    close_nginx_loses_none_of_10_000_requests,
    close_axum_loses_none_of_10_000_requests,
    close_a_connection_that_two_processes_hold_ends_for_both,
    close_a_request_sent_before_the_server_sees_the_close_never_reaches_it,
    close_a_flow_used_after_the_dump_stays_open,
    close_a_client_that_has_said_nothing_ends_unless_its_request_comes_first,
    close_a_flow_whose_server_has_set_a_socket_filter_stays_open,
    close_a_pod_without_the_policy_keeps_its_idle_flows,
];

const REQUESTS: u32 = 10_000;
const CONNECTIONS: u32 = 200;
/// Very short. Clients pause for about as long, so that many send a request while ebb closes their connection.
const IDLE_AFTER: Duration = Duration::from_millis(100);

fn close_nginx_loses_none_of_10_000_requests() -> Result<()> {
    let servers = "
        server {
            listen 8080;
            location / { return 200 'hello'; }
            location /slow { proxy_pass http://127.0.0.1:9000/slow; }
        }";
    loses_no_request(&Pod::nginx(servers)?, "access")
}

fn close_axum_loses_none_of_10_000_requests() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    loses_no_request(&pod, server::web::LOG)
}

/// The clients' record of their attempts to get answers. Each attempt has a number.
#[derive(Default)]
struct Attempts {
    next: AtomicU32,
    attempts: AtomicU32,
    answered: Mutex<BTreeSet<u32>>,
    /// What came instead of an answer, by the number of the attempt.
    unanswered: Mutex<BTreeMap<u32, String>>,
}

/// While clients make [`REQUESTS`], one drain after the other closes idle flows. Then the server's log must equal the
/// clients' record: each request in the log got its whole answer, and no other request got one.
fn loses_no_request(pod: &Pod, log: &str) -> Result<()> {
    let record = Arc::new(Attempts::default());
    let closed = pod.with_clients(async |pod| {
        let mut clients = JoinSet::new();
        for n in 0..CONNECTIONS {
            clients.spawn(client(pod.at(8080), n, Arc::clone(&record)));
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
                _ = drain.released() => None,
            };
            let report = drain.released().await?;
            closed += report.idle_closed;
            if let Some(done) = done {
                return done.map(|()| closed);
            }
        }
    })?;
    let answered = record.answered.lock().unwrap();
    let unanswered = record.unanswered.lock().unwrap();
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
    ensure!(seen == *answered, "the server's log is incomplete");
    let answers = u32::try_from(answered.len())?;
    ensure!(answers == REQUESTS, "{answers} answers");
    // Fewer would prove little.
    ensure!(closed >= 200, "only {closed} were closed");
    eprintln!(
        "{answers} answers, {closed} idle flows closed, {} requests came too late",
        unanswered.len()
    );
    Ok(())
}

/// Makes one request after the other and repeats each until it is answered. Does not check before a request whether the
/// server has closed the connection meanwhile.
async fn client(server: SocketAddr, seed: u32, record: Arc<Attempts>) -> Result<()> {
    let mut connection = None;
    while record.next.fetch_add(1, Ordering::Relaxed) < REQUESTS {
        loop {
            let n = record.attempts.fetch_add(1, Ordering::Relaxed);
            let stream = match connection.as_mut() {
                Some(stream) => stream,
                None => connection.insert(TcpStream::connect(server).await?),
            };
            // Every third answer takes longer than `idle-after`.
            let path = if n.is_multiple_of(3) {
                "/slow?ms=300&"
            } else {
                "/?"
            };
            match timeout(TIMEOUT, ask(stream, &format!("{path}id={n}"))).await? {
                Ok(()) => {
                    record.answered.lock().unwrap().insert(n);
                    break;
                }
                Err(error) => {
                    record
                        .unanswered
                        .lock()
                        .unwrap()
                        .insert(n, format!("{error:#}"));
                    connection = None;
                }
            }
        }
        // From 60 to 360 ms, at random.
        let n = record
            .attempts
            .load(Ordering::Relaxed)
            .wrapping_mul(2_654_435_761)
            ^ seed;
        sleep(Duration::from_millis(u64::from(60 + n % 301))).await;
    }
    Ok(())
}

/// A connection that is idle after a request and its answer.
async fn idle_connection(pod: &Pod, path: &str) -> Result<TcpStream> {
    let mut client = TcpStream::connect(pod.at(8080)).await?;
    ask(&mut client, path).await?;
    pod.becomes(Idle).await?;
    Ok(client)
}

/// Makes one request and reads its whole answer.
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
    pod.with_clients(async |pod| {
        let mut client = TcpStream::connect(pod.at(8080)).await?;
        client.write_all(b"hello").await?;
        let mut echo = [0; 5];
        timeout(TIMEOUT, client.read_exact(&mut echo)).await??;
        pod.becomes(Idle).await?;
        let report = pod.drain(closing()).await.drained(0).await?;
        ensure!(report.idle_closed == 1, "{report:#?}");
        ensure!(
            timeout(TIMEOUT, client.read(&mut echo)).await?? == 0,
            "no end"
        );
        Ok(())
    })
}

/// If the request reached axum together with the end of the stream, axum would start it and then abandon it.
fn close_a_request_sent_before_the_server_sees_the_close_never_reaches_it() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.with_clients(async |pod| {
        let mut client = idle_connection(pod, "/?id=1").await?;
        pod.signal(Signal::STOP)?;
        let closed = pod.close(pod.flows(IDLE_AFTER).await?).await?;
        ensure!(closed.len() == 1, "{closed:?}");
        client
            .write_all(b"GET /slow?id=2 HTTP/1.1\r\nHost: x\r\n\r\n")
            .await?;
        sleep(Duration::from_millis(100)).await;
        pod.signal(Signal::CONT)?;
        let end = timeout(TIMEOUT, client.read(&mut [0; 1024])).await??;
        ensure!(end == 0, "an answer");
        let seen = fs::read_to_string(pod.directory().join(server::web::LOG))?;
        ensure!(seen == "id=1\n", "{seen}");
        Ok(())
    })
}

fn close_a_flow_used_after_the_dump_stays_open() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.with_clients(async |pod| {
        let mut client = idle_connection(pod, "/").await?;
        let idle = pod.flows(IDLE_AFTER).await?;
        // After another request and its answer it is idle again, but not unchanged.
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
        let n = timeout(TIMEOUT, client.read(&mut answer)).await??;
        ensure!(answer[..n].ends_with(b"hello"), "no answer");
        Ok(())
    })
}

fn close_a_client_that_has_said_nothing_ends_unless_its_request_comes_first() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.with_clients(async |pod| {
        let mut client = TcpStream::connect(pod.at(8080)).await?;
        pod.becomes(Awaiting).await?;
        let silent = pod.flows(IDLE_AFTER).await?;
        // Its first request comes after the dump.
        client
            .write_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            .await?;
        sleep(Duration::from_millis(50)).await;
        ensure!(pod.close(silent).await?.is_empty(), "closed");
        let mut answer = [0; 1024];
        let n = timeout(TIMEOUT, client.read(&mut answer)).await??;
        ensure!(answer[..n].ends_with(b"hello"), "no answer");

        let mut silent = TcpStream::connect(pod.at(8080)).await?;
        let report = pod.drain(closing()).await.drained(0).await?;
        ensure!(report.idle_closed == 2, "{report:#?}");
        for client in [&mut client, &mut silent] {
            let end = timeout(TIMEOUT, client.read(&mut answer)).await??;
            ensure!(end == 0, "no end");
        }
        Ok(())
    })
}

fn close_a_flow_whose_server_has_set_a_socket_filter_stays_open() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.with_clients(async |pod| {
        let mut client = idle_connection(pod, "/").await?;
        let socket = pod.socket(client.local_addr()?)?;
        let socket = SockRef::from(&socket);
        // A filter of the server's that accepts everything.
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

fn close_a_pod_without_the_policy_keeps_its_idle_flows() -> Result<()> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB, &[], 8080)?;
    pod.with_clients(async |pod| {
        let mut client = idle_connection(pod, "/").await?;
        let drain = pod
            .drain(Policy {
                idle_flows: ebb_core::policy::IdleFlows::Keep,
                max_hold: Some(Duration::from_millis(2000)),
                ..closing()
            })
            .await;
        let report = drain.released().await?;
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
