//! A small HTTP/1.1 client that recognises truncated replies.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// How long a connect may take: Envoy's default. The kernel retries for two minutes if an address does not answer.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

const CUT: &str = "closed before the end";

/// Why a request failed. The text is short and without addresses, so that equal failures can be counted together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure(pub String);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    fn of(error: &(dyn std::error::Error + 'static), doing: &str) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(io) = error.downcast_ref::<io::Error>()
                && io.kind() != io::ErrorKind::UnexpectedEof
            {
                return Self(format!("{doing}: {}", io.kind()));
            }
            if let Some(hyper) = error.downcast_ref::<hyper::Error>()
                && (hyper.is_incomplete_message() || hyper.is_closed() || hyper.is_canceled())
            {
                return Self(format!("{doing}: {CUT}"));
            }
            if error.is::<io::Error>() {
                return Self(format!("{doing}: {CUT}"));
            }
            cause = error.source();
        }
        Self(format!("{doing}: {error}"))
    }
}

/// A whole reply.
#[derive(Debug, Clone)]
pub struct HttpReply {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// An open connection, closed when dropped.
#[derive(Debug)]
pub struct HttpConnection {
    host: String,
    sender: SendRequest<Empty<Bytes>>,
}

impl HttpConnection {
    /// Connects.
    ///
    /// # Errors
    /// If the connection is refused or not established within five seconds.
    pub async fn open(address: SocketAddr) -> Result<Self, Failure> {
        let stream = timeout(CONNECT_WITHIN, TcpStream::connect(address)).await;
        let stream = stream.map_err(|_| Failure("connect: timed out".into()))?;
        let stream = stream.map_err(|error| Failure::of(&error, "connect"))?;
        let (sender, driver) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Failure::of(&error, "connect"))?;
        tokio::spawn(driver);
        Ok(Self {
            host: address.to_string(),
            sender,
        })
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a GET and reads the whole reply.
    ///
    /// # Errors
    /// If the connection ends before the reply. A status of 500 or above is a failure, too.
    pub async fn get(&mut self, path: &str) -> Result<HttpReply, Failure> {
        self.get_at(path, None).await
    }

    /// Sends a GET and reads the reply no faster than `rate` bytes per second.
    ///
    /// # Errors
    /// As for [`Self::get`].
    pub async fn get_at(&mut self, path: &str, rate: Option<u64>) -> Result<HttpReply, Failure> {
        let request = Request::get(path)
            .header(http::header::HOST, &self.host)
            .body(Empty::new());
        let request = request.map_err(|error| Failure(format!("request: {error}")))?;
        // Fails if the server closed the idle connection.
        self.sender
            .ready()
            .await
            .map_err(|error| Failure::of(&error, "request"))?;
        let reply = self
            .sender
            .send_request(request)
            .await
            .map_err(|error| Failure::of(&error, "reply"))?;
        let (head, mut incoming) = reply.into_parts();
        let started = Instant::now();
        let mut body = Vec::new();
        while let Some(frame) = incoming.frame().await {
            let frame = frame.map_err(|error| Failure::of(&error, "reply"))?;
            body.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
            if let Some(rate) = rate {
                let due = Duration::from_millis(body.len() as u64 * 1000 / rate.max(1));
                sleep(due.saturating_sub(started.elapsed())).await;
            }
        }
        if head.status.is_server_error() {
            return Err(Failure(format!("reply: {}", head.status.as_u16())));
        }
        Ok(HttpReply {
            status: head.status,
            body: body.into(),
        })
    }
}

/// One GET on a connection of its own.
///
/// # Errors
/// As for [`HttpConnection::open`] and [`HttpConnection::get`].
pub async fn get(address: SocketAddr, path: &str) -> Result<HttpReply, Failure> {
    HttpConnection::open(address).await?.get(path).await
}

/// Waits until a server listens at `address`, by connecting to it.
///
/// # Errors
/// The last attempt's error, if none succeeds within `limit`.
pub async fn until_open(address: SocketAddr, limit: Duration) -> Result<(), Failure> {
    let started = Instant::now();
    loop {
        let attempt = timeout(limit, TcpStream::connect(address)).await;
        match attempt.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(_) => return Ok(()),
            Err(error) if started.elapsed() > limit => {
                return Err(Failure(format!(
                    "no server listens at {address} after {limit:?}: {error}"
                )));
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
