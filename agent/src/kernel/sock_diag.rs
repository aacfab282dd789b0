//! Asking the kernel for its TCP sockets: sock_diag over netlink.
//!
//! A request is a netlink header (16 bytes), `struct inet_diag_req_v2` (56) and, for a dump, an attribute
//! that carries the descriptor of the socket-storage map. Each reply is a header, `struct inet_diag_msg` (72)
//! and attributes: tcp_info, the cgroup id, and the BPF record of that very socket. Layouts:
//! include/uapi/linux/{netlink,inet_diag,sock_diag,tcp}.h. A dump walks the connection table of the whole
//! node, whatever the namespace; an exact lookup is a hash lookup.

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
    flow::{Direction, Record, Sample, TcpState},
    ids::{CgroupId, SocketCookie},
};

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

/// A sock_diag socket of the namespace in which it was opened.
pub(super) struct SockDiag(OwnedFd);

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
        Ok(Self(fd))
    }

    /// All TCP sockets of the namespace, with the record that `storage` (a socket-storage map of
    /// `FlowRecord`) has of each.
    pub(super) fn dump(&self, storage: Option<BorrowedFd<'_>>) -> io::Result<Vec<Sample>> {
        let mut samples = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let request = request(family, NLM_F_REQUEST | NLM_F_DUMP, None, storage);
            self.ask(&request, |sample| samples.push(sample))?;
        }
        Ok(samples)
    }

    /// The connection between `local` and `remote`, if the namespace has it. A listener is not one.
    pub(super) fn find(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<Sample>> {
        let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
        let request = request(family, NLM_F_REQUEST, Some((local, remote)), None);
        let mut found = None;
        match self.ask(&request, |sample| found = Some(sample)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
            Ok(()) => Ok(found.filter(|s: &Sample| s.state != TcpState::Listen)),
        }
    }

    /// Sends `request` and gives each socket in the reply to `each`. A reply that is not whole is an error:
    /// the sockets that are missing from it are not gone.
    fn ask(&self, request: &[u8], mut each: impl FnMut(Sample)) -> io::Result<()> {
        let is_dump = request.get(6..8) == Some(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        send(&self.0, request, SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            // With TRUNC the length is that of the message, also where the buffer was too short for it.
            let (_, n) = recv(&self.0, buffer.as_mut_slice(), RecvFlags::TRUNC)?;
            let reply = buffer.get(..n).ok_or_else(broken)?;
            if replied(Bytes(reply), &mut each)? || !is_dump {
                return Ok(());
            }
        }
    }
}

/// Takes one datagram of a reply apart. `true`: it was the last one.
fn replied(mut rest: Bytes<'_>, each: &mut impl FnMut(Sample)) -> io::Result<bool> {
    while !rest.0.is_empty() {
        let (kind, body) = next_message(&mut rest).ok_or_else(broken)?;
        match kind {
            // A dump that failed half-way ends like one that did not, but with a number.
            NLMSG_DONE | NLMSG_ERROR => return error(body).map(|()| true),
            SOCK_DIAG_BY_FAMILY => each(sample(body).ok_or_else(broken)?),
            _ => {}
        }
    }
    Ok(false)
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

/// Takes the next netlink message: its type and body.
fn next_message<'a>(rest: &mut Bytes<'a>) -> Option<(u16, Bytes<'a>)> {
    let mut header = *rest;
    let length = header.u32()? as usize;
    let kind = header.u16()?;
    let message = rest.take(length.max(16))?;
    let padding = length.next_multiple_of(4) - length;
    let _ = rest.take(padding.min(rest.0.len()));
    Some((kind, Bytes(message.get(16..)?)))
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

fn request(
    family: u8,
    flags: u16,
    connection: Option<(SocketAddr, SocketAddr)>,
    storage: Option<BorrowedFd<'_>>,
) -> Vec<u8> {
    let mut r = Vec::with_capacity(88);
    r.extend(0u32.to_ne_bytes()); // length, filled in below
    r.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    r.extend(flags.to_ne_bytes());
    r.extend([0; 8]); // sequence number and port id: one question at a time on this socket
    r.extend([family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0]);
    r.extend(STATES.to_ne_bytes());
    match connection {
        Some((local, remote)) => {
            r.extend(local.port().to_be_bytes());
            r.extend(remote.port().to_be_bytes());
            r.extend(address(local.ip()));
            r.extend(address(remote.ip()));
            r.extend(0u32.to_ne_bytes()); // any interface
            r.extend([0xff; 8]); // INET_DIAG_NOCOOKIE
        }
        None => r.extend([0; 48]),
    }
    if let Some(map) = storage {
        r.extend(12u16.to_ne_bytes());
        r.extend((INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED).to_ne_bytes());
        r.extend(8u16.to_ne_bytes());
        r.extend(SK_DIAG_BPF_STORAGE_REQ_MAP_FD.to_ne_bytes());
        r.extend(map.as_raw_fd().to_ne_bytes());
    }
    let length = u32::try_from(r.len()).unwrap_or(u32::MAX);
    r[..4].copy_from_slice(&length.to_ne_bytes());
    r
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
        cgroup: None,
        record: None,
    };
    while let Some((kind, mut value)) = next_attribute(&mut m) {
        match kind {
            INET_DIAG_INFO => tcp_info(&mut s, value)?,
            INET_DIAG_CGROUP_ID => s.cgroup = value.u64().map(CgroupId),
            INET_DIAG_SK_BPF_STORAGES => s.record = storages(value),
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

fn storages(mut storages: Bytes<'_>) -> Option<Record> {
    while let Some((kind, mut storage)) = next_attribute(&mut storages) {
        if kind != SK_DIAG_BPF_STORAGE {
            continue;
        }
        while let Some((kind, value)) = next_attribute(&mut storage) {
            if kind == SK_DIAG_BPF_STORAGE_MAP_VALUE {
                return record(value);
            }
        }
    }
    None
}

/// `ebb_common::FlowRecord`.
fn record(mut r: Bytes<'_>) -> Option<Record> {
    r.take(16)?; // key
    let opened_at = BootTime::from_nanos(r.u64()?);
    let direction = match r.u8()? {
        ROLE_INBOUND => Direction::Inbound,
        ROLE_OUTBOUND => Direction::Outbound,
        _ => return None,
    };
    r.u8()?; // counted
    Some(Record {
        direction,
        opened_at,
        seeded: r.u8()? != 0,
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_is_found_from_both_ends_and_a_closed_one_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let (a, b) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let diag = SockDiag::open().unwrap();
        assert_eq!(diag.find(a, b).unwrap().unwrap().local, a);
        assert_eq!(diag.find(b, a).unwrap().unwrap().remote, a);
        drop((client, server));
        let gone = diag.find(b, a).unwrap();
        assert!(gone.is_none_or(|s| s.state != TcpState::Established));
    }

    #[test]
    fn a_dump_has_listeners_and_connections_with_their_byte_counts() {
        use std::io::{Read as _, Write as _};
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        client.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        let all = SockDiag::open().unwrap().dump(None).unwrap();
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
        m.extend([0; 10]);
        m.extend(body);
        m
    }

    #[test]
    fn a_reply_that_is_not_whole_is_an_error_and_never_a_short_list() {
        let parse = |bytes: &[u8]| replied(Bytes(bytes), &mut |_| {});
        assert!(parse(&message(NLMSG_DONE, &0i32.to_ne_bytes())).unwrap());
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
        assert_eq!(record(Bytes(&[0; 31])), None);
    }
}
