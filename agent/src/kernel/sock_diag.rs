//! Dumps a namespace's TCP sockets by sock_diag over netlink.
//!
//! A dump visits the connection table of the whole node, whatever the namespace. The request is a netlink header (16
//! bytes) and `struct inet_diag_req` (60 bytes). Each reply is a header, `struct inet_diag_msg` (72 bytes) and
//! attributes: tcp_info and the cgroup id. Layouts: include/uapi/linux/{netlink,inet_diag,sock_diag,tcp}.h.
//!
//! The request is the older of the two message types. It has no address family, so one dump shows IPv4 and IPv6
//! (`inet_diag_dump_compat` sets AF_UNSPEC). The newer type needs one dump per family.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    time::Duration,
};

use ebb_core::{
    flow::{Retransmissions, Sample, TcpState},
    ids::{CgroupId, SocketCookie},
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
    sockopt,
};

use super::cursor::Cursor;

const TCPDIAG_GETSOCK: u16 = 18;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
const NLA_TYPE_MASK: u16 = 0x3fff;

const AF_INET: u8 = 2;

const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_CGROUP_ID: u16 = 21;

/// The states of [`TcpState`] except TIME_WAIT (6), whose sockets belong to no process any more, and NEW_SYN_RECV
/// (12), whose request sockets are not connections yet.
const STATES: u32 = 0xffe & !(1 << 6);

/// More than the kernel puts into one datagram of a dump, which is up to 32 KiB.
const BUFFER: usize = 64 * 1024;

/// A sock_diag socket of the namespace in which it was opened.
pub(super) struct SockDiag {
    fd: OwnedFd,
    /// Sequence number of the last request. Its replies repeat it.
    sequence: u32,
}

impl SockDiag {
    /// Opens a socket in the calling thread's network namespace. It may be used from any thread.
    pub(super) fn open() -> io::Result<Self> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(netlink::SOCK_DIAG),
        )?;
        // The kernel replies at once. The timeout only guards against a hang.
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(Duration::from_secs(5)))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Calls `each` with every TCP socket of the namespace. An incomplete reply is an error, because the missing
    /// sockets still exist.
    pub(super) fn dump(&mut self, mut each: impl FnMut(Sample)) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        send(&self.fd, &dump_request(self.sequence), SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            // With TRUNC, `n` is the length of the datagram even if the buffer is too short for it.
            let (_, n) = recv(&self.fd, buffer.as_mut_slice(), RecvFlags::TRUNC)?;
            let reply = buffer.get(..n).ok_or_else(incomplete)?;
            if read_datagram(Cursor(reply), self.sequence, &mut each)? == ReplyPart::Last {
                return Ok(());
            }
        }
    }
}

/// What a datagram contains of the reply to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReplyPart {
    Nothing,
    Middle,
    Last,
}

/// Reads a datagram, as part of the reply to the request with this sequence number.
fn read_datagram(
    mut rest: Cursor<'_>,
    request: u32,
    each: &mut impl FnMut(Sample),
) -> io::Result<ReplyPart> {
    let mut part = ReplyPart::Nothing;
    while !rest.0.is_empty() {
        let Message {
            kind,
            sequence,
            body,
            ..
        } = next_message(&mut rest).ok_or_else(incomplete)?;
        if sequence != request {
            continue;
        }
        match kind {
            NLMSG_DONE | NLMSG_ERROR => return reply_error(body).map(|()| ReplyPart::Last),
            SOCK_DIAG_BY_FAMILY | TCPDIAG_GETSOCK => each(sample(body).ok_or_else(incomplete)?),
            _ => {}
        }
        part = ReplyPart::Middle;
    }
    Ok(part)
}

fn incomplete() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's list of sockets is incomplete or malformed",
    )
}

/// The error in a message of [`NLMSG_ERROR`] or [`NLMSG_DONE`]. A dump that failed half-way also ends with NLMSG_DONE,
/// but has an error number in it.
pub(super) fn reply_error(mut body: Cursor<'_>) -> io::Result<()> {
    match body.u32().map(|n| n.cast_signed()) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A netlink message.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) body: Cursor<'a>,
}

/// Takes the next netlink message.
pub(super) fn next_message<'a>(rest: &mut Cursor<'a>) -> Option<Message<'a>> {
    let mut header = *rest;
    let length = header.u32()? as usize;
    let kind = header.u16()?;
    let flags = header.u16()?;
    let sequence = header.u32()?;
    let message = rest.take(length.max(16))?;
    let padding = length.next_multiple_of(4) - length;
    let _ = rest.take(padding.min(rest.0.len()));
    Some(Message {
        kind,
        flags,
        sequence,
        body: Cursor(message.get(16..)?),
    })
}

/// Takes the next attribute: its type and value.
pub(super) fn next_attribute<'a>(rest: &mut Cursor<'a>) -> Option<(u16, Cursor<'a>)> {
    let mut header = *rest;
    let length = usize::from(header.u16()?);
    let kind = header.u16()? & NLA_TYPE_MASK;
    let attribute = rest.take(length.max(4))?;
    let padding = length.next_multiple_of(4) - length;
    let _ = rest.take(padding.min(rest.0.len()));
    Some((kind, Cursor(attribute.get(4..)?)))
}

