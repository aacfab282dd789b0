//! gRPC: slow calls, streams with pauses, pings.

use std::{future::ready, io, net::Shutdown, time::Duration};

use anyhow::{Result, ensure};
use ebb_core::{
    flow::FlowState::{Active, Awaiting, Idle},
    policy::Policy,
};
use http::uri::{PathAndQuery, Uri};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};
use tonic::{
    Request,
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::{
    server::{self, Text},
    support::{
        drains::{IDLE_AFTER, TIMEOUT, until_idle},
        pod::Pod,
        until_table::{Effect, has_row},
    },
};

ebb_testkit::trials![
    grpc_a_slow_call_is_awaiting,
    grpc_a_slow_call_looks_idle_after_a_ping_of_the_client,
    grpc_a_stream_that_pauses_looks_idle_unless_idle_after_is_longer,
    grpc_a_connection_is_awaiting_after_a_ping_of_the_server,
    grpc_a_connection_with_frequent_pings_is_active,
    grpc_a_connection_looks_idle_after_an_answer_even_with_another_call_open,
];

fn serving(ping_every: &str) -> Result<Pod> {
    let mut pod = Pod::new()?;
    pod.start_own(server::GRPC, &[ping_every], 8080)?;
    Ok(pod)
}

fn endpoint(pod: &Pod) -> Result<Endpoint> {
    Ok(Endpoint::from_shared(format!("http://{}", pod.at(8080)))?)
}

/// A channel, and the socket of its only connection.
async fn connected(pod: &Pod) -> Result<(Channel, std::net::TcpStream)> {
    connected_by(pod, &endpoint(pod)?).await
}

async fn connected_by(pod: &Pod, by: &Endpoint) -> Result<(Channel, std::net::TcpStream)> {
    let stream = TcpStream::connect(pod.at(8080)).await?.into_std()?;
    let socket = stream.try_clone()?;
    let mut once = Some(TokioIo::new(TcpStream::from_std(stream)?));
    let connector = service_fn(move |_: Uri| {
        let stream = once.take().ok_or(io::ErrorKind::NotConnected);
        ready(stream.map_err(io::Error::from))
    });
    let channel = by.connect_with_connector(connector).await?;
    Ok((channel, socket))
}

/// Ends a connection, unless its client has already done so.
fn end(socket: &std::net::TcpStream) -> io::Result<()> {
    match socket.shutdown(Shutdown::Both) {
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        ended => ended,
    }
}

/// Makes a call whose answer takes this long.
async fn wait(channel: Channel, ms: &str) -> Result<Text> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await?;
    let path = PathAndQuery::from_static("/servers.Calls/Wait");
    let codec = ProstCodec::<Text, Text>::default();
    let answer = grpc.unary(Request::new(ms.to_owned()), path, codec).await?;
    Ok(answer.into_inner())
}

/// Reads all events of a stream with pauses of this length.
async fn watch(channel: Channel, ms: &str) -> Result<Vec<Text>> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await?;
    let path = PathAndQuery::from_static("/servers.Calls/Watch");
    let codec = ProstCodec::<Text, Text>::default();
    let answer = grpc
        .server_streaming(Request::new(ms.to_owned()), path, codec)
        .await?;
    let mut stream = answer.into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await? {
        events.push(event);
    }
    Ok(events)
}

fn grpc_a_slow_call_is_awaiting() -> Result<()> {
    serving("0")?.with_clients(async |pod| {
        let channel = endpoint(pod)?.connect().await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        let calling = tokio::spawn(wait(channel, "4000"));
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
        drain.is_held().await?;
        ensure!(timeout(TIMEOUT, calling).await??? == "done");
        has_row(
            "HTTP/2, gRPC: a request unanswered, nothing else said",
            Awaiting,
            &Effect::Held,
        )
    })
}

