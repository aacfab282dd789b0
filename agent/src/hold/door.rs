//! HTTP/1.1 for callers that are not trusted: one small request a connection, and no room for dawdlers.
//!
//! A connection whose request has not arrived costs a descriptor and a little memory. There is a limit to how
//! many of those one caller may have, and all together; past it the caller's oldest is closed. So there is
//! always room for who says at once what he wants, however many others say nothing.

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

use super::caller::Ends;
use crate::lock::lock;

/// How long a request may take to arrive.
const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// How large its line and headers may be; a kubelet's have 200 bytes.
const HEAD_SIZE: usize = 8 * 1024;

/// How many headers it may have.
const HEADERS: usize = 64;

/// How long a caller may take to receive its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// How long to leave a listener alone that can't accept: descriptors have run out.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// How many connections may be without a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Of one address.
    pub(super) each: usize,
    /// Of all.
    pub(super) all: usize,
}

/// Where a listener's connections wait until they have said what they want.
#[derive(Debug)]
pub(super) struct Door {
    limits: Limits,
    silent: Mutex<Silent>,
}

#[derive(Debug, Default)]
struct Silent {
    last: u64,
    /// Oldest first.
    connections: BTreeMap<u64, (IpAddr, CancellationToken)>,
    callers: HashMap<IpAddr, usize>,
}

impl Silent {
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

    /// The connection that has to go, if one has: of the caller who has too many, else of the one with most.
    fn surplus(&self, caller: IpAddr, limits: Limits) -> Option<u64> {
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

impl Door {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            silent: Mutex::default(),
        })
    }

    /// Lets a connection in, and shows another one out if there are too many.
    fn enter(self: &Arc<Self>, caller: IpAddr) -> Entry {
        let closed = CancellationToken::new();
        let mut silent = self.lock();
        silent.last += 1;
        let id = silent.last;
        silent.connections.insert(id, (caller, closed.clone()));
        *silent.callers.entry(caller).or_default() += 1;
        let surplus = silent.surplus(caller, self.limits);
        if let Some(closed) = surplus.and_then(|id| silent.remove(id)) {
            closed.cancel();
        }
        Entry {
            door: Arc::clone(self),
            id,
            closed,
            asked: AtomicBool::new(false),
            answered: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Silent> {
        // Nothing panics between the steps of a change.
        lock(&self.silent)
    }
}

/// A connection's way through the door.
#[derive(Debug)]
struct Entry {
    door: Arc<Door>,
    id: u64,
    /// Cancelled if it has to go.
    closed: CancellationToken,
    /// Its request is here.
    asked: AtomicBool,
    answered: Notify,
}

impl Entry {
    fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
        self.door.lock().remove(self.id);
    }

    /// Ends when the connection has to go: it said nothing and others want in or the agent stops, or it does
    /// not take its answer.
    async fn over(&self, stop: &CancellationToken) {
        let silent = async {
            tokio::select! {
                () = self.closed.cancelled() => {}
                () = stop.cancelled() => {}
            }
            if self.asked.load(Ordering::Relaxed) {
                std::future::pending().await
            }
        };
        let deaf = async {
            self.answered.notified().await;
            sleep(ANSWER_WITHIN).await;
        };
        tokio::select! {
            () = silent => {}
            () = deaf => {}
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.door.lock().remove(self.id);
    }
}

/// Serves one request of a connection. When the agent stops, requests under way are answered.
pub(super) async fn serve(
    stream: TcpStream,
    remote: SocketAddr,
    door: &Arc<Door>,
    router: Router,
    stop: &CancellationToken,
) {
    let ends = Ends::new(remote, stream.local_addr().ok());
    let entry = door.enter(ends.remote.ip());
    let service = service_fn(|request: Request<Incoming>| {
        entry.ask();
        let router = router.clone();
        let entry = &entry;
        async move {
            let answer = answer(router, request, ends).await;
            entry.answered.notify_one();
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(HEAD_SIZE)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // How a connection ends is its caller's affair.
        _ = connection => {}
        () = entry.over(stop) => {}
    }
}

async fn answer(router: Router, mut request: Request<Incoming>, ends: Ends) -> Response {
    if !request.body().is_end_stream() {
        return (StatusCode::PAYLOAD_TOO_LARGE, "no body is wanted\n").into_response();
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
    fn a_caller_with_too_many_loses_its_own_oldest() {
        let door = Door::new(Limits { each: 2, all: 100 });
        let other = door.enter(B);
        let own = [door.enter(A), door.enter(A), door.enter(A)];
        assert!(own[0].closed.is_cancelled());
        assert!(
            [&own[1], &own[2], &other]
                .iter()
                .all(|e| !e.closed.is_cancelled())
        );
    }

    #[test]
    fn when_all_are_too_many_the_one_with_most_makes_room() {
        let door = Door::new(Limits { each: 3, all: 4 });
        let a = [door.enter(A), door.enter(A), door.enter(A)];
        let b = door.enter(B);
        let c = door.enter(C);
        assert!(a[0].closed.is_cancelled());
        assert!(!b.closed.is_cancelled() && !c.closed.is_cancelled());
    }

    #[test]
    fn who_has_asked_takes_no_place_and_is_not_shown_out() {
        let door = Door::new(Limits { each: 1, all: 1 });
        let asked = door.enter(A);
        asked.ask();
        let silent = door.enter(A);
        assert!(!asked.closed.is_cancelled() && !silent.closed.is_cancelled());
        drop((asked, silent));
        assert!(door.lock().connections.is_empty() && door.lock().callers.is_empty());
    }

    /// What a server with these limits answers to `request`.
    async fn ask(request: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let door = Door::new(Limits { each: 4, all: 4 });
            let (stream, remote) = listener.accept().await.unwrap();
            let router = Router::new().route("/", get(async || "hello"));
            serve(stream, remote, &door, router, &CancellationToken::new()).await;
        });
        let mut caller = TcpStream::connect(address).await.unwrap();
        caller.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // A reset ends it as well.
        let _ = caller.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn one_request_is_answered_and_then_the_connection_closed() {
        let answer = ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
            "{answer}"
        );
    }

    #[tokio::test]
    async fn bodies_and_large_heads_are_refused() {
        let body = ask(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n").await;
        assert!(body.starts_with("HTTP/1.1 413"), "{body}");
        let long = format!(
            "GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
            "y".repeat(HEAD_SIZE)
        );
        let large = ask(long.as_bytes()).await;
        assert!(large.starts_with("HTTP/1.1 431"), "{large}");
    }
}
