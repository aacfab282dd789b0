//! One HTTP request into a pod, from inside its network namespace.
//!
//! Both ends of the connection are then in the pod, so it neither holds the drain nor counts as an arrival. And the
//! request can only reach the pod itself, whatever its annotation says. For the same reason ebb makes no request to a
//! host-network pod: the port could be any service of the node.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use ebb_core::{format::one_line, notification::DrainRequest, scope::Scope};

use crate::{linux::netns::Netns, pods::Pod};

/// How long the request and its answer may take in all.
const WITHIN: Duration = Duration::from_secs(2);

/// How much of the answer is read, so that the application can write it. Only the status counts.
const LONGEST_ANSWER: usize = 64 * 1024;

/// How long the rest of the answer may take after its status.
const REST_WITHIN: Duration = Duration::from_millis(200);

/// Makes the request, and returns the status of its answer, or why there is none.
pub(super) fn make(pod: &Pod, request: &DrainRequest) -> Result<u16, String> {
    let (inode, pid) = match &pod.scope {
        Scope::Netns { inode, pid } => (*inode, *pid),
        Scope::HostNetwork(_) => {
            return Err("ebb makes no requests to pods on the host network".into());
        }
        Scope::Untracked(why) => return Err(why.clone()),
    };
    let deadline = Instant::now() + WITHIN;
    let netns = Netns::open(inode, pid).map_err(|e| format!("can't open its namespace: {e}"))?;
    let loopback = [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    ];
    let addresses = loopback.iter().chain(&pod.ips).copied();
    netns
        .run(|| exchange(addresses, request, deadline))
        .map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                format!("no answer within {WITHIN:?}")
            }
            _ => one_line(&e),
        })
}

/// Connects to the first of the addresses that accepts, and makes the request there.
fn exchange(
    addresses: impl Iterator<Item = IpAddr>,
    request: &DrainRequest,
    deadline: Instant,
) -> io::Result<u16> {
    let mut refused = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for ip in addresses {
        let address = SocketAddr::from((ip, request.port));
        match TcpStream::connect_timeout(&address, left(deadline)?) {
            Ok(stream) => return ask(&stream, address, request, deadline),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => return Err(e),
            Err(e) => refused = e,
        }
    }
    Err(io::Error::new(
        refused.kind(),
        format!(
            "can't connect to port {} in the pod: {refused}",
            request.port
        ),
    ))
}

fn ask(
    mut stream: &TcpStream,
    address: SocketAddr,
    request: &DrainRequest,
    deadline: Instant,
) -> io::Result<u16> {
    let method = request.method.name();
    let head = format!(
        "{method} {} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: ebb/{}\r\nContent-Length: 0\r\n\
         Connection: close\r\n\r\n",
        request.path,
        env!("CARGO_PKG_VERSION"),
    );
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        if answer.contains(&b'\n') {
            break;
        }
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut part)? {
            0 => return Err(io::Error::other("the connection ended without an answer")),
            n => answer.extend_from_slice(&part[..n]),
        }
        if answer.len() >= LONGEST_ANSWER {
            break;
        }
    }
    let status = status(&answer).ok_or_else(|| io::Error::other("the answer is not HTTP"))?;
    // Closing before the application has written its answer would be a reset.
    let rest_until = deadline.min(Instant::now() + REST_WITHIN);
    let mut read = answer.len();
    while read < LONGEST_ANSWER
        && let Ok(left) = left(rest_until)
        && stream.set_read_timeout(Some(left)).is_ok()
        && let Ok(n @ 1..) = stream.read(&mut part)
    {
        read += n;
    }
    Ok(status)
}

/// The time that is left; an error if there is none.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

/// The status in the first line of an answer (RFC 9112, section 4).
fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|b| *b == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?;
    let rest = line.strip_prefix("HTTP/1.")?;
    let status = rest.split(' ').nth(1)?.trim();
    status.parse().ok().filter(|s| (100..1000).contains(s))
}

#[cfg(test)]
mod tests {
    use std::{io::BufRead as _, net::TcpListener, thread};

    use super::*;

    /// The status of a request to a server that answers with `answer` and returns the head that it got.
    fn asked(text: &str, answer: &'static [u8]) -> (io::Result<u16>, Vec<String>) {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let serving = thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let lines = io::BufReader::new(stream.try_clone().unwrap()).lines();
            let head = lines.map(Result::unwrap).take_while(|l| !l.is_empty());
            let head: Vec<_> = head.collect();
            stream.write_all(answer).unwrap();
            head
        });
        let request: DrainRequest = text.replace("PORT", &port.to_string()).parse().unwrap();
        let addresses = [IpAddr::from(Ipv4Addr::LOCALHOST)].into_iter();
        let status = exchange(addresses, &request, Instant::now() + 10 * WITHIN);
        (status, serving.join().unwrap())
    }

    #[test]
    fn the_request_is_http_and_its_status_is_returned() {
        let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
        let (status, head) = asked("POST :PORT/drain?x=1", answer);
        assert_eq!(status.unwrap(), 204);
        assert_eq!(head[0], "POST /drain?x=1 HTTP/1.1");
        assert!(head.contains(&"Connection: close".to_owned()), "{head:?}");
        assert!(head.contains(&"Content-Length: 0".to_owned()), "{head:?}");
    }

    #[test]
    fn what_is_not_http_is_an_error() {
        for answer in [
            &b"SSH-2.0-x\r\n"[..],
            b"",
            b"HTTP/1.1 abc\r\n",
            b"HTTP/1.1 20 OK\r\n",
        ] {
            let (status, _) = asked("GET :PORT/", answer);
            assert!(status.is_err(), "{answer:?}: {status:?}");
        }
    }

    #[test]
    fn a_server_that_does_not_answer_is_a_timeout() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let request: DrainRequest = format!("GET :{port}/").parse().unwrap();
        let addresses = [IpAddr::from(Ipv4Addr::LOCALHOST)].into_iter();
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = exchange(addresses, &request, deadline).unwrap_err();
        let timed_out = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(timed_out.contains(&error.kind()), "{error:?}");
    }

    #[test]
    fn the_next_address_is_tried_if_one_refuses() {
        // Only the second address listens on this port.
        let server = TcpListener::bind("127.0.0.2:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let serving = thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").unwrap();
            let _ = stream.read(&mut [0; 4096]);
        });
        let request: DrainRequest = format!("GET :{port}/").parse().unwrap();
        let addresses = [[127, 0, 0, 1], [127, 0, 0, 2]].map(IpAddr::from);
        let status = exchange(
            addresses.into_iter(),
            &request,
            Instant::now() + 10 * WITHIN,
        );
        assert_eq!(status.unwrap(), 200);
        serving.join().unwrap();
        let refused = exchange(
            addresses.into_iter(),
            &request,
            Instant::now() + 10 * WITHIN,
        );
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("can't connect to port"), "{error}");
    }
}
