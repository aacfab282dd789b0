//! The connection to the container runtime behind one client connection.

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

use super::{
    body::{ReplyBody, RequestBody, is_reset},
    grpc, tuning,
};

/// The first pause after a failed connect, and the longest. During a pause calls fail at once, as they do
/// in a gRPC client; short enough for a runtime that is back to be noticed before the next Status call.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A connection to the runtime: made when it is first needed and again when it broke.
#[derive(Debug)]
pub(super) struct Runtime {
    socket: PathBuf,
    /// Locked while connecting, never during a call.
    link: Mutex<Link>,
}

#[derive(Debug, Default)]
struct Link {
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

/// Why there is no connection, as told to the caller.
#[derive(Debug, thiserror::Error)]
#[error("ebb can't reach the container runtime at {socket}: {why}")]
struct Unreachable {
    socket: String,
    why: String,
}

impl Runtime {
    /// The runtime that listens at `socket`. Does not connect yet.
    pub(super) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            link: Mutex::default(),
        }
    }

    /// Forwards a call and returns the beginning of its reply. Fails only where the runtime reset this
    /// one stream, with the error that makes hyper reset the caller's stream for the same reason; a runtime
    /// that is away is an UNAVAILABLE reply.
    ///
    /// Dropping the future, or the body of its reply, cancels the call at the runtime.
    pub(super) async fn call(
        &self,
        mut request: Request<RequestBody>,
    ) -> Result<Response<ReplyBody>, hyper::Error> {
        if request.uri().authority().is_none() {
            // Legal in HTTP/2 and kept that way: h2 insists on an authority, except for requests that
            // came as HTTP/1.
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
                    // Not a byte of it was sent: the connection was closing. Another one will do.
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
        let mut link = self.link.lock().await;
        if let Some(sender) = link.sender.as_ref().filter(|s| !s.is_closed()) {
            return Ok(sender.clone());
        }
        link.sender = None;
        if let Some(failed) = &link.failed
            && failed.at.elapsed() < failed.pause
        {
            return Err(self.unreachable(failed.why.clone()));
        }
        match self.connect().await {
            Ok(sender) => {
                if link.failed.take().is_some() {
                    debug!(socket = %self.socket.display(), "the container runtime is back");
                }
                link.sender = Some(sender.clone());
                Ok(sender)
            }
            Err(error) => {
                let pause = link
                    .failed
                    .as_ref()
                    .map_or(FIRST_PAUSE, |f| (f.pause * 2).min(LONGEST_PAUSE));
                if link.failed.is_none() {
                    warn!(socket = %self.socket.display(), %error, "can't reach the container runtime");
                }
                let why = error.to_string();
                link.failed = Some(Failed {
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
            .initial_stream_window_size(tuning::STREAM_WINDOW)
            .initial_connection_window_size(tuning::CONNECTION_WINDOW)
            .initial_max_send_streams(tuning::STREAMS_USIZE)
            .max_header_list_size(tuning::HEADER_LIST)
            .max_concurrent_reset_streams(tuning::STREAMS_USIZE)
            .max_local_error_reset_streams(None)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // Ends when the last handle to it is gone, or the runtime is; calls learn that by themselves.
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
    async fn a_runtime_that_is_away_is_tried_a_few_times_a_second_however_often_it_is_called() {
        let runtime = Runtime::new("/nowhere/runtime.sock".into());
        let started = Instant::now();
        let mut tries = Vec::new();
        while started.elapsed() < Duration::from_millis(1500) {
            assert!(runtime.sender().await.is_err());
            let link = runtime.link.lock().await;
            let at = link.failed.as_ref().map(|failed| failed.at);
            if tries.last() != Some(&at) {
                tries.push(at);
            }
            drop(link);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // At 0, 20, 60, 140, 300, 620 and 1,120 ms.
        assert!((3..=7).contains(&tries.len()), "{} tries", tries.len());
    }
}
