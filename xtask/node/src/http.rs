//! A small HTTP/1.1 client that tells a whole reply from a cut one.

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

/// How long connecting may take: Envoy's default. The kernel would go on for two minutes when a pod's
/// address has gone without a word.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

const CUT: &str = "closed before the end";

/// Why a request got no whole and good reply. The text is short and free of addresses, so that equal
/// failures can be counted together.
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
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// An open connection, closed when dropped.
#[derive(Debug)]
pub struct Connection {
    host: String,
    sender: SendRequest<Empty<Bytes>>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// If the connection is refused or nobody answers within five seconds.
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
    /// If the connection ends before the reply does. A status of 500 and above is a failure too.
    pub async fn get(&mut self, path: &str) -> Result<Reply, Failure> {
        self.get_at(path, None).await
    }

    /// Sends a GET and reads the reply no faster than `rate` bytes per second.
    ///
    /// # Errors
    /// As for [`Self::get`].
    pub async fn get_at(&mut self, path: &str, rate: Option<u64>) -> Result<Reply, Failure> {
        let request = Request::get(path)
            .header(http::header::HOST, &self.host)
            .body(Empty::new());
        let request = request.map_err(|error| Failure(format!("request: {error}")))?;
        // Fails where the connection was closed while idle.
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
        Ok(Reply {
            status: head.status,
            body: body.into(),
        })
    }
}

/// One GET on a connection of its own.
///
/// # Errors
/// As for [`Connection::open`] and [`Connection::get`].
pub async fn get(address: SocketAddr, path: &str) -> Result<Reply, Failure> {
    Connection::open(address).await?.get(path).await
}

/// Waits until somebody listens at `address`. Opens connections to find out.
///
/// # Errors
/// Why the last attempt failed, if none succeeds within `limit`.
pub async fn until_open(address: SocketAddr, limit: Duration) -> Result<(), Failure> {
    let started = Instant::now();
    loop {
        let attempt = timeout(limit, TcpStream::connect(address)).await;
        match attempt.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(_) => return Ok(()),
            Err(error) if started.elapsed() > limit => {
                return Err(Failure(format!(
                    "nobody listens at {address} after {limit:?}: {error}"
                )));
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