fn grpc_a_slow_call_looks_idle_after_a_ping_of_the_client() -> Result<()> {
    serving("0")?.with_clients(async |pod| {
        let pinging = endpoint(pod)?.http2_keep_alive_interval(Duration::from_millis(1500));
        let channel = pinging.connect().await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        let calling = tokio::spawn(wait(channel, "6000"));
        pod.becomes_after(Idle, &[Active, Awaiting]).await?;
        // The pod sent last, because it answered the ping.
        pod.drain(until_idle()).await.drained(1).await?;
        ensure!(!calling.is_finished(), "answered");
        ensure!(timeout(TIMEOUT, calling).await??? == "done");
        has_row(
            "HTTP/2, gRPC: a request unanswered, pings of the client further apart than `idle-after`",
            Idle,
            &Effect::Lost("`idle-after` above the interval of pings"),
        )
    })
}

fn grpc_a_stream_that_pauses_looks_idle_unless_idle_after_is_longer() -> Result<()> {
    serving("0")?.with_clients(async |pod| {
        let channel = endpoint(pod)?.connect().await?;
        let watching = tokio::spawn(watch(channel.clone(), "2500"));
        pod.drain(until_idle()).await.drained(1).await?;
        ensure!(!watching.is_finished());
        let longer = Policy {
            idle_after: Duration::from_secs(4),
            ..until_idle()
        };
        let drain = pod.drain(longer).await;
        ensure!(timeout(TIMEOUT, watching).await???.len() == 3);
        drain.is_held().await?;
        has_row(
            "An answer in pieces, a pause above `idle-after`",
            Idle,
            &Effect::Lost("`idle-after` above the longest pause"),
        )
    })
}

fn grpc_a_connection_looks_idle_after_an_answer_even_with_another_call_open() -> Result<()> {
    serving("0")?.with_clients(async |pod| {
        let (channel, socket) = connected(pod).await?;
        for _ in 0..2 {
            ensure!(wait(channel.clone(), "0").await? == "done");
        }
        pod.becomes_after(Idle, &[Active, Awaiting]).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        has_row(
            "HTTP/2, gRPC: nothing under way, no pings of the server",
            Idle,
            &Effect::CutHarmlessly,
        )?;
        let calling = tokio::spawn(wait(channel.clone(), "4000"));
        tokio::time::sleep(Duration::from_millis(200)).await;
        ensure!(wait(channel, "0").await? == "done");
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        ensure!(!calling.is_finished(), "answered");
        ensure!(timeout(TIMEOUT, calling).await??? == "done");
        end(&socket)?;
        has_row(
            "HTTP/2, gRPC: a request unanswered beside an answered one",
            Idle,
            &Effect::Lost("`idle-after` above the longest answer"),
        )
    })
}

fn grpc_a_connection_with_frequent_pings_is_active() -> Result<()> {
    serving("0")?.with_clients(async |pod| {
        let pinging = endpoint(pod)?
            .http2_keep_alive_interval(Duration::from_millis(100))
            .keep_alive_while_idle(true);
        let (channel, socket) = connected_by(pod, &pinging).await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        // Long, because a busy machine makes intervals longer.
        let longer = Policy {
            idle_after: Duration::from_secs(2),
            ..until_idle()
        };
        let drain = pod.drain(longer).await;
        drain.stays_held(Duration::from_millis(3000)).await?;
        pod.is_active().await?;
        drop(channel);
        end(&socket)?;
        drain.drained(0).await?;
        has_row(
            "WebSocket, HTTP/2, gRPC: pings more frequent than `idle-after`, whatever is open",
            Active,
            &Effect::Held,
        )
    })
}

fn grpc_a_connection_is_awaiting_after_a_ping_of_the_server() -> Result<()> {
    serving("1500")?.with_clients(async |pod| {
        let (channel, socket) = connected(pod).await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        pod.becomes_after(Awaiting, &[Active, Idle]).await?;
        let drain = pod.drain(until_idle()).await;
        // No call is open, but ebb can't see that in the bytes.
        drain.stays_held(Duration::from_millis(4000)).await?;
        drop(channel);
        // A channel that is dropped does not always close its connection.
        end(&socket)?;
        drain.drained(0).await?;
        has_row(
            "WebSocket, HTTP/2, gRPC: after a ping of the server, whatever is open",
            Awaiting,
            &Effect::Held,
        )
    })
}
