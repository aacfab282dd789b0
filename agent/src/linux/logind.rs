//! Whether the node is shutting down: systemd-logind's property `PreparingForShutdown`.
//!
//! It is true while logind delays a shutdown for the kubelet, which ends the node's pods meanwhile
//! (`pkg/kubelet/nodeshutdown/nodeshutdown_manager_linux.go`). The API server learns of none of these ends in time.
//!
//! D-Bus, as far as one property needs it (D-Bus specification, "Message Protocol"): a client authenticates with its uid, says
//! `Hello`, and calls `Get`. Each message has a fixed part of 16 bytes (byte order, type, flags, version, length of the body,
//! serial number, length of the header fields), the header fields, padding to 8 bytes, and the body. The libraries for D-Bus
//! set no time limit on the authentication, and a stop waits for this answer.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::spawn_blocking,
    time::{Instant, timeout},
};

/// How long an answer may take in all.
const ANSWER_WITHIN: Duration = Duration::from_millis(300);

/// For how long a shutdown is taken to be under way after logind has said so. The kubelet stops all pods of a priority
/// group at once.
const SHUTDOWN_AGE: Duration = Duration::from_secs(2);

/// The longest message that is read: those expected have less than 200 bytes.
const LONGEST: usize = 64 * 1024;

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

/// Asks logind whether the node is shutting down. Callers share the queries.
#[derive(Clone, Debug)]
pub(crate) struct NodeShutdown {
    /// The socket of the system bus; `None`: the node has none.
    socket: Option<PathBuf>,
    /// One query at a time: a bus that hangs costs one thread.
    turn: Arc<Semaphore>,
    /// The answer to the last query.
    answer: watch::Sender<Option<LogindAnswer>>,
}

/// logind's answer to one query.
#[derive(Clone, Copy, Debug)]
struct LogindAnswer {
    /// When the query began.
    began: Instant,
    /// False also if the query failed.
    is_under_way: bool,
}

impl LogindAnswer {
    /// What it says to a caller that came at `called`. `None`: the caller needs another query.
    ///
    /// A shutdown that has begun goes on. That none was under way says nothing about later moments: logind sets the
    /// property just before the kubelet stops the pods.
    fn for_call(self, called: Instant) -> Option<bool> {
        let is_valid = match self.is_under_way {
            true => called <= self.began + SHUTDOWN_AGE,
            false => called <= self.began,
        };
        is_valid.then_some(self.is_under_way)
    }
}

impl NodeShutdown {
    pub(crate) fn new(socket: Option<PathBuf>) -> Self {
        Self {
            socket,
            turn: Arc::new(Semaphore::new(1)),
            answer: watch::Sender::default(),
        }
    }

    /// Whether the node is shutting down. False if that is not known.
    pub(crate) async fn is_under_way(&self) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let answer = timeout(ANSWER_WITHIN, self.answer_for(socket, Instant::now())).await;
        answer.unwrap_or(false)
    }

    /// The first answer that is valid for a caller that came at `called`.
    async fn answer_for(&self, socket: &Path, called: Instant) -> bool {
        let mut answers = self.answer.subscribe();
        loop {
            let answer = *answers.borrow_and_update();
            if let Some(is_under_way) = answer.and_then(|answer| answer.for_call(called)) {
                return is_under_way;
            }
            tokio::select! {
                // An answer comes before the end of its turn.
                biased;
                _ = answers.changed() => {}
                Ok(turn) = Arc::clone(&self.turn).acquire_owned() => {
                    // The answer may have come just before the turn.
                    if !answers.has_changed().unwrap_or(false) {
                        self.ask(socket.to_owned(), turn);
                    }
                }
            }
        }
    }

    /// Starts a query, which goes on if its callers have left.
    fn ask(&self, socket: PathBuf, turn: OwnedSemaphorePermit) {
        let answer = self.answer.clone();
        let began = Instant::now();
        spawn_blocking(move || {
            let is_under_way = preparing_for_shutdown(&socket).unwrap_or_else(|e| {
                tracing::debug!("can't ask logind whether the node is shutting down: {e}");
                false
            });
            answer.send_replace(Some(LogindAnswer {
                began,
                is_under_way,
            }));
            drop(turn);
        });
    }
}

