//! HTTP/1.1: keep-alive, long answers, pipelining, answers in pieces.

use std::time::Duration;

use anyhow::{Result, ensure};
use ebb_core::{
    flow::FlowState::{Active, Awaiting, Backlog, HalfClosed, Idle},
    policy::Policy,
};
use ebb_testkit::http::HttpConnection;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    drains::{IDLE_AFTER, TIMEOUT, closing, until_idle},
    pod::Pod,
    until_table::{Effect, has_row},
};

ebb_testkit::trials![
    http1_a_connection_is_awaiting_during_a_request_and_idle_after_its_answer,
    http1_a_client_that_has_asked_nothing_is_idle,
    http1_a_drain_waits_for_an_answer_that_takes_20_s,
    http1_a_drain_waits_for_an_answer_that_takes_long,
    http1_a_request_of_a_half_closed_client_looks_idle_unless_idle_after_is_longer,
    http1_a_pipelined_request_behind_an_answered_one_looks_idle,
    http1_chunks_with_short_pauses_are_active,
    http1_chunks_with_long_pauses_look_idle_unless_idle_after_is_longer,
    http1_events_with_long_pauses_look_idle_unless_idle_after_is_longer,
    http1_events_with_long_pauses_are_cut_off_with_idle_flows_close,
];

/// nginx before a slow application.
pub(crate) const NGINX: &str = "
    server {
        listen 8080;
        location / { return 200 'hello'; }
        location /api/ { proxy_pass http://127.0.0.1:9000/; }
    }";

fn http1_a_connection_is_awaiting_during_a_request_and_idle_after_its_answer() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let mut client = HttpConnection::open(pod.at(8080)).await?;
        pod.is_active().await?;
        // No data yet: the client may be about to send.
        pod.becomes(Awaiting).await?;

        let asking = tokio::spawn(async move {
            let reply = client.get("/api/slow?ms=4000").await;
            reply.map(|reply| (client, reply))
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        pod.is_active().await?;
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, Duration::from_millis(1000)).await?;
        drain.is_held().await?;
        let (mut client, reply) = timeout(TIMEOUT, asking).await???;
        ensure!(&*reply.body == b"slow\n");
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        drain.drained(1).await?;

        let reply = client.get("/").await?;
        ensure!(&*reply.body == b"hello");
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        has_row(
            "HTTP/1.1: keep-alive, answered",
            Idle,
            &Effect::CutHarmlessly,
        )
    })
}

/// Browsers and pools connect ahead.
fn http1_a_client_that_has_asked_nothing_is_idle() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let mut client = HttpConnection::open(pod.at(8080)).await?;
        pod.becomes(Awaiting).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        let reply = client.get("/").await?;
        ensure!(&*reply.body == b"hello");
        has_row(
            "HTTP/1.1: connected, nothing asked",
            Idle,
            &Effect::CutHarmlessly,
        )
    })
}

/// With the default `idle-after`.
fn http1_a_drain_waits_for_an_answer_that_takes_20_s() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let mut client = HttpConnection::open(pod.at(8080)).await?;
        let long = Duration::from_secs(60);
        let asking = async move { timeout(long, client.get("/api/slow?ms=20000")).await };
        let asking = tokio::spawn(asking);
        let drain = pod
            .drain(Policy {
                idle_after: Policy::default().idle_after,
                ..until_idle()
            })
            .await;
        drain.stays_held(Duration::from_secs(19)).await?;
        ensure!(!asking.is_finished(), "answered");
        let reply = asking.await???;
        ensure!(&*reply.body == b"slow\n");
        drain.released().await?;
        has_row(
            "HTTP/1.1, TLS: a request unanswered, however long",
            Awaiting,
            &Effect::Held,
        )
    })
}

/// Asks the application itself, because nginx abandons such a request.
fn http1_a_request_of_a_half_closed_client_looks_idle_unless_idle_after_is_longer() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let ask = async || -> Result<TcpStream> {
            let mut client = TcpStream::connect(pod.at(9000)).await?;
            client
                .write_all(b"GET /slow?ms=4000 HTTP/1.1\r\nHost: x\r\n\r\n")
                .await?;
            client.shutdown().await?;
            Ok(client)
        };
        let mut client = ask().await?;
        pod.becomes_after(Idle, &[Backlog, Active, HalfClosed]).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        until(&mut client, "slow\n").await?;
        drop(client);

        let mut client = ask().await?;
        let longer = Policy {
            idle_after: Duration::from_secs(20),
            ..until_idle()
        };
        let drain = pod.drain(longer).await;
        until(&mut client, "slow\n").await?;
        drop(client);
        drain.drained(0).await?;
        has_row(
            "HTTP/1.1: a request behind which the client closed its side (half-closed), unanswered for longer than \
             `idle-after`",
            Idle,
            &Effect::Lost("`idle-after` above the longest answer"),
        )
    })
}

