//! Asking the kernel for its TCP sockets: sock_diag over netlink.
//!
//! A dump walks the connection table of the whole node, whatever the namespace; an exact lookup is a hash
//! lookup. The request for a dump is a netlink header (16 bytes), `struct inet_diag_req` (60) and an attribute
//! that carries the descriptor of the socket-storage map; for a lookup, a header and `struct
//! inet_diag_req_v2` (56). Each reply is a header, `struct inet_diag_msg` (72) and attributes: tcp_info, the
//! cgroup id and, in a dump, the BPF record of that very socket. A lookup never has the record
//! (`inet_diag_cmd_exact` in net/ipv4/inet_diag.c). Layouts:
//! include/uapi/linux/{netlink,inet_diag,sock_diag,tcp}.h.
//!
//! Dumps go by the older of the two messages: its request names no address family, so that one walk shows
//! IPv4 and IPv6 (`inet_diag_dump_compat` sets AF_UNSPEC), where the newer one insists on one family a walk.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

use ebb_common::{ROLE_INBOUND, ROLE_OUTBOUND};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
    sockopt,
};

use super::bytes::Bytes;
use crate::{
    clock::BootTime,
    flow::{Acceptance, Origin, Sample, TcpState},
    ids::{CgroupId, SocketCookie},
};

const TCPDIAG_GETSOCK: u16 = 18;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_CGROUP_ID: u16 = 21;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;

/// The states of [`TcpState`] but TIME_WAIT (6) and NEW_SYN_RECV (12): TIME_WAIT sockets are nobody's any
/// more, and request sockets no connections yet.
const STATES: u32 = 0xffe & !(1 << 6);

/// As much as the kernel puts into one reply of a dump (`NLMSG_GOODSIZE` aside, it uses up to 32 KiB).
const BUFFER: usize = 64 * 1024;

/// One socket with all that is asked for takes some 500 bytes.
const SMALL_BUFFER: usize = 8 * 1024;

/// A sock_diag socket of the namespace in which it was opened.
pub(super) struct SockDiag {
    fd: OwnedFd,
    /// The number of the last question, which its answer repeats.
    asked: u32,
}

impl SockDiag {
    /// Opens one in the calling thread's network namespace. It may be used from any thread.
    pub(super) fn open() -> io::Result<Self> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(netlink::SOCK_DIAG),
        )?;
        // The kernel answers from its own work at once; this only bounds a hang that must not be.
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(Duration::from_secs(5)))?;
        Ok(Self { fd, asked: 0 })
    }

    /// Gives `each` all TCP sockets of the namespace as they are read, with the record that `storage` (a
    /// socket-storage map of `FlowRecord`) has of each.
    pub(super) fn dump(
        &mut self,
        storage: Option<BorrowedFd<'_>>,
        each: impl FnMut(Sample),
    ) -> io::Result<()> {
        self.ask(dump_request(storage), each)
    }

    /// The connection between `local` and `remote`, if the namespace has it. A listener is not one. Of a
    /// socket that is bound to an interface the kernel says nothing.
    pub(super) fn find(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<Sample>> {
        let mut found = None;
        match self.ask(find_request(local, remote), |sample| found = Some(sample)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
            Ok(()) => Ok(found.filter(|s: &Sample| s.state != TcpState::Listen)),
        }
    }

    /// Sends a request and gives each socket in the reply to `each`. A reply that is not whole is an error:
    /// the sockets that are missing from it are not gone.
    fn ask(&mut self, request: Request, mut each: impl FnMut(Sample)) -> io::Result<()> {
        self.asked = self.asked.wrapping_add(1);
        let is_dump = request.is_dump;
        send(&self.fd, &request.numbered(self.asked), SendFlags::empty())?;
        let mut buffer = vec![0; if is_dump { BUFFER } else { SMALL_BUFFER }];
        loop {
            // With TRUNC the length is that of the message, also where the buffer was too short for it.
            let (_, n) = recv(&self.fd, buffer.as_mut_slice(), RecvFlags::TRUNC)?;
            let reply = buffer.get(..n).ok_or_else(broken)?;
            let seen = replied(Bytes(reply), self.asked, &mut each)?;
            if seen == Seen::Last || (seen == Seen::Some && !is_dump) {
                return Ok(());
            }
        }
    }
}

