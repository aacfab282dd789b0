//! WebSocket: messages in both directions, and pings.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebb_core::{
    flow::FlowState::{Active, Awaiting, Idle},
    policy::Policy,
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async, tungstenite::Message};

use crate::{
    server,
    support::{
        drains::{IDLE_AFTER, TIMEOUT, until_idle},
        pod::Pod,
        until_table::{Effect, has_row},
    },
};

ebb_testkit::trials![
    web_socket_a_connection_looks_idle_between_messages_and_after_pongs,
    web_socket_a_connection_is_awaiting_after_a_ping_of_the_server,
    web_socket_a_connection_with_frequent_pings_is_active,
];

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(pod: &Pod) -> Result<Socket> {
    Ok(connect_async(format!("ws://{}/", pod.at(8080))).await?.0)
}

fn serving(ping_every: &str) -> Result<Pod> {
    let mut pod = Pod::new()?;
    pod.start_own(server::WEB_SOCKET, &[ping_every], 8080)?;
    Ok(pod)
}

/// The next text. The library answers pings meanwhile.
async fn text(socket: &mut Socket) -> Result<String> {
    loop {
        let message = timeout(TIMEOUT, socket.next()).await?;
        if let Message::Text(text) = message.context("the end")?? {
            return Ok(text.to_string());
        }
    }
}

fn web_socket_a_connection_looks_idle_between_messages_and_after_pongs() -> Result<()> {
    serving("0")?.with_clients(async |pod| {
        let mut socket = open(pod).await?;
        pod.is_active().await?;
        pod.becomes(Idle).await?;

        socket.send(Message::text("slow")).await?;
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
        drain.is_held().await?;
        ensure!(text(&mut socket).await? == "slow");
        pod.becomes(Idle).await?;
        drain.drained(1).await?;

        socket.send(Message::Ping(vec![].into())).await?;
        let pong = timeout(TIMEOUT, socket.next())
            .await?
            .context("the end")??;
        ensure!(pong.is_pong());
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        has_row(
            "WebSocket: between messages, or pings of the client, further apart than `idle-after`",
            Idle,
            &Effect::Lost("`idle-after` above the interval"),
        )
    })
}

fn web_socket_a_connection_is_awaiting_after_a_ping_of_the_server() -> Result<()> {
    serving("1500")?.with_clients(async |pod| {
        let mut socket = open(pod).await?;
        let answering = tokio::spawn(async move { text(&mut socket).await });
        // The server sends the first ping at once.
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        drain.stays_held(Duration::from_millis(4000)).await?;
        ensure!(!answering.is_finished());
        has_row(
            "WebSocket, HTTP/2, gRPC: after a ping of the server, whatever is open",
            Awaiting,
            &Effect::Held,
        )
    })
}

fn web_socket_a_connection_with_frequent_pings_is_active() -> Result<()> {
    serving("0")?.with_clients(async |pod| {
        let socket = open(pod).await?;
        let (mut to, mut from) = socket.split();
        tokio::spawn(async move { while from.next().await.is_some() {} });
        let pinging = tokio::spawn(async move {
            loop {
                to.send(Message::Ping(vec![].into())).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            #[expect(unreachable_code, reason = "says of which type the result is")]
            anyhow::Ok(())
        });
        // Long, because a busy machine makes intervals longer.
        let longer = Policy {
            idle_after: Duration::from_secs(2),
            ..until_idle()
        };
        let drain = pod.drain(longer).await;
        drain.stays_held(Duration::from_millis(3000)).await?;
        pod.is_active().await?;
        pinging.abort();
        drain.released().await?;
        has_row(
            "WebSocket, HTTP/2, gRPC: pings more frequent than `idle-after`, whatever is open",
            Active,
            &Effect::Held,
        )
    })
}
