//! The CRI proxy: it stands between the kubelet and the container runtime, and can hold the stop of a pod.
//!
//! ```text
//!  kubelet ══ HTTP/2 ══► connection ══ HTTP/2 ══► upstream: the runtime
//!                            │
//!              StopContainer, StopPodSandbox only
//!                            │
//!                       hold_client ── HTTP/1 ──► agent: hold? until when?
//! ```
//!
//! It forwards every call frame by frame, with its headers and trailers, without decoding it, so it also forwards
//! methods of later CRI versions. It reads only the requests of the two stop calls, and asks the agent whether to
//! hold them. Of a held call it reduces the timeout in the message and `grpc-timeout` in the headers by the time of
//! the hold, and changes nothing else.
//!
//! Each client connection has its own connection to the runtime, and each stream its own flow control, so that
//! neither clients nor streams delay each other.
//!
//! On any failure the proxy forwards the call: see `hold_client`.
//!
//! A proxy that must stop forwards held calls at once. Forwarded calls must get their answers, because when
//! StopContainer fails, the kubelet calls StopPodSandbox, which kills the containers. So the proxy stops in two
//! steps:
//!
//! ```text
//!  serving ── SIGTERM ──► leaving ── all answered, or `stop_within` ──► closing ── 1.5 s ──► gone
//!                         forwards held calls, holds no new ones,         GOAWAY
//!                         and serves all calls, on new connections too
//! ```

mod agent_stops;
mod body;
mod bypass_report;
mod cli;
mod connection;
mod grpc;
mod hold_client;
mod http2_limits;
mod metrics;
mod stop;
mod upstream;

use std::{path::PathBuf, sync::Arc, time::Duration};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixStream, unix::SocketAddr},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

pub use self::cli::{OwnSocket, ProxyCli};
use self::{connection::ClientConnection, hold_client::HoldClient, metrics::ProxyCounters};

/// Pause after an accept that failed, usually because no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The time between log lines about failing accepts.
const WARN_AGAIN: Duration = Duration::from_secs(60);

/// The proxy's sockets and time limits.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// The container runtime's socket.
    pub runtime: PathBuf,
    /// The agent's socket. Without an agent the proxy forwards all calls.
    pub agent: PathBuf,
    /// How long a call waits for the next agent after one has stopped. With zero the proxy forwards it at once.
    pub agent_restart_within: Duration,
    /// How long a stopping proxy goes on serving until forwarded calls are answered: stops, image pulls, and calls
    /// with a `grpc-timeout`.
    pub stop_within: Duration,
    /// How long the calls that are open after that, such as event streams, may take to end. Then the proxy cuts them
    /// off: callers get UNAVAILABLE, and the runtime sees them cancelled.
    pub closing_grace: Duration,
}

impl ProxyOptions {
    /// Options for a proxy in front of `runtime` that asks `agent`.
    pub fn new(runtime: impl Into<PathBuf>, agent: impl Into<PathBuf>) -> Self {
        Self {
            runtime: runtime.into(),
            agent: agent.into(),
            agent_restart_within: Duration::from_secs(10),
            stop_within: Duration::from_secs(60),
            closing_grace: Duration::from_millis(1500),
        }
    }
}

/// Serves the CRI on `listener` until `shutdown` is cancelled. Then it forwards held calls at once and goes on
/// serving, without holding, until all forwarded calls are answered or [`ProxyOptions::stop_within`] has passed.
/// Then it accepts no connections, sends GOAWAY to its clients, and returns when the last call has ended or
/// [`ProxyOptions::closing_grace`] has passed.
///
/// Never fails: an error concerns one call or one connection, and is logged.
pub async fn serve(listener: UnixListener, options: ProxyOptions, shutdown: CancellationToken) {
    let counters = ProxyCounters::default();
    let holds = HoldClient::new(
        &options.agent,
        options.agent_restart_within,
        shutdown.clone(),
        counters.clone(),
    );
    let mut connections = JoinSet::new();
    let unanswered = TaskTracker::new();
    let closing = CancellationToken::new();
    let mut answered = std::pin::pin!(answered(&unanswered, options.stop_within, &shutdown));
    info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = %listener.local_addr().map_or_else(|e| e.to_string(), socket_name),
        runtime = %options.runtime.display(),
        agent = %options.agent.display(),
        agent_restart_within = ?options.agent_restart_within,
        stop_within = ?options.stop_within,
        "the CRI proxy is serving"
    );
    let mut warned: Option<Instant> = None;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let calls = ClientConnection::new(
                        options.runtime.clone(), holds.clone(), unanswered.clone(), counters.clone(),
                    );
                    connections.spawn(serve_connection(
                        stream, Arc::new(calls), options.closing_grace, closing.clone(),
                    ));
                }
                Err(error) => {
                    if warned.is_none_or(|at| at.elapsed() > WARN_AGAIN) {
                        warn!(%error, "can't accept a connection");
                        warned = Some(Instant::now());
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = &mut answered => break,
        }
    }
    closing.cancel();
    // From here on the kernel refuses new clients, or queues them if systemd keeps the socket.
    drop(listener);
    while connections.join_next().await.is_some() {}
    info!("the CRI proxy has stopped");
}

fn socket_name(address: SocketAddr) -> String {
    let path = address.as_pathname();
    path.map_or_else(
        || "a socket without a path".into(),
        |p| p.display().to_string(),
    )
}

/// Returns after `shutdown`, when all calls are answered or `within` has passed.
async fn answered(unanswered: &TaskTracker, within: Duration, shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    unanswered.close();
    if !unanswered.is_empty() {
        info!(calls = unanswered.len(), longest = ?within, "stopping: waiting for answers");
    }
    if timeout(within, unanswered.wait()).await.is_err() {
        warn!(
            calls = unanswered.len(),
            "stopping without the answers of some calls"
        );
    }
}

/// Serves one client connection to its end.
async fn serve_connection(
    stream: UnixStream,
    calls: Arc<ClientConnection>,
    grace: Duration,
    closing: CancellationToken,
) {
    let service = service_fn(move |request| {
        let calls = Arc::clone(&calls);
        async move { calls.call(request).await }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(http2_limits::STREAM_WINDOW)
        .initial_connection_window_size(http2_limits::CONNECTION_WINDOW)
        .max_concurrent_streams(http2_limits::STREAMS)
        .max_pending_accept_reset_streams(http2_limits::STREAMS_USIZE)
        .max_local_error_reset_streams(None)
        .max_header_list_size(http2_limits::HEADER_LIST)
        // Add no header to the runtime's.
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
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
