//! An HTTP client that the trial controls step by step.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
    time::timeout,
};

use crate::scene::SOON;

/// An open connection to a pod, closed when dropped.
pub(crate) struct Peer {
    stream: TcpStream,
    /// Its own end: the `remote` of the pod's flow.
    pub(crate) address: SocketAddr,
}

impl Peer {
    pub(crate) async fn connect(server: SocketAddr) -> Result<Self> {
        Self::of(TcpStream::connect(server).await?)
    }

    /// Connects from this port of the node.
    pub(crate) async fn from_port(port: u16, server: SocketAddr) -> Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::UNSPECIFIED, port).into())?;
        Self::of(socket.connect(server).await?)
    }

    /// Connects with a receive buffer so small that the server soon can't send any more.
    pub(crate) async fn narrow(server: SocketAddr) -> Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(2048)?;
        Self::of(socket.connect(server).await?)
    }

    /// Connects, sends a request and reads the whole answer. The connection stays open.
    pub(crate) async fn served(server: SocketAddr) -> Result<Self> {
        let mut peer = Self::connect(server).await?;
        peer.ask("/").await?;
        peer.answer("ok\n").await?;
        Ok(peer)
    }

    /// Connects and sends a request, and does not wait for the answer.
    pub(crate) async fn asking(server: SocketAddr, path: &str) -> Result<Self> {
        let mut peer = Self::connect(server).await?;
        peer.ask(path).await?;
        Ok(peer)
    }

    fn of(stream: TcpStream) -> Result<Self> {
        let address = stream.local_addr()?;
        Ok(Self { stream, address })
    }

    pub(crate) async fn ask(&mut self, path: &str) -> Result<()> {
        self.send(&format!("GET {path} HTTP/1.1\r\n\r\n")).await
    }

    /// Sends a GET with `Connection: close`.
    pub(crate) async fn ask_and_close(&mut self, path: &str) -> Result<()> {
        self.send(&format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n"))
            .await
    }

    /// Sends this text as it is.
    pub(crate) async fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.stream.write_all(text.as_bytes()).await?)
    }

    /// Reads until the answer ends with `end`, and returns it.
    pub(crate) async fn answer(&mut self, end: &str) -> Result<String> {
        let mut got = Vec::new();
        while !got.ends_with(end.as_bytes()) {
            let mut part = [0; 4096];
            let n = timeout(SOON, self.stream.read(&mut part)).await??;
            ensure!(n > 0, "cut off after {:?}", String::from_utf8_lossy(&got));
            got.extend_from_slice(&part[..n]);
        }
        Ok(String::from_utf8(got)?)
    }

    /// Reads until the server closes, and returns the number of bytes. A reset is an error.
    pub(crate) async fn read_to_end(&mut self) -> Result<usize> {
        let mut got = Vec::new();
        let read = timeout(SOON * 2, self.stream.read_to_end(&mut got)).await;
        Ok(read.context("the connection does not end")??)
    }

    /// Closes the sending side only.
    pub(crate) async fn end_sending(&mut self) -> Result<()> {
        Ok(self.stream.shutdown().await?)
    }

    /// Closes with a reset.
    pub(crate) fn reset(self) -> Result<()> {
        let now = Some(Duration::ZERO);
        Ok(rustix::net::sockopt::set_socket_linger(&self.stream, now)?)
    }

    /// Reads in the background until the peer is dropped.
    pub(crate) fn keep_reading(self) -> ReadingPeer {
        let Self {
            mut stream,
            address,
        } = self;
        let task = tokio::spawn(async move {
            let mut part = [0; 4096];
            while stream.read(&mut part).await.is_ok_and(|n| n > 0) {}
        });
        ReadingPeer { address, task }
    }
}

/// A peer that reads in the background.
pub(crate) struct ReadingPeer {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for ReadingPeer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A server on the node that accepts connections and never answers.
pub(crate) struct SilentServer {
    pub(crate) port: u16,
    task: JoinHandle<()>,
}

impl SilentServer {
    /// Listens on all addresses of both families.
    pub(crate) async fn listen() -> Result<Self> {
        let listener = TcpListener::bind("[::]:0").await?;
        let port = listener.local_addr()?.port();
        let task = tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok(connection) = listener.accept().await {
                kept.push(connection);
            }
        });
        Ok(Self { port, task })
    }
}

impl Drop for SilentServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
