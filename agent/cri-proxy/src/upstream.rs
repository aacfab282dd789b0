//! The connection to the container runtime of one client connection.

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use http::{Request, Response, Version};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{net::UnixStream, sync::Mutex};
use tracing::{debug, warn};

use crate::{
    body::{ReplyBody, RequestBody, is_reset},
    grpc, http2_limits,
};

/// The first and the longest pause after a failed connect. During a pause calls fail at once, as in a gRPC client.
/// The longest is short enough that the next Status call reaches a runtime that is back.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A connection to the runtime. The first call makes it, and the first call after it broke makes a new one.
#[derive(Debug)]
pub(crate) struct Upstream {
    socket: PathBuf,
    /// Locked during a connect, not during calls.
    connection: Mutex<RuntimeConnection>,
}

#[derive(Debug, Default)]
struct RuntimeConnection {
    sender: Option<SendRequest<RequestBody>>,
    failed: Option<Failed>,
}

/// A connect that failed.
#[derive(Debug)]
struct Failed {
    at: Instant,
    pause: Duration,
    why: String,
}

/// Why there is no connection. The caller gets it in `grpc-message`.
#[derive(Debug, thiserror::Error)]
#[error("ebb can't reach the container runtime at {socket}: {why}")]
struct Unreachable {
    socket: String,
    why: String,
}

impl Upstream {
    /// The runtime that listens at `socket`. Does not connect yet.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            connection: Mutex::default(),
        }
    }

    /// Forwards a call and returns the head of its reply. If the runtime can't be reached, the reply is UNAVAILABLE.
    ///
    /// # Errors
    ///
    /// The runtime reset the stream. With this error hyper resets the caller's stream with the same code.
    ///
    /// Dropping the future, or the body of its reply, cancels the call at the runtime.
    pub(crate) async fn call(
        &self,
        mut request: Request<RequestBody>,
    ) -> Result<Response<ReplyBody>, hyper::Error> {
        if request.uri().authority().is_none() {
            // HTTP/2 allows a request without an authority, but h2 sends one only if its version is HTTP/1.1.
            *request.version_mut() = Version::HTTP_11;
        }
        let mut retried = false;
        loop {
            let mut sender = match self.sender().await {
                Ok(sender) => sender,
                Err(error) => return Ok(grpc::unavailable(&error.to_string(), ReplyBody::empty())),
            };
            match sender.try_send_request(request).await {
                Ok(reply) => return Ok(reply.map(ReplyBody::from_runtime)),
                Err(mut error) => match error.take_message() {
                    // The connection was closing and sent no byte of the request, so retry on a new one.
                    Some(unsent) if !retried => (request, retried) = (unsent, true),
                    _ => return self.failure(error.into_error()),
                },
            }
        }
    }

    fn failure(&self, error: hyper::Error) -> Result<Response<ReplyBody>, hyper::Error> {
        if is_reset(&error) {
            return Err(error);
        }
        debug!(%error, "lost the container runtime during a call");
        let error = self.unreachable(format!("the connection broke during the call: {error}"));
        Ok(grpc::unavailable(&error.to_string(), ReplyBody::empty()))
    }

    async fn sender(&self) -> Result<SendRequest<RequestBody>, Unreachable> {
        let mut runtime = self.connection.lock().await;
        if let Some(sender) = runtime.sender.as_ref().filter(|s| !s.is_closed()) {
            return Ok(sender.clone());
        }
        runtime.sender = None;
        if let Some(failed) = &runtime.failed
            && failed.at.elapsed() < failed.pause
        {
            return Err(self.unreachable(failed.why.clone()));
        }
        match self.connect().await {
            Ok(sender) => {
                if runtime.failed.take().is_some() {
                    debug!(socket = %self.socket.display(), "the container runtime is back");
                }
                runtime.sender = Some(sender.clone());
                Ok(sender)
            }
            Err(error) => {
                let pause = runtime
                    .failed
                    .as_ref()
                    .map_or(FIRST_PAUSE, |f| (f.pause * 2).min(LONGEST_PAUSE));
                if runtime.failed.is_none() {
                    warn!(socket = %self.socket.display(), %error, "can't reach the container runtime");
                }
                let why = error.to_string();
                runtime.failed = Some(Failed {
                    at: Instant::now(),
                    pause,
                    why: why.clone(),
                });
                Err(self.unreachable(why))
            }
        }
    }

    async fn connect(&self) -> io::Result<SendRequest<RequestBody>> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(http2_limits::STREAM_WINDOW)
            .initial_connection_window_size(http2_limits::CONNECTION_WINDOW)
            .initial_max_send_streams(http2_limits::STREAMS_USIZE)
            .max_header_list_size(http2_limits::HEADER_LIST)
            .max_concurrent_reset_streams(http2_limits::STREAMS_USIZE)
            .max_local_error_reset_streams(None)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // Ends with the last handle to it or with the runtime. Calls under way get their own errors.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(%error, "the connection to the container runtime broke");
            }
        });
        Ok(sender)
    }

    fn unreachable(&self, why: String) -> Unreachable {
        Unreachable {
            socket: self.socket.display().to_string(),
            why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_calls_to_an_absent_runtime_make_few_connects_per_second() {
        let runtime = Upstream::new("/nowhere/runtime.sock".into());
        let started = Instant::now();
        let mut tries = Vec::new();
        while started.elapsed() < Duration::from_millis(1500) {
            assert!(runtime.sender().await.is_err());
            let connection = runtime.connection.lock().await;
            let at = connection.failed.as_ref().map(|failed| failed.at);
            if tries.last() != Some(&at) {
                tries.push(at);
            }
            drop(connection);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // At 0, 20, 60, 140, 300, 620 and 1,120 ms.
        assert!((3..=7).contains(&tries.len()), "{} tries", tries.len());
    }
}
