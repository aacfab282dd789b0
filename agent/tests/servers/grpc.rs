//! gRPC: a slow call, a stream with pauses, pings.

use std::{future::ready, io, net::Shutdown, time::Duration};

use anyhow::{Result, ensure};
use ebb::{
    drain::policy::Policy,
    flow::FlowState::{Active, Awaiting, Idle},
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
        drains::{IDLE_AFTER, PATIENCE, until_idle},
        pod::Pod,
        readme::{self, Fate},
    },
};

trials![
    grpc_a_slow_call_is_awaiting,
    grpc_a_slow_call_looks_idle_after_a_ping_of_the_client,
    grpc_a_stream_that_pauses_looks_idle_unless_idle_after_is_longer,
    grpc_pings_of_the_server_make_it_awaiting,
    grpc_frequent_pings_make_it_active,
    grpc_it_looks_idle_once_answered_and_so_does_a_call_beside_an_answered_one,
];

fn serving(ping_every: &str) -> Result<Pod> {
    let mut pod = Pod::new()?;
    pod.start_own(server::GRPC, &[ping_every], 8080)?;
    Ok(pod)
}

fn endpoint(pod: &Pod) -> Result<Endpoint> {
    Ok(Endpoint::from_shared(format!("http://{}", pod.at(8080)))?)
}

/// A channel and its one connection, to end it by.
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

/// Ends a connection, if its client has not done so by itself.
fn end(socket: &std::net::TcpStream) -> io::Result<()> {
    match socket.shutdown(Shutdown::Both) {
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        ended => ended,
    }
}

/// One answer after so long.
async fn wait(channel: Channel, ms: &str) -> Result<Text> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await?;
    let path = PathAndQuery::from_static("/servers.Calls/Wait");
    let codec = ProstCodec::<Text, Text>::default();
    let answer = grpc.unary(Request::new(ms.to_owned()), path, codec).await?;
    Ok(answer.into_inner())
}

/// All events of a stream with such pauses.
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
    serving("0")?.meet(async |pod| {
        let channel = endpoint(pod)?.connect().await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        let calling = tokio::spawn(wait(channel, "4000"));
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
        drain.is_held().await?;
        ensure!(timeout(PATIENCE, calling).await??? == "done");
        readme::says(
            "HTTP/2, gRPC: a request unanswered, nothing else said",
            Awaiting,
            &Fate::Held,
        )
    })
}

fn grpc_a_slow_call_looks_idle_after_a_ping_of_the_client() -> Result<()> {
    serving("0")?.meet(async |pod| {
        let pinging = endpoint(pod)?.http2_keep_alive_interval(Duration::from_millis(1500));
        let channel = pinging.connect().await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        let calling = tokio::spawn(wait(channel, "6000"));
        pod.comes_to(Idle, &[Active, Awaiting]).await?;
        // The answer to the ping is the pod's last word.
        pod.drain(until_idle()).await.drained(1).await?;
        ensure!(!calling.is_finished(), "answered");
        ensure!(timeout(PATIENCE, calling).await??? == "done");
        readme::says(
            "HTTP/2, gRPC: a request unanswered, pings of the client further apart than `idle-after`",
            Idle,
            &Fate::Lost("`idle-after` above the interval of pings"),
        )
    })
}

fn grpc_a_stream_that_pauses_looks_idle_unless_idle_after_is_longer() -> Result<()> {
    serving("0")?.meet(async |pod| {
        let channel = endpoint(pod)?.connect().await?;
        let watching = tokio::spawn(watch(channel.clone(), "2500"));
        pod.drain(until_idle()).await.drained(1).await?;
        ensure!(!watching.is_finished());
        let patient = Policy {
            idle_after: Duration::from_secs(4),
            ..until_idle()
        };
        let drain = pod.drain(patient).await;
        ensure!(timeout(PATIENCE, watching).await???.len() == 3);
        drain.is_held().await?;
        readme::says(
            "An answer in pieces, a pause above `idle-after`",
            Idle,
            &Fate::Lost("`idle-after` above the longest pause"),
        )
    })
}

fn grpc_it_looks_idle_once_answered_and_so_does_a_call_beside_an_answered_one() -> Result<()> {
    serving("0")?.meet(async |pod| {
        let (channel, socket) = connected(pod).await?;
        for _ in 0..2 {
            ensure!(wait(channel.clone(), "0").await? == "done");
        }
        pod.comes_to(Idle, &[Active, Awaiting]).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        readme::says(
            "HTTP/2, gRPC: nothing under way, no pings of the server",
            Idle,
            &Fate::CutHarmlessly,
        )?;
        let calling = tokio::spawn(wait(channel.clone(), "4000"));
        tokio::time::sleep(Duration::from_millis(200)).await;
        ensure!(wait(channel, "0").await? == "done");
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        ensure!(!calling.is_finished(), "answered");
        ensure!(timeout(PATIENCE, calling).await??? == "done");
        end(&socket)?;
        readme::says(
            "HTTP/2, gRPC: a request unanswered beside an answered one",
            Idle,
            &Fate::Lost("`idle-after` above the longest answer"),
        )
    })
}

fn grpc_frequent_pings_make_it_active() -> Result<()> {
    serving("0")?.meet(async |pod| {
        let pinging = endpoint(pod)?
            .http2_keep_alive_interval(Duration::from_millis(100))
            .keep_alive_while_idle(true);
        let (channel, socket) = connected_by(pod, &pinging).await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        // Wide, since a busy machine makes intervals longer.
        let wide = Policy {
            idle_after: Duration::from_secs(2),
            ..until_idle()
        };
        let drain = pod.drain(wide).await;
        drain.stays_held(Duration::from_millis(3000)).await?;
        pod.is_active().await?;
        drop(channel);
        end(&socket)?;
        drain.drained(0).await?;
        readme::says(
            "WebSocket, HTTP/2, gRPC: pings more frequent than `idle-after`, whatever is open",
            Active,
            &Fate::Held,
        )
    })
}

fn grpc_pings_of_the_server_make_it_awaiting() -> Result<()> {
    serving("1500")?.meet(async |pod| {
        let (channel, socket) = connected(pod).await?;
        ensure!(wait(channel.clone(), "0").await? == "done");
        pod.comes_to(Awaiting, &[Active, Idle]).await?;
        let drain = pod.drain(until_idle()).await;
        // Nothing is under way, but bytes can't tell.
        drain.stays_held(Duration::from_millis(4000)).await?;
        drop(channel);
        // A channel that is dropped does not always close its connection.
        end(&socket)?;
        drain.drained(0).await?;
        readme::says(
            "WebSocket, HTTP/2, gRPC: after a ping of the server, whatever is open",
            Awaiting,
            &Fate::Held,
        )
    })
}