/// What a datagram of a reply held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Nothing of this reply.
    Nothing,
    /// A part of it.
    Some,
    /// Its end.
    Last,
}

/// Takes one datagram of the reply to the question of this number apart.
fn replied(mut rest: Bytes<'_>, asked: u32, each: &mut impl FnMut(Sample)) -> io::Result<Seen> {
    let mut seen = Seen::Nothing;
    while !rest.0.is_empty() {
        let (kind, number, body) = next_message(&mut rest).ok_or_else(broken)?;
        if number != asked {
            continue;
        }
        match kind {
            // A dump that failed half-way ends like one that did not, but with a number.
            NLMSG_DONE | NLMSG_ERROR => return error(body).map(|()| Seen::Last),
            SOCK_DIAG_BY_FAMILY | TCPDIAG_GETSOCK => each(sample(body).ok_or_else(broken)?),
            _ => {}
        }
        seen = Seen::Some;
    }
    Ok(seen)
}

fn broken() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's list of sockets can't be read to its end",
    )
}

fn error(mut body: Bytes<'_>) -> io::Result<()> {
    match body.u32().map(|n| n.cast_signed()) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Takes the next netlink message: its type, the number of the question, its body.
fn next_message<'a>(rest: &mut Bytes<'a>) -> Option<(u16, u32, Bytes<'a>)> {
    let mut header = *rest;
    let length = header.u32()? as usize;
    let kind = header.u16()?;
    header.u16()?; // flags
    let number = header.u32()?;
    let message = rest.take(length.max(16))?;
    let padding = length.next_multiple_of(4) - length;
    let _ = rest.take(padding.min(rest.0.len()));
    Some((kind, number, Bytes(message.get(16..)?)))
}

/// Takes the next attribute: its type and value.
fn next_attribute<'a>(rest: &mut Bytes<'a>) -> Option<(u16, Bytes<'a>)> {
    let mut header = *rest;
    let length = usize::from(header.u16()?);
    let kind = header.u16()? & NLA_TYPE_MASK;
    let attribute = rest.take(length.max(4))?;
    let padding = length.next_multiple_of(4) - length;
    let _ = rest.take(padding.min(rest.0.len()));
    Some((kind, Bytes(attribute.get(4..)?)))
}

/// A netlink message to the kernel, without its length and number.
struct Request {
    message: Vec<u8>,
    is_dump: bool,
}

impl Request {
    fn new(kind: u16, is_dump: bool) -> Self {
        let flags = if is_dump { NLM_F_DUMP } else { 0 };
        let mut message = Vec::with_capacity(88);
        message.extend([0; 4]); // length
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]); // number of the question, port id
        Self { message, is_dump }
    }

    fn numbered(mut self, number: u32) -> Vec<u8> {
        let length = u32::try_from(self.message.len()).unwrap_or(u32::MAX);
        self.message[..4].copy_from_slice(&length.to_ne_bytes());
        self.message[8..12].copy_from_slice(&number.to_ne_bytes());
        self.message
    }
}

/// `struct inet_diag_req`: all sockets in [`STATES`].
fn dump_request(storage: Option<BorrowedFd<'_>>) -> Request {
    let mut request = Request::new(TCPDIAG_GETSOCK, true);
    let r = &mut request.message;
    r.extend([0, 0, 0, 1 << (INET_DIAG_INFO - 1)]); // family and address lengths are not looked at
    r.extend([0; 48]);
    r.extend(STATES.to_ne_bytes());
    r.extend(0u32.to_ne_bytes());
    if let Some(map) = storage {
        r.extend(12u16.to_ne_bytes());
        r.extend((INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED).to_ne_bytes());
        r.extend(8u16.to_ne_bytes());
        r.extend(SK_DIAG_BPF_STORAGE_REQ_MAP_FD.to_ne_bytes());
        r.extend(map.as_raw_fd().to_ne_bytes());
    }
    request
}