fn preparing_for_shutdown(socket: &Path) -> io::Result<bool> {
    let mut bus = UnixStream::connect(socket)?;
    bus.set_read_timeout(Some(ANSWER_WITHIN))?;
    bus.set_write_timeout(Some(ANSWER_WITHIN))?;
    authenticate(&mut bus)?;
    bus.write_all(&call(1, &BUS, &[]))?;
    bus.write_all(&call(
        2,
        &LOGIND,
        &["org.freedesktop.login1.Manager", "PreparingForShutdown"],
    ))?;
    reply(&mut bus)?;
    boolean(&reply(&mut bus)?)
}

/// `EXTERNAL`: the bus reads the uid from the socket and compares it with this one.
fn authenticate(bus: &mut UnixStream) -> io::Result<()> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let uid: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
    bus.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        bus.read_exact(&mut byte)?;
        line.extend(byte);
        if line.len() > LONGEST {
            return Err(invalid("a line without an end"));
        }
    }
    if !line.starts_with(b"OK ") {
        return Err(invalid("the bus refuses the agent's uid"));
    }
    bus.write_all(b"BEGIN\r\n")
}

/// A method of an object on the bus.
struct Method {
    destination: &'static str,
    path: &'static str,
    interface: &'static str,
    member: &'static str,
}

const BUS: Method = Method {
    destination: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
    member: "Hello",
};

const LOGIND: Method = Method {
    destination: "org.freedesktop.login1",
    path: "/org/freedesktop/login1",
    interface: "org.freedesktop.DBus.Properties",
    member: "Get",
};

/// The message that calls a method whose arguments are strings.
fn call(serial: u32, method: &Method, arguments: &[&str]) -> Vec<u8> {
    let mut body = Vec::new();
    for argument in arguments {
        string(&mut body, argument);
    }
    let mut fields = Vec::new();
    for (code, kind, value) in [
        (1, b'o', method.path),
        (2, b's', method.interface),
        (3, b's', method.member),
        (6, b's', method.destination),
    ] {
        pad(&mut fields, 8);
        fields.extend([code, 1, kind, 0]);
        string(&mut fields, value);
    }
    if !arguments.is_empty() {
        // The signature of the body.
        pad(&mut fields, 8);
        fields.extend([8, 1, b'g', 0, arguments.len() as u8]);
        fields.extend(arguments.iter().map(|_| b's'));
        fields.push(0);
    }
    let mut message = vec![b'l', METHOD_CALL, 0, 1];
    for number in [body.len() as u32, serial, fields.len() as u32] {
        message.extend(number.to_le_bytes());
    }
    message.extend(fields);
    pad(&mut message, 8);
    message.extend(body);
    message
}

/// A string on its boundary: its length, its bytes and a zero byte.
fn string(to: &mut Vec<u8>, text: &str) {
    pad(to, 4);
    to.extend((text.len() as u32).to_le_bytes());
    to.extend(text.as_bytes());
    to.push(0);
}

fn pad(to: &mut Vec<u8>, boundary: usize) {
    to.resize(to.len().next_multiple_of(boundary), 0);
}

/// The body of the next reply. The bus also sends signals, which are skipped.
fn reply(bus: &mut UnixStream) -> io::Result<Vec<u8>> {
    loop {
        let mut fixed = [0; 16];
        bus.read_exact(&mut fixed)?;
        let [order, kind, _, _, body @ ..] = fixed;
        if order != b'l' {
            return Err(invalid("a message in another byte order"));
        }
        let number = |at: usize| {
            let bytes = body.iter().skip(at).take(4).rev();
            bytes.fold(0, |sum: usize, byte| (sum << 8) | usize::from(*byte))
        };
        let (length, fields) = (number(0), number(8).next_multiple_of(8));
        if length.max(fields) > LONGEST {
            return Err(invalid("a message that is too long"));
        }
        let mut rest = vec![0; fields + length];
        bus.read_exact(&mut rest)?;
        match kind {
            METHOD_RETURN => return Ok(rest.split_off(fields)),
            ERROR => return Err(invalid("an error")),
            _ => {}
        }
    }
}

