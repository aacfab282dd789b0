//! The CRI hook: a proxy between the kubelet and the container runtime that can keep a stop waiting.
//!
//! ```text
//!  kubelet ══ HTTP/2 ══► session ══ HTTP/2 ══► runtime
//!                           │
//!             StopContainer, StopPodSandbox only
//!                           │
//!                        gate ── HTTP/1 ──► agent: hold? until when?
//! ```
//!
//! Every call is forwarded frame by frame, with its headers and trailers, whether or not anybody here
//! has heard of its method; nothing is decoded. Of the two calls that stop something the request is read,
//! and the agent asked whether to hold it. What changes in a call that was held is the timeout in its
//! message and `grpc-timeout` in its headers, both by the time it was held; every byte else stays.
//!
//! One client connection has one connection to the runtime, so that clients can't delay each other, and
//! within it each stream has its own flow control, so that neither can streams.
//!
//! Whatever goes wrong, a call is forwarded: see `gate`.

mod allowance;
mod body;
mod gate;
mod grpc;
pub mod listen;
mod protobuf;
mod runtime;
mod session;
mod stop;
mod tuning;

use std::{path::PathBuf, sync::Arc, time::Duration};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::session::Session;
use crate::api::client::AgentClient;

/// Pause after an accept that failed, which is most often for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the proxy stands between, and how it ends.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// The container runtime's socket.
    pub runtime: PathBuf,
    /// The agent's socket. Nobody needs to listen there.
    pub agent: PathBuf,
    /// How long calls that are under way may still take when the proxy is stopped. The rest is cut off:
    /// the callers get UNAVAILABLE and the runtime sees them cancelled.
    pub shutdown_grace: Duration,
}

impl ProxyOptions {
    /// Options for a proxy in front of `runtime` that asks `agent`, and that ends within two seconds.
    pub fn new(runtime: impl Into<PathBuf>, agent: impl Into<PathBuf>) -> Self {
        Self {
            runtime: runtime.into(),
            agent: agent.into(),
            shutdown_grace: Duration::from_millis(1500),
        }
    }
}

/// Serves the CRI on `listener` until `shutdown` is cancelled. Then it accepts no more, forwards what it
/// holds at once, tells its clients to go (GOAWAY), and returns when the last call has ended or
/// [`ProxyOptions::shutdown_grace`] has passed.
///
/// Never fails: what can go wrong goes wrong for one call or one connection, and is logged.
pub async fn serve(listener: UnixListener, options: ProxyOptions, shutdown: CancellationToken) {
    let agent = AgentClient::new(&options.agent);
    let mut connections = JoinSet::new();
    info!(
        runtime = %options.runtime.display(), agent = %options.agent.display(),
        "the CRI proxy is serving"
    );
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let session = Session::new(options.runtime.clone(), agent.clone(), shutdown.clone());
                    connections.spawn(connection(
                        stream, Arc::new(session), options.shutdown_grace, shutdown.clone(),
                    ));
                }
                Err(error) => {
                    warn!(%error, "can't accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = shutdown.cancelled() => break,
        }
    }
    // New clients are refused, or wait in the socket's queue if systemd has it, from here on.
    drop(listener);
    while connections.join_next().await.is_some() {}
    info!("the CRI proxy has stopped");
}

/// Serves one client connection to its end.
async fn connection(
    stream: UnixStream,
    session: Arc<Session>,
    grace: Duration,
    shutdown: CancellationToken,
) {
    let service = service_fn(move |request| {
        let session = Arc::clone(&session);
        async move { session.call(request).await }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(tuning::STREAM_WINDOW)
        .initial_connection_window_size(tuning::CONNECTION_WINDOW)
        .max_concurrent_streams(tuning::STREAMS)
        .max_pending_accept_reset_streams(tuning::STREAMS_USIZE)
        .max_local_error_reset_streams(None)
        .max_header_list_size(tuning::HEADER_LIST)
        // The runtime's headers, and no others.
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            match timeout(grace, connection).await {
                Ok(ended) => ended,
                Err(_) => {
                    info!("cut off the calls that did not end in time");
                    return;
                }
            }
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a client's connection broke");
    }
}