/// `struct inet_diag_req_v2`: the socket between these two.
fn find_request(local: SocketAddr, remote: SocketAddr) -> Request {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut request = Request::new(SOCK_DIAG_BY_FAMILY, false);
    let r = &mut request.message;
    r.extend([family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0]);
    r.extend(STATES.to_ne_bytes());
    r.extend(local.port().to_be_bytes());
    r.extend(remote.port().to_be_bytes());
    r.extend(address(local.ip()));
    r.extend(address(remote.ip()));
    r.extend(0u32.to_ne_bytes()); // any interface
    r.extend([0xff; 8]); // INET_DIAG_NOCOOKIE
    request
}

fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => widen(v4),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn widen(v4: Ipv4Addr) -> [u8; 16] {
    let mut wide = [0; 16];
    wide[..4].copy_from_slice(&v4.octets());
    wide
}

/// An address as the kernel gives it in 16 bytes; IPv4 in IPv6 becomes IPv4.
pub(super) fn ip(family: u8, bytes: [u8; 16]) -> IpAddr {
    let [a, b, c, d, ..] = bytes;
    if family == AF_INET {
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    } else {
        IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
    }
}

/// Decodes `struct inet_diag_msg` and its attributes. `None`: not what this kernel should send.
fn sample(mut m: Bytes<'_>) -> Option<Sample> {
    let family = m.u8()?;
    let state = TcpState::try_from(m.u8()?).ok()?;
    m.take(2)?; // timer, retransmissions
    let (local_port, remote_port) = (m.u16_be()?, m.u16_be()?);
    let (local_addr, remote_addr) = (m.array()?, m.array()?);
    m.take(4)?; // interface
    let (cookie_low, cookie_high) = (m.u32()?, m.u32()?);
    m.take(4)?; // timer
    let (unread, unacked) = (m.u32()?, m.u32()?);
    m.take(4)?; // user
    let inode = m.u32()?;
    let mut s = Sample {
        cookie: SocketCookie(u64::from(cookie_high) << 32 | u64::from(cookie_low)),
        local: SocketAddr::new(ip(family, local_addr), local_port),
        remote: SocketAddr::new(ip(family, remote_addr), remote_port),
        state,
        unread,
        unacked,
        inode,
        bytes_received: 0,
        bytes_acked: 0,
        since_sent: Duration::ZERO,
        since_received: Duration::ZERO,
        since_ack: Duration::ZERO,
        bare_ack: false,
        to_wait_port: false,
        cgroup: None,
        origin: Origin::Unknown,
    };
    while let Some((kind, mut value)) = next_attribute(&mut m) {
        match kind {
            INET_DIAG_INFO => tcp_info(&mut s, value)?,
            INET_DIAG_CGROUP_ID => s.cgroup = value.u64().map(CgroupId),
            INET_DIAG_SK_BPF_STORAGES => s.origin = storages(value).unwrap_or(Origin::Unknown),
            _ => {}
        }
    }
    Some(s)
}

/// `struct tcp_info`, at the offsets of its fields.
fn tcp_info(s: &mut Sample, info: Bytes<'_>) -> Option<()> {
    let ms = |offset| Some(Duration::from_millis(info.at(offset)?.u32()?.into()));
    s.since_sent = ms(44)?;
    s.since_received = ms(52)?;
    s.since_ack = ms(56)?;
    s.bytes_acked = info.at(120)?.u64()?;
    s.bytes_received = info.at(128)?.u64()?;
    Some(())
}

fn storages(mut storages: Bytes<'_>) -> Option<Origin> {
    while let Some((kind, mut storage)) = next_attribute(&mut storages) {
        if kind != SK_DIAG_BPF_STORAGE {
            continue;
        }
        while let Some((kind, value)) = next_attribute(&mut storage) {
            if kind == SK_DIAG_BPF_STORAGE_MAP_VALUE {
                return origin(value);
            }
        }
    }
    None
}