/// The boolean in a variant: signature `b`, and the value on its boundary of 4 bytes.
fn boolean(body: &[u8]) -> io::Result<bool> {
    match body {
        [1, b'b', 0, _, value, 0, 0, 0] => Ok(*value == 1),
        _ => Err(invalid("another type than a boolean")),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the bus sent {what}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_call_is_laid_out_as_the_specification_says() {
        let message = call(2, &LOGIND, &["a", "bc"]);
        assert_eq!(message[..4], [b'l', 1, 0, 1]);
        // Two strings: 4 + 1 + 1, padded to 8, and 4 + 2 + 1.
        assert_eq!(message[4..8], 15_u32.to_le_bytes());
        assert_eq!(message[8..12], 2_u32.to_le_bytes());
        let body = message.len() - 15;
        assert_eq!(body % 8, 0);
        assert_eq!(message[body..body + 6], [1, 0, 0, 0, b'a', 0]);
        assert_eq!(message[16..20], [1, 1, b'o', 0]);
    }

    #[tokio::test]
    async fn without_a_bus_or_with_one_that_is_silent_no_shutdown_is_known() {
        assert!(!NodeShutdown::new(None).is_under_way().await);
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let none = NodeShutdown::new(Some(socket.clone()));
        assert!(!none.is_under_way().await);
        let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(!none.is_under_way().await);
        assert!(!none.is_under_way().await, "the next one asks again");
    }

    /// A bus that answers one connection after the other, each after `delay`, with what `is_under_way` says when the
    /// query arrives. Returns the number of queries.
    fn bus(
        socket: &Path,
        delay: Duration,
        is_under_way: impl Fn(usize) -> bool + Send + 'static,
    ) -> Arc<AtomicUsize> {
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        let queries = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&queries);
        let serve = move |mut client: UnixStream| -> io::Result<()> {
            let _credentials = client.read(&mut [0; 256])?;
            client.write_all(b"OK 0123\r\n")?;
            let _calls = client.read(&mut [0; 1024])?;
            let value = is_under_way(counted.fetch_add(1, Ordering::Relaxed));
            std::thread::sleep(delay);
            let reply = |body: &[u8]| {
                let mut message = vec![b'l', METHOD_RETURN, 0, 1];
                for number in [body.len() as u32, 1, 0] {
                    message.extend(number.to_le_bytes());
                }
                message.extend(body);
                message
            };
            client.write_all(&reply(&[]))?;
            client.write_all(&reply(&[1, b'b', 0, 0, value.into(), 0, 0, 0]))
        };
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let _ = serve(client.unwrap());
            }
        });
        queries
    }

    #[tokio::test]
    async fn a_hundred_stops_at_once_learn_of_a_shutdown_from_a_slow_bus() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let queries = bus(&socket, Duration::from_millis(20), |_| true);
        let shutdown = NodeShutdown::new(Some(socket));
        let began = Instant::now();
        let stops = (0..100).map(|_| {
            let shutdown = shutdown.clone();
            tokio::spawn(async move { shutdown.is_under_way().await })
        });
        let answers = futures_util::future::join_all(stops).await;
        assert!(answers.into_iter().all(|answer| answer.unwrap()));
        assert!(began.elapsed() < ANSWER_WITHIN, "{:?}", began.elapsed());
        assert!(shutdown.is_under_way().await);
        assert_eq!(queries.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_query_that_began_before_a_stop_does_not_deny_it_a_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        // The shutdown begins after the first query.
        let queries = bus(&socket, Duration::from_millis(50), |query| query > 0);
        let shutdown = NodeShutdown::new(Some(socket));
        let early = shutdown.clone();
        let early = tokio::spawn(async move { early.is_under_way().await });
        while queries.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(shutdown.is_under_way().await);
        assert!(!early.await.unwrap());
    }

    #[tokio::test]
    async fn an_answer_takes_no_longer_than_its_time_while_another_query_hangs() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let shutdown = NodeShutdown::new(Some(socket));
        let hanging = shutdown.clone();
        let hanging = tokio::spawn(async move { hanging.is_under_way().await });
        tokio::time::sleep(ANSWER_WITHIN / 2).await;
        let began = Instant::now();
        assert!(!shutdown.is_under_way().await);
        let took = began.elapsed();
        // The rest is slack for a slow machine.
        assert!(took < ANSWER_WITHIN * 5 / 4, "{took:?}");
        assert!(!hanging.await.unwrap());
    }

    #[test]
    fn only_a_boolean_is_an_answer() {
        assert!(boolean(&[1, b'b', 0, 0, 1, 0, 0, 0]).unwrap());
        assert!(!boolean(&[1, b'b', 0, 0, 0, 0, 0, 0]).unwrap());
        assert!(boolean(&[1, b's', 0, 0, 1, 0, 0, 0]).is_err());
        assert!(boolean(&[]).is_err());
    }
}
