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

use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

/// How long an answer may take in all.
const ANSWER_WITHIN: Duration = Duration::from_millis(300);

/// The longest message that is read: those expected have less than 200 bytes.
const LONGEST: usize = 64 * 1024;

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

/// Asks logind whether the node is shutting down.
#[derive(Clone, Debug)]
pub(crate) struct NodeShutdown {
    /// The socket of the system bus; `None`: the node has none.
    socket: Option<PathBuf>,
    /// A bus that hangs costs one thread.
    turn: Arc<Semaphore>,
}

impl NodeShutdown {
    pub(crate) fn new(socket: Option<PathBuf>) -> Self {
        Self {
            socket,
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// Whether the node is shutting down. False if that is not known.
    pub(crate) async fn is_under_way(&self) -> bool {
        let Some(socket) = self.socket.clone() else {
            return false;
        };
        let Ok(turn) = timeout(ANSWER_WITHIN, Arc::clone(&self.turn).acquire_owned()).await else {
            return false;
        };
        let asked = spawn_blocking(move || {
            let _turn = turn;
            preparing_for_shutdown(&socket)
        });
        match timeout(ANSWER_WITHIN, asked).await {
            Ok(Ok(Ok(answer))) => answer,
            Ok(Ok(Err(e))) => {
                tracing::debug!("can't ask logind whether the node is shutting down: {e}");
                false
            }
            Ok(Err(_)) | Err(_) => false,
        }
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

    #[test]
    fn only_a_boolean_is_an_answer() {
        assert!(boolean(&[1, b'b', 0, 0, 1, 0, 0, 0]).unwrap());
        assert!(!boolean(&[1, b'b', 0, 0, 0, 0, 0, 0]).unwrap());
        assert!(boolean(&[1, b's', 0, 0, 1, 0, 0, 0]).is_err());
        assert!(boolean(&[]).is_err());
    }
}