/// `ebb_common::FlowRecord`.
fn origin(mut r: Bytes<'_>) -> Option<Origin> {
    r.take(16)?; // key
    let opened_at = BootTime::from_nanos(r.u64()?);
    match r.u8()? {
        ROLE_INBOUND => {}
        ROLE_OUTBOUND => return Some(Origin::Dialled),
        _ => return None,
    }
    r.u8()?; // counted
    let seeded = r.u8()? != 0;
    r.u8()?; // state
    Some(Origin::Accepted(Acceptance {
        opened_at,
        seeded,
        probe: r.u8()? != 0,
    }))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn all(diag: &mut SockDiag) -> Vec<Sample> {
        let mut all = Vec::new();
        diag.dump(None, |sample| all.push(sample)).unwrap();
        all
    }

    #[test]
    fn a_connection_is_found_from_both_ends_and_a_closed_one_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let (a, b) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let mut diag = SockDiag::open().unwrap();
        assert_eq!(diag.find(a, b).unwrap().unwrap().local, a);
        assert_eq!(diag.find(b, a).unwrap().unwrap().remote, a);
        drop((client, server));
        let gone = diag.find(b, a).unwrap();
        assert!(gone.is_none_or(|s| s.state != TcpState::Established));
    }

    #[test]
    fn one_dump_has_both_families_and_one_socket_can_be_asked_again_and_again() {
        let listeners = ["127.0.0.1:0", "[::1]:0"].map(|at| TcpListener::bind(at).unwrap());
        let clients = listeners
            .each_ref()
            .map(|l| TcpStream::connect(l.local_addr().unwrap()).unwrap());
        let mut diag = SockDiag::open().unwrap();
        for _ in 0..3 {
            let all = all(&mut diag);
            for client in &clients {
                let (a, b) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
                let ends = |l, r| all.iter().filter(|s| s.local == l && s.remote == r).count();
                assert_eq!((ends(a, b), ends(b, a)), (1, 1));
                assert!(diag.find(a, b).unwrap().is_some());
                assert!(diag.find(a, a).unwrap().is_none());
            }
        }
    }

    #[test]
    fn a_dump_has_listeners_and_connections_with_their_byte_counts() {
        use std::io::{Read as _, Write as _};
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        client.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        let all = all(&mut SockDiag::open().unwrap());
        let at = listener.local_addr().unwrap();
        assert!(
            all.iter()
                .any(|s| s.local == at && s.state == TcpState::Listen)
        );
        let conn = all
            .iter()
            .find(|s| s.local == at && s.remote == peer)
            .unwrap();
        assert_eq!(conn.bytes_received, 5);
        assert!(conn.inode != 0);
    }

    /// A netlink message.
    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut m = length.to_ne_bytes().to_vec();
        m.extend(kind.to_ne_bytes());
        m.extend([0; 2]);
        m.extend(7u32.to_ne_bytes());
        m.extend([0; 4]);
        m.extend(body);
        m
    }

    #[test]
    fn a_reply_that_is_not_whole_is_an_error_and_never_a_short_list() {
        let parse = |bytes: &[u8]| replied(Bytes(bytes), 7, &mut |_| {});
        let done = message(NLMSG_DONE, &0i32.to_ne_bytes());
        assert_eq!(parse(&done).unwrap(), Seen::Last);
        let other = replied(Bytes(&done), 8, &mut |_| {}).unwrap();
        assert_eq!(other, Seen::Nothing, "the end of another reply");
        let failed = parse(&message(NLMSG_DONE, &(-12i32).to_ne_bytes())).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(12));
        assert!(
            parse(&message(SOCK_DIAG_BY_FAMILY, &[0xff; 72])).is_err(),
            "no socket"
        );
        let mut cut = message(SOCK_DIAG_BY_FAMILY, &[0; 72]);
        cut.truncate(60);
        assert!(parse(&cut).is_err(), "cut");
    }

    #[test]
    fn short_or_foreign_bytes_decode_to_nothing() {
        assert_eq!(sample(Bytes(&[2, 1, 0])), None);
        assert_eq!(sample(Bytes(&[0xff; 72])), None);
        assert!(next_message(&mut Bytes(&[1, 2, 3])).is_none());
        assert!(next_message(&mut Bytes(&[0xff; 20])).is_none());
        assert!(next_attribute(&mut Bytes(&[0, 0])).is_none());
        assert_eq!(origin(Bytes(&[0; 31])), None);
    }
}