/// The answer takes eight times `idle-after`.
fn http1_a_drain_waits_for_an_answer_that_takes_long() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let mut client = HttpConnection::open(pod.at(8080)).await?;
        client.get("/").await?;
        let asking = tokio::spawn(async move { client.get("/api/slow?ms=4000").await });
        pod.becomes(Awaiting).await?;
        // A drain with either policy waits for the answer. The second may only close flows that are idle by then.
        let (idle, zero) = (pod.drain(until_idle()).await, closing());
        pod.stays(Awaiting, 5 * IDLE_AFTER).await?;
        idle.is_held().await?;
        let reply = timeout(TIMEOUT, asking).await???;
        ensure!(&*reply.body == b"slow\n");
        idle.released().await?;

        let mut client = HttpConnection::open(pod.at(8080)).await?;
        let closing = pod.drain(zero).await;
        let reply = client.get("/api/slow?ms=2000").await?;
        ensure!(&*reply.body == b"slow\n");
        closing.drained(0).await?;
        has_row(
            "HTTP/1.1, TLS: a request unanswered, however long",
            Awaiting,
            &Effect::Held,
        )
    })
}

fn http1_a_pipelined_request_behind_an_answered_one_looks_idle() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let mut client = TcpStream::connect(pod.at(8080)).await?;
        let both =
            "GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /api/slow?ms=3000 HTTP/1.1\r\nHost: x\r\n\r\n";
        client.write_all(both.as_bytes()).await?;
        until(&mut client, "hello").await?;
        pod.becomes(Idle).await?;
        // The server works on the second request.
        let drain = pod.drain(until_idle()).await;
        drain.drained(1).await?;
        until(&mut client, "slow\n").await?;
        has_row(
            "HTTP/1.1: a pipelined request behind an answered one",
            Idle,
            &Effect::Lost("`idle-after` above the longest answer"),
        )
    })
}

fn http1_chunks_with_short_pauses_are_active() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let asking = tokio::spawn(ask(pod, "/api/stream?chunks=30&ms=150&size=100").await?);
        // Long, because a busy machine makes pauses longer.
        let longer = Policy {
            idle_after: Duration::from_secs(2),
            ..until_idle()
        };
        let drain = pod.drain(longer).await;
        drain.stays_held(Duration::from_millis(3000)).await?;
        let received = timeout(TIMEOUT, asking).await???;
        ensure!(received.ends_with("0\r\n\r\n"), "cut off: {received}");
        drain.drained(1).await?;
        has_row(
            "An answer in pieces (chunks, SSE, gRPC stream), pauses below `idle-after`",
            Active,
            &Effect::Held,
        )
    })
}

fn http1_chunks_with_long_pauses_look_idle_unless_idle_after_is_longer() -> Result<()> {
    paused("/api/stream?chunks=3&ms=2500&size=100")
}

fn http1_events_with_long_pauses_look_idle_unless_idle_after_is_longer() -> Result<()> {
    paused("/api/events?events=3&ms=2500")
}

fn paused(path: &str) -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let asking = tokio::spawn(ask(pod, path).await?);
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        // The pod would be stopped now, in the middle of the answer.
        ensure!(!asking.is_finished());
        let longer = Policy {
            idle_after: Duration::from_secs(4),
            ..until_idle()
        };
        let drain = pod.drain(longer).await;
        let received = timeout(TIMEOUT, asking).await???;
        ensure!(received.ends_with("0\r\n\r\n"), "cut off: {received}");
        drain.is_held().await?;
        drain.drained(1).await?;
        has_row(
            "An answer in pieces, a pause above `idle-after`",
            Idle,
            &Effect::Lost("`idle-after` above the longest pause"),
        )
    })
}

fn http1_events_with_long_pauses_are_cut_off_with_idle_flows_close() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let asking = tokio::spawn(ask(pod, "/api/events?events=3&ms=2500").await?);
        pod.becomes(Idle).await?;
        let report = pod.drain(closing()).await.drained(0).await?;
        ensure!(report.idle_closed == 1, "{report:?}");
        let received = timeout(TIMEOUT, asking).await???;
        ensure!(!received.ends_with("0\r\n\r\n"), "not cut off: {received}");
        Ok(())
    })
}

/// Requests a path. The returned future reads the answer up to its last chunk or the end of the connection.
async fn ask(pod: &Pod, path: &str) -> Result<impl Future<Output = Result<String>> + Send + use<>> {
    let mut client = TcpStream::connect(pod.at(8080)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    client.write_all(request.as_bytes()).await?;
    Ok(async move {
        let mut received = String::new();
        let mut some = [0; 4096];
        loop {
            let n = client.read(&mut some).await?;
            received += str::from_utf8(&some[..n])?;
            if n == 0 || received.ends_with("0\r\n\r\n") {
                // Kept open for a while, so that the client does not end the connection.
                tokio::spawn(async move {
                    tokio::time::sleep(TIMEOUT).await;
                    drop(client);
                });
                return Ok(received);
            }
        }
    })
}

/// Reads until the data ends with `wanted`.
async fn until(client: &mut TcpStream, wanted: &str) -> Result<()> {
    let mut received = String::new();
    let mut some = [0; 4096];
    while !received.ends_with(wanted) {
        let n = timeout(TIMEOUT, client.read(&mut some)).await??;
        ensure!(n > 0, "the end after {received:?}");
        received += str::from_utf8(&some[..n])?;
    }
    Ok(())
}
