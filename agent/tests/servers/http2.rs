//! HTTP/2 with nginx: several requests on one connection.

use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use ebb_core::flow::FlowState::{Awaiting, Idle};
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, time::timeout};

use crate::support::{
    drains::{IDLE_AFTER, TIMEOUT, until_idle},
    pod::Pod,
    until_table::{Effect, has_row},
};

ebb_testkit::trials![http2_a_request_is_awaiting_alone_and_looks_idle_beside_an_answered_one];

const NGINX: &str = "
    server {
        listen 8080 http2;
        location / { return 200 'hello'; }
        location /api/ { proxy_pass http://127.0.0.1:9000/; }
    }";

async fn get(mut client: SendRequest<Empty<Bytes>>, path: &'static str) -> Result<Bytes> {
    client.ready().await?;
    let request = Request::get(format!("http://web.test{path}")).body(Empty::new())?;
    let reply = client.send_request(request).await?;
    Ok(reply.into_body().collect().await?.to_bytes())
}

fn http2_a_request_is_awaiting_alone_and_looks_idle_beside_an_answered_one() -> Result<()> {
    Pod::nginx(NGINX)?.with_clients(async |pod| {
        let tcp = TcpStream::connect(pod.at(8080)).await?;
        let (client, driver) = handshake(TokioExecutor::new(), TokioIo::new(tcp)).await?;
        tokio::spawn(driver);
        // The client sent last, because it acknowledged the server's settings.
        pod.becomes(Awaiting).await?;
        has_row(
            "HTTP/2 with nginx: connected, nothing asked",
            Awaiting,
            &Effect::Held,
        )?;
        let calling = tokio::spawn(get(client.clone(), "/api/slow?ms=4000"));
        tokio::time::sleep(Duration::from_millis(100)).await;
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
        drain.is_held().await?;
        ensure!(&*timeout(TIMEOUT, calling).await??? == b"slow\n");
        pod.becomes(Idle).await?;
        drain.drained(1).await?;
        has_row(
            "HTTP/2, gRPC: nothing under way, no pings of the server",
            Idle,
            &Effect::CutHarmlessly,
        )?;

        let calling = tokio::spawn(get(client.clone(), "/api/slow?ms=4000"));
        tokio::time::sleep(Duration::from_millis(200)).await;
        ensure!(&*get(client, "/").await? == b"hello");
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        ensure!(!calling.is_finished(), "answered");
        ensure!(&*timeout(TIMEOUT, calling).await??? == b"slow\n");
        has_row(
            "HTTP/2, gRPC: a request unanswered beside an answered one",
            Idle,
            &Effect::Lost("`idle-after` above the longest answer"),
        )
    })
}
