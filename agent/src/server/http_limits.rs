//! HTTP/1.1 for untrusted callers: one small request per connection, within limits.
//!
//! A connection whose request has not arrived costs a descriptor and a little memory, so their number is limited, per
//! caller and in all. Over a caller's limit, its oldest one is closed. Over the limit of all, the oldest one of the caller
//! with most is closed. So a caller that sends its request at once is answered, however many others send nothing.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{Request, StatusCode},
    response::{IntoResponse as _, Response},
};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpStream, sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::peer_identity::Endpoints;
use crate::linux::sync::lock;

/// How long the head of a request may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How large the request line and headers may be; a kubelet's have 200 bytes.
const HEAD_SIZE: usize = 8 * 1024;

/// How many headers a request may have.
const HEADERS: usize = 64;

/// How long a caller may take to receive its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait after `accept` has failed, because descriptors have run out.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// How many connections may be waiting for their request.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingLimits {
    /// From one address.
    pub(super) each: usize,
    /// From all addresses.
    pub(super) all: usize,
}

/// Limits the connections of one listener whose request has not arrived.
#[derive(Debug)]
pub(super) struct ConnectionLimiter {
    limits: PendingLimits,
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    last: u64,
    /// Oldest first.
    connections: BTreeMap<u64, (IpAddr, CancellationToken)>,
    callers: HashMap<IpAddr, usize>,
}

impl Pending {
    fn remove(&mut self, id: u64) -> Option<CancellationToken> {
        let (caller, closed) = self.connections.remove(&id)?;
        if let Some(n) = self.callers.get_mut(&caller) {
            *n -= 1;
            if *n == 0 {
                self.callers.remove(&caller);
            }
        }
        Some(closed)
    }

    fn oldest_of(&self, caller: IpAddr) -> Option<u64> {
        let mut connections = self.connections.iter();
        connections
            .find(|(_, (of, _))| *of == caller)
            .map(|(id, _)| *id)
    }

    /// The connection to close if there are too many: this caller's oldest, or the oldest of the caller with most.
    fn surplus(&self, caller: IpAddr, limits: PendingLimits) -> Option<u64> {
        if self.callers.get(&caller).is_some_and(|n| *n > limits.each) {
            return self.oldest_of(caller);
        }
        if self.connections.len() <= limits.all {
            return None;
        }
        let (most, _) = self.callers.iter().max_by_key(|(_, n)| **n)?;
        self.oldest_of(*most)
    }
}

impl ConnectionLimiter {
    pub(super) fn new(limits: PendingLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            pending: Mutex::default(),
        })
    }

    /// Admits a connection, and closes one if there are too many.
    fn admit(self: &Arc<Self>, caller: IpAddr) -> Slot {
        let closed = CancellationToken::new();
        let mut pending = self.lock();
        pending.last += 1;
        let id = pending.last;
        pending.connections.insert(id, (caller, closed.clone()));
        *pending.callers.entry(caller).or_default() += 1;
        let surplus = pending.surplus(caller, self.limits);
        if let Some(closed) = surplus.and_then(|id| pending.remove(id)) {
            closed.cancel();
        }
        Slot {
            limiter: Arc::clone(self),
            id,
            closed,
            has_request: AtomicBool::new(false),
            answered: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        // Nothing panics between the steps of a change.
        lock(&self.pending)
    }
}

/// An admitted connection.
#[derive(Debug)]
struct Slot {
    limiter: Arc<ConnectionLimiter>,
    id: u64,
    /// Cancelled to close the connection.
    closed: CancellationToken,
    has_request: AtomicBool,
    answered: Notify,
}

impl Slot {
    fn request_arrived(&self) {
        self.has_request.store(true, Ordering::Relaxed);
        self.limiter.lock().remove(self.id);
    }

