//! A WebSocket server that echoes each text, `slow` after 4 s. Its argument is the interval of its pings, in ms.

use std::time::Duration;

use anyhow::Result;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{interval, sleep},
};
use tokio_tungstenite::{accept_async, tungstenite::Message};

pub(super) async fn serve() -> Result<()> {
    let ping = super::argument(1);
    let listener = TcpListener::bind(("0.0.0.0", 8080)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(talk(stream, ping));
    }
}

async fn talk(stream: TcpStream, ping: u64) -> Result<()> {
    let mut socket = accept_async(stream).await?;
    let mut pings = interval(Duration::from_millis(ping.max(1)));
    loop {
        tokio::select! {
            _ = pings.tick(), if ping > 0 => socket.send(Message::Ping(vec![].into())).await?,
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => {
                    if text.as_str() == "slow" {
                        sleep(Duration::from_millis(4000)).await;
                    }
                    socket.send(Message::Text(text)).await?;
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Ok(()),
            },
        }
    }
}
