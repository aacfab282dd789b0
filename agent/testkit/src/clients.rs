//! Clients that count served and failed requests.
//!
//! They run in the node's network namespace, as a load balancer or another node would. A request fails if it can't
//! connect, if the connection ends before the whole reply has arrived, if the reply is a server error, or if it times
//! out. A server that closes an idle connection fails no request: that is counted separately.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::http::{Failure, HttpConnection, HttpReply, get};

/// How long a request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A kind of client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientKind {
    /// Reads a long reply slowly.
    Download,
    /// Waits for a slow answer.
    Slow,
    /// Keeps a connection open between two requests.
    Idle,
    /// Opens new connections, like a client that does not know yet that the pod is terminating.
    Stale,
    /// Waits in the accept queue of a server that serves one at a time.
    Backlog,
}

/// What a group of clients sends.
#[derive(Debug, Clone)]
pub enum ClientLoad {
    /// GETs `path` and reads at most `rate` bytes per second.
    Download {
        /// The path.
        path: String,
        /// Bytes per second per client; `None` for no limit.
        rate: Option<u64>,
        /// How many.
        clients: usize,
    },
    /// GETs `path`, which is slow to answer.
    Slow {
        /// The path.
        path: String,
        /// How many.
        clients: usize,
    },
    /// GETs `path`, waits, GETs it again on the same connection and closes it.
    Idle {
        /// The path.
        path: String,
        /// How long it waits.
        quiet: Duration,
        /// How many.
        clients: usize,
    },
    /// GETs `path` on a new connection again and again.
    Stale {
        /// The path.
        path: String,
        /// Time between two connections.
        every: Duration,
        /// How long it goes on opening them.
        during: Duration,
    },
    /// GETs `path` on many connections at once.
    Backlog {
        /// The path.
        path: String,
        /// How many.
        clients: usize,
    },
}

/// The results of one kind of client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RequestCounts {
    /// Requests made.
    pub requests: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Connections that the server closed while they were idle, so that the client did not send its second request.
    pub closed_idle: u64,
    /// Number of failures per error.
    pub errors: BTreeMap<String, u64>,
}

impl RequestCounts {
    /// Adds other counts.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.closed_idle += other.closed_idle;
        for (error, count) in &other.errors {
            *self.errors.entry(error.clone()).or_default() += count;
        }
    }

    /// The sum of several counts.
    pub fn sum<'a>(counts: impl IntoIterator<Item = &'a Self>) -> Self {
        counts.into_iter().fold(Self::default(), |mut sum, other| {
            sum.add(other);
            sum
        })
    }

    fn count(&mut self, result: Result<(), Failure>) {
        self.requests += 1;
        if let Err(Failure(text)) = result {
            self.failed += 1;
            *self.errors.entry(text).or_default() += 1;
        }
    }
}

/// Running clients. Dropping it ends them.
#[derive(Debug)]
pub struct Clients {
    shared: SharedTallies,
    tasks: JoinSet<()>,
    started: u32,
}

/// The state that the tasks of all clients share.
#[derive(Debug, Clone)]
struct SharedTallies {
    tallies: Arc<Mutex<BTreeMap<ClientKind, RequestCounts>>>,
    in_place: Arc<Semaphore>,
}

impl SharedTallies {
    fn update(&self, kind: ClientKind, change: impl FnOnce(&mut RequestCounts)) {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        change(tallies.entry(kind).or_default());
    }

    fn count(&self, kind: ClientKind, result: Result<HttpReply, Failure>) {
        self.update(kind, |counts| counts.count(result.map(drop)));
    }

    /// Counts one more client that has connected (or failed to).
    fn in_place(&self) {
        self.in_place.add_permits(1);
    }
}

impl Clients {
    /// No clients yet.
    pub fn new() -> Self {
        let shared = SharedTallies {
            tallies: Arc::default(),
            in_place: Arc::new(Semaphore::new(0)),
        };
        Self {
            shared,
            tasks: JoinSet::new(),
            started: 0,
        }
    }

