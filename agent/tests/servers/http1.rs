//! HTTP/1.1: keep-alive, long answers, pipelining, answers that come bit by bit.

use std::time::Duration;

use anyhow::{Result, ensure};
use ebb::{
    drain::policy::Policy,
    flow::FlowState::{Active, Awaiting, Backlog, HalfClosed, Idle},
};
use ebb_node::http::Connection;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    drains::{IDLE_AFTER, PATIENCE, closing, until_idle},
    pod::Pod,
    readme::{self, Fate},
};

trials![
    http1_a_connection_is_awaiting_while_asked_and_idle_once_answered,
    http1_an_answer_that_takes_20_s_is_awaited_all_along,
    http1_an_answer_that_takes_long_is_awaited_all_along,
    http1_a_request_whose_client_closed_its_side_looks_idle_unless_idle_after_is_longer,
    http1_a_pipelined_request_behind_an_answered_one_looks_idle,
    http1_chunks_with_short_pauses_are_active,
    http1_chunks_with_long_pauses_look_idle_unless_idle_after_is_longer,
    http1_events_with_long_pauses_look_idle_unless_idle_after_is_longer,
    http1_events_with_long_pauses_are_cut_off_where_idle_flows_are_closed,
];

/// nginx before an application that takes its time.
pub(crate) const NGINX: &str = "
    server {
        listen 8080;
        location / { return 200 'hello'; }
        location /api/ { proxy_pass http://127.0.0.1:9000/; }
    }";

fn http1_a_connection_is_awaiting_while_asked_and_idle_once_answered() -> Result<()> {
    Pod::nginx(NGINX)?.meet(async |pod| {
        let mut client = Connection::open(pod.at(8080)).await?;
        pod.is_active().await?;
        // Nobody has said anything yet: the client may be about to.
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
        let (mut client, reply) = timeout(PATIENCE, asking).await???;
        ensure!(&*reply.body == b"slow\n");
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        drain.drained(1).await?;

        let reply = client.get("/").await?;
        ensure!(&*reply.body == b"hello");
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        readme::says("HTTP/1.1: keep-alive, answered", Idle, &Fate::CutHarmlessly)
    })
}

/// As in life, with the `idle-after` that ebb has by itself.
fn http1_an_answer_that_takes_20_s_is_awaited_all_along() -> Result<()> {
    Pod::nginx(NGINX)?.meet(async |pod| {
        let mut client = Connection::open(pod.at(8080)).await?;
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
        drain.over().await?;
        readme::says(
            "HTTP/1.1, TLS: a request unanswered, however long",
            Awaiting,
            &Fate::Held,
        )
    })
}

/// nginx gives such a request up; the application behind it goes on.
fn http1_a_request_whose_client_closed_its_side_looks_idle_unless_idle_after_is_longer()
-> Result<()> {
    Pod::nginx(NGINX)?.meet(async |pod| {
        let ask = async || -> Result<TcpStream> {
            let mut client = TcpStream::connect(pod.at(9000)).await?;
            client
                .write_all(b"GET /slow?ms=4000 HTTP/1.1\r\nHost: x\r\n\r\n")
                .await?;
            client.shutdown().await?;
            Ok(client)
        };
        let mut client = ask().await?;
        pod.comes_to(Idle, &[Backlog, Active, HalfClosed]).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        until(&mut client, "slow\n").await?;
        drop(client);

        let mut client = ask().await?;
        let patient = Policy {
            idle_after: Duration::from_secs(20),
            ..until_idle()
        };
        let drain = pod.drain(patient).await;
        until(&mut client, "slow\n").await?;
        drop(client);
        drain.drained(0).await?;
        readme::says(
            "HTTP/1.1: a request behind which the client closed its side (half-closed), unanswered for longer than \
             `idle-after`",
            Idle,
            &Fate::Lost("`idle-after` above the longest answer"),
        )
    })
}

/// Eight times `idle-after`, which is what matters.
fn http1_an_answer_that_takes_long_is_awaited_all_along() -> Result<()> {
    Pod::nginx(NGINX)?.meet(async |pod| {
        let mut client = Connection::open(pod.at(8080)).await?;
        client.get("/").await?;
        let asking = tokio::spawn(async move { client.get("/api/slow?ms=4000").await });
        pod.becomes(Awaiting).await?;
        // A drain with either policy waits for the answer; the second may only close what is idle by then.
        let (idle, zero) = (pod.drain(until_idle()).await, closing());
        pod.stays(Awaiting, 5 * IDLE_AFTER).await?;
        idle.is_held().await?;
        let reply = timeout(PATIENCE, asking).await???;
        ensure!(&*reply.body == b"slow\n");
        idle.over().await?;

        let mut client = Connection::open(pod.at(8080)).await?;
        let closing = pod.drain(zero).await;
        let reply = client.get("/api/slow?ms=2000").await?;
        ensure!(&*reply.body == b"slow\n");
        closing.drained(0).await?;
        readme::says(
            "HTTP/1.1, TLS: a request unanswered, however long",
            Awaiting,
            &Fate::Held,
        )
    })
}

fn http1_a_pipelined_request_behind_an_answered_one_looks_idle() -> Result<()> {
    Pod::nginx(NGINX)?.meet(async |pod| {
        let mut client = TcpStream::connect(pod.at(8080)).await?;
        let both =
            "GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /api/slow?ms=3000 HTTP/1.1\r\nHost: x\r\n\r\n";
        client.write_all(both.as_bytes()).await?;
        until(&mut client, "hello").await?;
        pod.becomes(Idle).await?;
        // The second is being worked on.
        let drain = pod.drain(until_idle()).await;
        drain.drained(1).await?;
        until(&mut client, "slow\n").await?;
        readme::says(
            "HTTP/1.1: a pipelined request behind an answered one",
            Idle,
            &Fate::Lost("`idle-after` above the longest answer"),
        )
    })
}

fn http1_chunks_with_short_pauses_are_active() -> Result<()> {
    Pod::nginx(NGINX)?.meet(async |pod| {
        let asking = tokio::spawn(ask(pod, "/api/stream?chunks=30&ms=150&size=100").await?);
        // Wide, since a busy machine makes pauses longer.
        let wide = Policy {
            idle_after: Duration::from_secs(2),
            ..until_idle()
        };
        let drain = pod.drain(wide).await;
        drain.stays_held(Duration::from_millis(3000)).await?;
        let received = timeout(PATIENCE, asking).await???;
        ensure!(received.ends_with("0\r\n\r\n"), "cut off: {received}");
        drain.drained(1).await?;
        readme::says(
            "An answer in pieces (chunks, SSE, gRPC stream), pauses below `idle-after`",
            Active,
            &Fate::Held,
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
    Pod::nginx(NGINX)?.meet(async |pod| {
        let asking = tokio::spawn(ask(pod, path).await?);
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        // In the middle of it: the pod would be stopped now.
        ensure!(!asking.is_finished());
        let patient = Policy {
            idle_after: Duration::from_secs(4),
            ..until_idle()
        };
        let drain = pod.drain(patient).await;
        let received = timeout(PATIENCE, asking).await???;
        ensure!(received.ends_with("0\r\n\r\n"), "cut off: {received}");
        drain.is_held().await?;
        drain.drained(1).await?;
        readme::says(
            "An answer in pieces, a pause above `idle-after`",
            Idle,
            &Fate::Lost("`idle-after` above the longest pause"),
        )
    })
}

fn http1_events_with_long_pauses_are_cut_off_where_idle_flows_are_closed() -> Result<()> {
    Pod::nginx(NGINX)?.meet(async |pod| {
        let asking = tokio::spawn(ask(pod, "/api/events?events=3&ms=2500").await?);
        pod.becomes(Idle).await?;
        let report = pod.drain(closing()).await.drained(0).await?;
        ensure!(report.idle_closed == 1, "{report:?}");
        let received = timeout(PATIENCE, asking).await???;
        ensure!(!received.ends_with("0\r\n\r\n"), "not cut off: {received}");
        Ok(())
    })
}

/// Asks for a path; the answer, up to its last chunk or the end of the connection, comes later.
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
                // Kept open for a while: it is not by its client that the connection ends.
                tokio::spawn(async move {
                    tokio::time::sleep(PATIENCE).await;
                    drop(client);
                });
                return Ok(received);
            }
        }
    })
}

/// Reads until `wanted` has come.
async fn until(client: &mut TcpStream, wanted: &str) -> Result<()> {
    let mut received = String::new();
    let mut some = [0; 4096];
    while !received.ends_with(wanted) {
        let n = timeout(PATIENCE, client.read(&mut some)).await??;
        ensure!(n > 0, "the end after {received:?}");
        received += str::from_utf8(&some[..n])?;
    }
    Ok(())
}
