//! Clients that count honestly who was served and who was cut off.
//!
//! They run in the node's network namespace, where a load balancer's or another node's connections
//! would come from. A request fails if it can't connect, if the connection ends before the whole reply
//! is there, if the reply is a server error or if its time is up. A server that closes an idle
//! connection has cut off nobody: that is counted apart.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::http::{Connection, Failure, Reply, get};

/// How long a request may take unless its client says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// A kind of client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Reads a long reply slowly.
    Download,
    /// Waits for an answer that takes long.
    Slow,
    /// Keeps a connection open between two requests.
    Idle,
    /// Opens new connections, as those do who have not heard that the pod is leaving.
    Stale,
    /// Waits in the accept queue of a server that serves one at a time.
    Backlog,
}

/// What a group of clients does.
#[derive(Debug, Clone)]
pub enum Load {
    /// GETs `path` and reads no faster than `rate` bytes per second.
    Download {
        /// The path.
        path: String,
        /// Bytes per second for each client; `None` for as fast as it comes.
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
    /// GETs `path`, is quiet for a while, GETs it again on the same connection and closes it.
    Idle {
        /// The path.
        path: String,
        /// How long it is quiet.
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
        /// Time until no more are opened.
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

/// What became of the requests of one kind of client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Requests made.
    pub requests: u64,
    /// Requests without a whole and good reply.
    pub failed: u64,
    /// Connections that the server closed while they were idle, so that the request planned for them
    /// was not made.
    pub closed_idle: u64,
    /// How often the requests failed in which way.
    pub errors: BTreeMap<String, u64>,
}

impl Tally {
    /// Adds another tally.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.closed_idle += other.closed_idle;
        for (error, count) in &other.errors {
            *self.errors.entry(error.clone()).or_default() += count;
        }
    }

    /// The sum of several tallies.
    pub fn sum<'a>(tallies: impl IntoIterator<Item = &'a Self>) -> Self {
        tallies.into_iter().fold(Self::default(), |mut sum, tally| {
            sum.add(tally);
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

/// Clients at work. Dropping it ends them.
#[derive(Debug)]
pub struct Clients {
    board: Board,
    tasks: JoinSet<()>,
    started: u32,
}

/// What the tasks of all clients share.
#[derive(Debug, Clone)]
struct Board {
    tallies: Arc<Mutex<BTreeMap<Kind, Tally>>>,
    in_place: Arc<Semaphore>,
}

impl Board {
    fn update(&self, kind: Kind, change: impl FnOnce(&mut Tally)) {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        change(tallies.entry(kind).or_default());
    }

    fn count(&self, kind: Kind, result: Result<Reply, Failure>) {
        self.update(kind, |tally| tally.count(result.map(drop)));
    }

    /// Says that one more client has its connection (or will never have one).
    fn in_place(&self) {
        self.in_place.add_permits(1);
    }
}

impl Clients {
    /// No clients yet.
    pub fn new() -> Self {
        let board = Board {
            tallies: Arc::default(),
            in_place: Arc::new(Semaphore::new(0)),
        };
        Self {
            board,
            tasks: JoinSet::new(),
            started: 0,
        }
    }

    /// Starts clients of `server`. May be called again for more.
    pub fn start(&mut self, server: SocketAddr, load: Load) {
        match load {
            Load::Download {
                path,
                rate,
                clients,
            } => {
                self.spawn(clients, move |board| {
                    single(board, Kind::Download, server, path.clone(), rate)
                });
            }
            Load::Slow { path, clients } => {
                self.spawn(clients, move |board| {
                    single(board, Kind::Slow, server, path.clone(), None)
                });
            }
            Load::Backlog { path, clients } => {
                self.spawn(clients, move |board| {
                    single(board, Kind::Backlog, server, path.clone(), None)
                });
            }
            Load::Idle {
                path,
                quiet,
                clients,
            } => {
                self.spawn(clients, move |board| {
                    idle(board, server, path.clone(), quiet)
                });
            }
            Load::Stale {
                path,
                every,
                during,
            } => {
                self.spawn(1, move |board| {
                    stale(board, server, path.clone(), every, during)
                });
            }
        }
    }

    /// Waits until every client has its connection: downloads, slow and queued ones have sent their
    /// request a moment ago, idle ones have had their first answer.
    pub async fn in_place(&self) {
        // The semaphore is never closed.
        let _ = self.board.in_place.acquire_many(self.started).await;
        // What was handed to the kernel is on its way through the bridge.
        sleep(Duration::from_millis(20)).await;
    }

    /// The count so far. Requests under way are not in it.
    pub fn so_far(&self) -> BTreeMap<Kind, Tally> {
        self.board
            .tallies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until all have done what they set out to do, and returns the count.
    pub async fn finish(mut self) -> BTreeMap<Kind, Tally> {
        while self.tasks.join_next().await.is_some() {}
        self.so_far()
    }

    fn spawn<F>(&mut self, clients: usize, client: impl Fn(Board) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        for _ in 0..clients {
            self.started += 1;
            self.tasks.spawn(client(self.board.clone()));
        }
    }
}

impl Default for Clients {
    fn default() -> Self {
        Self::new()
    }
}

/// One request on a connection of its own.
async fn single(board: Board, kind: Kind, server: SocketAddr, path: String, rate: Option<u64>) {
    let connection = patiently(Connection::open(server)).await;
    board.in_place();
    let result = match connection {
        Ok(mut connection) => patiently(connection.get_at(&path, rate)).await,
        Err(failure) => Err(failure),
    };
    board.count(kind, result);
}

async fn idle(board: Board, server: SocketAddr, path: String, quiet: Duration) {
    let first = async {
        let mut connection = Connection::open(server).await?;
        let reply = connection.get(&path).await?;
        Ok((connection, reply))
    };
    let first = patiently(first).await;
    board.in_place();
    match first {
        Err(failure) => board.count(Kind::Idle, Err(failure)),
        Ok((mut connection, reply)) => {
            board.count(Kind::Idle, Ok(reply));
            sleep(quiet).await;
            if connection.is_closed() {
                board.update(Kind::Idle, |tally| tally.closed_idle += 1);
            } else {
                board.count(Kind::Idle, patiently(connection.get(&path)).await);
            }
        }
    }
}

/// Opens connections at an even pace, however long each takes to be answered.
async fn stale(board: Board, server: SocketAddr, path: String, every: Duration, during: Duration) {
    board.in_place();
    let mut requests = JoinSet::new();
    let started = Instant::now();
    while started.elapsed() < during {
        let (board, path) = (board.clone(), path.clone());
        requests
            .spawn(async move { board.count(Kind::Stale, patiently(get(server, &path)).await) });
        sleep(every).await;
    }
    while requests.join_next().await.is_some() {}
}

async fn patiently<T>(request: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(PATIENCE, request)
        .await
        .unwrap_or_else(|_| Err(Failure("timed out".into())))
}