/// `struct inet_diag_req`: all sockets in [`STATES`].
fn dump_request(sequence: u32) -> Vec<u8> {
    const LENGTH: u32 = 16 + 4 + 48 + 4 + 4;
    let mut r = Vec::with_capacity(LENGTH as usize);
    r.extend(LENGTH.to_ne_bytes());
    r.extend(TCPDIAG_GETSOCK.to_ne_bytes());
    r.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    r.extend(sequence.to_ne_bytes());
    r.extend([0; 4]); // port id
    r.extend([0, 0, 0, 1 << (INET_DIAG_INFO - 1)]); // the kernel ignores the family and address lengths
    r.extend([0; 48]);
    r.extend(STATES.to_ne_bytes());
    r.extend(0u32.to_ne_bytes());
    r
}

/// Decodes an address of 16 bytes. An IPv4-mapped address becomes IPv4.
pub(super) fn ip(family: u8, bytes: [u8; 16]) -> IpAddr {
    let [a, b, c, d, ..] = bytes;
    if family == AF_INET {
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    } else {
        IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
    }
}

/// Decodes `struct inet_diag_msg` and its attributes; `None` if it is malformed.
fn sample(mut m: Cursor<'_>) -> Option<Sample> {
    let family = m.u8()?;
    let state = TcpState::try_from(m.u8()?).ok()?;
    m.take(2)?; // timer, retransmissions
    let (local_port, remote_port) = (m.u16_be()?, m.u16_be()?);
    let (local_addr, remote_addr) = (m.array()?, m.array()?);
    let interface = m.u32()?;
    let (cookie_low, cookie_high) = (m.u32()?, m.u32()?);
    m.take(4)?; // timer
    let (unread, unacked) = (m.u32()?, m.u32()?);
    m.take(4)?; // user
    let inode = m.u32()?;
    let mut s = Sample {
        unread,
        unacked,
        inode,
        interface,
        ..Sample::new(
            SocketCookie(u64::from(cookie_high) << 32 | u64::from(cookie_low)),
            SocketAddr::new(ip(family, local_addr), local_port),
            SocketAddr::new(ip(family, remote_addr), remote_port),
            state,
        )
    };
    while let Some((kind, mut value)) = next_attribute(&mut m) {
        match kind {
            INET_DIAG_INFO => tcp_info(&mut s, value)?,
            INET_DIAG_CGROUP_ID => s.cgroup = value.u64().map(CgroupId),
            _ => {}
        }
    }
    Some(s)
}

/// Reads fields of `struct tcp_info` at their offsets.
fn tcp_info(s: &mut Sample, info: Cursor<'_>) -> Option<()> {
    let ms = |offset| Some(Duration::from_millis(info.at(offset)?.u32()?.into()));
    let mut bytes = info.at(2)?;
    s.retransmissions = Retransmissions {
        retransmits: bytes.u8()?,
        probes: bytes.u8()?,
        backoff: bytes.u8()?,
        rto: Duration::from_micros(info.at(8)?.u32()?.into()),
    };
    s.since_sent = ms(44)?;
    s.since_received = ms(52)?;
    s.since_ack = ms(56)?;
    s.bytes_acked = info.at(120)?.u64()?;
    s.bytes_received = info.at(128)?.u64()?;
    Some(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn all(diag: &mut SockDiag) -> Vec<Sample> {
        let mut all = Vec::new();
        diag.dump(|sample| all.push(sample)).unwrap();
        all
    }

    #[test]
    fn a_dump_has_both_families_and_a_socket_can_be_used_for_several_dumps() {
        let listeners = ["127.0.0.1:0", "[::1]:0"].map(|at| TcpListener::bind(at).unwrap());
        let clients = listeners
            .each_ref()
            .map(|l| TcpStream::connect(l.local_addr().unwrap()).unwrap());
        let mut diag = SockDiag::open().unwrap();
        for _ in 0..3 {
            let all = all(&mut diag);
            for client in &clients {
                let (a, b) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
                let count = |l, r| all.iter().filter(|s| s.local == l && s.remote == r).count();
                assert_eq!((count(a, b), count(b, a)), (1, 1));
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
    fn an_incomplete_reply_is_an_error_and_not_a_short_list() {
        let parse = |bytes: &[u8]| read_datagram(Cursor(bytes), 7, &mut |_| {});
        let done = message(NLMSG_DONE, &0i32.to_ne_bytes());
        assert_eq!(parse(&done).unwrap(), ReplyPart::Last);
        let other = read_datagram(Cursor(&done), 8, &mut |_| {}).unwrap();
        assert_eq!(other, ReplyPart::Nothing, "the end of another reply");
        let failed = parse(&message(NLMSG_DONE, &(-12i32).to_ne_bytes())).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(12));
        assert!(
            parse(&message(SOCK_DIAG_BY_FAMILY, &[0xff; 72])).is_err(),
            "not a socket"
        );
        let mut cut = message(SOCK_DIAG_BY_FAMILY, &[0; 72]);
        cut.truncate(60);
        assert!(parse(&cut).is_err(), "truncated");
    }

    #[test]
    fn short_or_foreign_bytes_decode_to_nothing() {
        assert_eq!(sample(Cursor(&[2, 1, 0])), None);
        assert_eq!(sample(Cursor(&[0xff; 72])), None);
        assert!(next_message(&mut Cursor(&[1, 2, 3])).is_none());
        assert!(next_message(&mut Cursor(&[0xff; 20])).is_none());
        assert!(next_attribute(&mut Cursor(&[0, 0])).is_none());
    }
}
