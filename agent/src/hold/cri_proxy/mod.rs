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
//!
//! A proxy that is told to stop has two things to be careful of. What it holds must go on at once; and a
//! call that it has forwarded must get its answer, since to the kubelet a StopContainer that fails is the
//! reason to call StopPodSandbox, which kills. So it goes in two steps:
//!
//! ```text
//!  serving ── SIGTERM ──► passing ── all answered, or `answer_within` ──► closing ── 1.5 s ──► gone
//!                         forwards what it holds, holds nothing,          GOAWAY
//!                         and serves all calls, on new connections too
//! ```

mod allowance;
mod body;
mod gate;
mod grpc;
mod notices;
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
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

use self::{gate::Gate, session::Session};
use crate::api::client::AgentClient;

/// Pause after an accept that failed, which is most often for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often that is told while it lasts.
const COMPLAIN_AGAIN: Duration = Duration::from_secs(60);

/// What the proxy stands between, and how it ends.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// The container runtime's socket.
    pub runtime: PathBuf,
    /// The agent's socket. Nobody needs to listen there.
    pub agent: PathBuf,
    /// How long a call that is held waits for the next agent when the one that holds it is stopped. Zero: not at all.
    pub agent_restart_within: Duration,
    /// How long a proxy that is being stopped serves on for the sake of calls that it has forwarded and
    /// that are going to end by themselves: stops, image pulls, and all that came with a `grpc-timeout`.
    pub answer_within: Duration,
    /// How long what is then still under way, such as a stream of events, may take to end. The rest is cut
    /// off: the callers get UNAVAILABLE and the runtime sees them cancelled.
    pub closing_grace: Duration,
}

impl ProxyOptions {
    /// Options for a proxy in front of `runtime` that asks `agent`.
    pub fn new(runtime: impl Into<PathBuf>, agent: impl Into<PathBuf>) -> Self {
        Self {
            runtime: runtime.into(),
            agent: agent.into(),
            agent_restart_within: Duration::from_secs(10),
            answer_within: Duration::from_secs(60),
            closing_grace: Duration::from_millis(1500),
        }
    }
}

/// Serves the CRI on `listener` until `shutdown` is cancelled. Then it forwards what it holds at once, and
/// serves on, without holding, until the calls that it has forwarded are answered, or for
/// [`ProxyOptions::answer_within`]. Then it accepts no more, tells its clients to go (GOAWAY), and returns
/// when the last call has ended or [`ProxyOptions::closing_grace`] has passed.
///
/// Never fails: what can go wrong goes wrong for one call or one connection, and is logged.
pub async fn serve(listener: UnixListener, options: ProxyOptions, shutdown: CancellationToken) {
    let gate = Gate {
        agent: AgentClient::new(&options.agent),
        restart_within: options.agent_restart_within,
        shutdown: shutdown.clone(),
    };
    let mut connections = JoinSet::new();
    let unanswered = TaskTracker::new();
    let closing = CancellationToken::new();
    let mut answered = std::pin::pin!(answered(&unanswered, options.answer_within, &shutdown));
    info!(
        runtime = %options.runtime.display(), agent = %options.agent.display(),
        "the CRI proxy is serving"
    );
    let mut complained: Option<Instant> = None;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let session =
                        Session::new(options.runtime.clone(), gate.clone(), unanswered.clone());
                    connections.spawn(connection(
                        stream, Arc::new(session), options.closing_grace, closing.clone(),
                    ));
                }
                Err(error) => {
                    if complained.is_none_or(|at| at.elapsed() > COMPLAIN_AGAIN) {
                        warn!(%error, "can't accept a connection");
                        complained = Some(Instant::now());
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = &mut answered => break,
        }
    }
    closing.cancel();
    // New clients are refused, or wait in the socket's queue if systemd has it, from here on.
    drop(listener);
    while connections.join_next().await.is_some() {}
    info!("the CRI proxy has stopped");
}

/// Ends when the proxy is to stop and nobody waits for an answer any more, or has waited too long.
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
async fn connection(
    stream: UnixStream,
    session: Arc<Session>,
    grace: Duration,
    closing: CancellationToken,
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