    /// Starts clients of `server`. Call it again for more.
    pub fn start(&mut self, server: SocketAddr, load: ClientLoad) {
        match load {
            ClientLoad::Download {
                path,
                rate,
                clients,
            } => {
                self.spawn(clients, move |shared| {
                    single(shared, ClientKind::Download, server, path.clone(), rate)
                });
            }
            ClientLoad::Slow { path, clients } => {
                self.spawn(clients, move |shared| {
                    single(shared, ClientKind::Slow, server, path.clone(), None)
                });
            }
            ClientLoad::Backlog { path, clients } => {
                self.spawn(clients, move |shared| {
                    single(shared, ClientKind::Backlog, server, path.clone(), None)
                });
            }
            ClientLoad::Idle {
                path,
                quiet,
                clients,
            } => {
                self.spawn(clients, move |shared| {
                    idle(shared, server, path.clone(), quiet)
                });
            }
            ClientLoad::Stale {
                path,
                every,
                during,
            } => {
                self.spawn(1, move |shared| {
                    stale(shared, server, path.clone(), every, during)
                });
            }
        }
    }

    /// Waits until every client has connected: download, slow and backlog clients have just sent their request, idle
    /// clients have received their first answer.
    pub async fn in_place(&self) {
        // The semaphore is never closed.
        let _ = self.shared.in_place.acquire_many(self.started).await;
        // The last bytes may still be on their way through the bridge.
        sleep(Duration::from_millis(20)).await;
    }

    /// The count so far. Requests under way are not in it.
    pub fn so_far(&self) -> BTreeMap<ClientKind, RequestCounts> {
        self.shared
            .tallies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until all clients are done, and returns the count.
    pub async fn finish(mut self) -> BTreeMap<ClientKind, RequestCounts> {
        while self.tasks.join_next().await.is_some() {}
        self.so_far()
    }

    fn spawn<F>(&mut self, clients: usize, client: impl Fn(SharedTallies) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        for _ in 0..clients {
            self.started += 1;
            self.tasks.spawn(client(self.shared.clone()));
        }
    }
}

impl Default for Clients {
    fn default() -> Self {
        Self::new()
    }
}

/// One request on a connection of its own.
async fn single(
    shared: SharedTallies,
    kind: ClientKind,
    server: SocketAddr,
    path: String,
    rate: Option<u64>,
) {
    let connection = with_timeout(HttpConnection::open(server)).await;
    shared.in_place();
    let result = match connection {
        Ok(mut connection) => with_timeout(connection.get_at(&path, rate)).await,
        Err(failure) => Err(failure),
    };
    shared.count(kind, result);
}

async fn idle(shared: SharedTallies, server: SocketAddr, path: String, quiet: Duration) {
    let first = async {
        let mut connection = HttpConnection::open(server).await?;
        let reply = connection.get(&path).await?;
        Ok((connection, reply))
    };
    let first = with_timeout(first).await;
    shared.in_place();
    match first {
        Err(failure) => shared.count(ClientKind::Idle, Err(failure)),
        Ok((mut connection, reply)) => {
            shared.count(ClientKind::Idle, Ok(reply));
            sleep(quiet).await;
            if connection.is_closed() {
                shared.update(ClientKind::Idle, |counts| counts.closed_idle += 1);
            } else {
                shared.count(ClientKind::Idle, with_timeout(connection.get(&path)).await);
            }
        }
    }
}

/// Opens connections at a constant rate, independent of the answers.
async fn stale(
    shared: SharedTallies,
    server: SocketAddr,
    path: String,
    every: Duration,
    during: Duration,
) {
    shared.in_place();
    let mut requests = JoinSet::new();
    let started = Instant::now();
    while started.elapsed() < during {
        let (shared, path) = (shared.clone(), path.clone());
        requests.spawn(async move {
            shared.count(ClientKind::Stale, with_timeout(get(server, &path)).await)
        });
        sleep(every).await;
    }
    while requests.join_next().await.is_some() {}
}

async fn with_timeout<T>(request: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(REQUEST_TIMEOUT, request)
        .await
        .unwrap_or_else(|_| Err(Failure("timed out".into())))
}
