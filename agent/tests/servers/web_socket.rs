//! WebSocket: messages either way, and pings.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::policy::Policy,
    flow::FlowState::{Active, Awaiting, Idle},
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async, tungstenite::Message};

use crate::{
    server,
    support::{
        drains::{IDLE_AFTER, PATIENCE, until_idle},
        pod::Pod,
        readme::{self, Fate},
    },
};

trials![
    web_socket_it_looks_idle_between_messages_and_after_pongs,
    web_socket_pings_of_the_server_make_it_awaiting,
    web_socket_frequent_pings_make_it_active,
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

/// The next text; pings on the way are answered by the library.
async fn text(socket: &mut Socket) -> Result<String> {
    loop {
        let message = timeout(PATIENCE, socket.next()).await?;
        if let Message::Text(text) = message.context("the end")?? {
            return Ok(text.to_string());
        }
    }
}

fn web_socket_it_looks_idle_between_messages_and_after_pongs() -> Result<()> {
    serving("0")?.meet(async |pod| {
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
        let pong = timeout(PATIENCE, socket.next())
            .await?
            .context("the end")??;
        ensure!(pong.is_pong());
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        readme::says(
            "WebSocket: between messages, or pings of the client, further apart than `idle-after`",
            Idle,
            &Fate::Lost("`idle-after` above the interval"),
        )
    })
}

fn web_socket_pings_of_the_server_make_it_awaiting() -> Result<()> {
    serving("1500")?.meet(async |pod| {
        let mut socket = open(pod).await?;
        let answering = tokio::spawn(async move { text(&mut socket).await });
        // The first is at once.
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        drain.stays_held(Duration::from_millis(4000)).await?;
        ensure!(!answering.is_finished());
        readme::says(
            "WebSocket, HTTP/2, gRPC: after a ping of the server, whatever is open",
            Awaiting,
            &Fate::Held,
        )
    })
}

fn web_socket_frequent_pings_make_it_active() -> Result<()> {
    serving("0")?.meet(async |pod| {
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
        // Wide, since a busy machine makes intervals longer.
        let wide = Policy {
            idle_after: Duration::from_secs(2),
            ..until_idle()
        };
        let drain = pod.drain(wide).await;
        drain.stays_held(Duration::from_millis(3000)).await?;
        pod.is_active().await?;
        pinging.abort();
        drain.over().await?;
        readme::says(
            "WebSocket, HTTP/2, gRPC: pings more frequent than `idle-after`, whatever is open",
            Active,
            &Fate::Held,
        )
    })
}
