//! The handshake of AMQP 0-9-1, by which a client of RabbitMQ connects.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const METHOD: u8 = 1;
const FRAME_END: u8 = 0xce;

/// The class `connection` and its methods.
const CONNECTION: u16 = 10;
const START: u16 = 10;
const START_OK: u16 = 11;
const TUNE: u16 = 30;
const TUNE_OK: u16 = 31;
const OPEN: u16 = 40;
const OPEN_OK: u16 = 41;

/// An open connection, without a channel.
pub(super) struct AmqpConnection {
    stream: TcpStream,
}

impl AmqpConnection {
    /// Connects and logs in as `guest`, without heartbeats.
    pub(super) async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        let mut connection = Self { stream };
        connection.stream.write_all(b"AMQP\0\0\x09\x01").await?;
        connection.expect(START).await?;
        let properties = long(b"");
        let login = [
            properties,
            short("PLAIN"),
            long(b"\0guest\0guest"),
            short("en_US"),
        ];
        connection.send(START_OK, &login.concat()).await?;
        let mut limits = connection.expect(TUNE).await?;
        // The last of its fields is the interval of the heartbeats.
        let heartbeats = limits.len().checked_sub(2).context("a short frame")?;
        limits[heartbeats..].fill(0);
        connection.send(TUNE_OK, &limits).await?;
        connection
            .send(OPEN, &[short("/"), vec![0, 0]].concat())
            .await?;
        connection.expect(OPEN_OK).await?;
        Ok(connection)
    }

    /// Waits until the server sends something, which it does only to close an idle connection, or ends it.
    pub(super) async fn until_closed(&mut self) {
        let _ = self.stream.read_u8().await;
    }

    async fn send(&mut self, method: u16, arguments: &[u8]) -> Result<()> {
        let head = [CONNECTION.to_be_bytes(), method.to_be_bytes()].concat();
        let payload = [&head, arguments].concat();
        let size = u32::try_from(payload.len())?.to_be_bytes();
        let frame = [&[METHOD, 0, 0], &size[..], &payload, &[FRAME_END]].concat();
        Ok(self.stream.write_all(&frame).await?)
    }

    /// Reads the next frame and returns the method's arguments.
    async fn expect(&mut self, method: u16) -> Result<Vec<u8>> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head).await?;
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
        let mut payload = vec![0; usize::try_from(size)? + 1];
        self.stream.read_exact(&mut payload).await?;
        ensure!(payload.pop() == Some(FRAME_END), "not the end of a frame");
        let expected = [CONNECTION.to_be_bytes(), method.to_be_bytes()].concat();
        ensure!(
            payload.starts_with(&expected),
            "not method {method}: {payload:?}"
        );
        Ok(payload.split_off(expected.len()))
    }
}

fn short(text: &str) -> Vec<u8> {
    let size = u8::try_from(text.len()).expect("a short text");
    [&[size], text.as_bytes()].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).expect("a text");
    [&size.to_be_bytes(), bytes].concat()
}