    /// Ends when the connection must be closed: its request has not arrived and the limiter or `stop` ends it, or the
    /// caller does not read the answer in time.
    async fn over(&self, stop: &CancellationToken) {
        let pending = async {
            tokio::select! {
                () = self.closed.cancelled() => {}
                () = stop.cancelled() => {}
            }
            if self.has_request.load(Ordering::Relaxed) {
                std::future::pending().await
            }
        };
        let unread = async {
            self.answered.notified().await;
            sleep(ANSWER_TIMEOUT).await;
        };
        tokio::select! {
            () = pending => {}
            () = unread => {}
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.limiter.lock().remove(self.id);
    }
}

/// Serves one request of a connection. A request that has arrived is answered even after `stop`.
pub(super) async fn serve(
    stream: TcpStream,
    remote: SocketAddr,
    limiter: &Arc<ConnectionLimiter>,
    router: Router,
    stop: &CancellationToken,
) {
    let ends = Endpoints::new(remote, stream.local_addr().ok());
    let slot = limiter.admit(ends.remote.ip());
    let service = service_fn(|request: Request<Incoming>| {
        slot.request_arrived();
        let router = router.clone();
        let slot = &slot;
        async move {
            let answer = answer(router, request, ends).await;
            slot.answered.notify_one();
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_SIZE)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // An error concerns only this connection.
        _ = connection => {}
        () = slot.over(stop) => {}
    }
}

async fn answer(router: Router, mut request: Request<Incoming>, ends: Endpoints) -> Response {
    if !request.body().is_end_stream() {
        return (
            StatusCode::PAYLOAD_TOO_LARGE,
            "the request must not have a body\n",
        )
            .into_response();
    }
    request.extensions_mut().insert(ConnectInfo(ends));
    match router.oneshot(request.map(Body::new)).await {
        Ok(answer) => answer,
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));
    const C: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 3));

    #[test]
    fn a_caller_over_its_limit_loses_its_oldest_connection() {
        let limiter = ConnectionLimiter::new(PendingLimits { each: 2, all: 100 });
        let other = limiter.admit(B);
        let own = [limiter.admit(A), limiter.admit(A), limiter.admit(A)];
        assert!(own[0].closed.is_cancelled());
        assert!(
            [&own[1], &own[2], &other]
                .iter()
                .all(|e| !e.closed.is_cancelled())
        );
    }

    #[test]
    fn over_the_limit_of_all_the_caller_with_most_loses_its_oldest_connection() {
        let limiter = ConnectionLimiter::new(PendingLimits { each: 3, all: 4 });
        let a = [limiter.admit(A), limiter.admit(A), limiter.admit(A)];
        let b = limiter.admit(B);
        let c = limiter.admit(C);
        assert!(a[0].closed.is_cancelled());
        assert!(!b.closed.is_cancelled() && !c.closed.is_cancelled());
    }

    #[test]
    fn a_connection_whose_request_has_arrived_is_neither_counted_nor_closed() {
        let limiter = ConnectionLimiter::new(PendingLimits { each: 1, all: 1 });
        let arrived = limiter.admit(A);
        arrived.request_arrived();
        let pending = limiter.admit(A);
        assert!(!arrived.closed.is_cancelled() && !pending.closed.is_cancelled());
        drop((arrived, pending));
        assert!(limiter.lock().connections.is_empty() && limiter.lock().callers.is_empty());
    }

    /// The answer of a server with these limits.
    async fn answer_to(request: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let limiter = ConnectionLimiter::new(PendingLimits { each: 4, all: 4 });
            let (stream, remote) = listener.accept().await.unwrap();
            let router = Router::new().route("/", get(async || "hello"));
            serve(stream, remote, &limiter, router, &CancellationToken::new()).await;
        });
        let mut caller = TcpStream::connect(address).await.unwrap();
        caller.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // The server may also reset the connection.
        let _ = caller.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn one_request_is_answered_and_then_the_connection_is_closed() {
        let answer = answer_to(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
            "{answer}"
        );
    }

    #[tokio::test]
    async fn bodies_and_large_heads_are_refused() {
        let body = answer_to(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n").await;
        assert!(body.starts_with("HTTP/1.1 413"), "{body}");
        let long = format!(
            "GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
            "y".repeat(HEAD_SIZE)
        );
        let large = answer_to(long.as_bytes()).await;
        assert!(large.starts_with("HTTP/1.1 431"), "{large}");
    }
}
