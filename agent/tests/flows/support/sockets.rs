//! Opens, uses and closes sockets.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, listen, netlink,
    recv, send, socket_with, sockopt,
};

use super::raw;

/// Any free port of the loopback address.
pub(crate) const ANY_PORT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A listener with this backlog. `prepare` sets options before it listens.
pub(crate) fn listener_with(
    at: SocketAddr,
    backlog: i32,
    protocol: libc::c_int,
    prepare: impl FnOnce(&OwnedFd) -> Result<()>,
) -> Result<TcpListener> {
    let fd = raw::stream(family(at), protocol)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    prepare(&fd)?;
    bind(&fd, &at)?;
    listen(&fd, backlog)?;
    Ok(fd.into())
}

/// A listener on a free port of loopback.
pub(crate) fn listener(backlog: i32) -> Result<TcpListener> {
    listener_with(ANY_PORT, backlog, libc::IPPROTO_TCP, |_| Ok(()))
}

/// Dials without waiting for the handshake. `prepare` sets options first.
pub(crate) fn dial(
    to: SocketAddr,
    protocol: libc::c_int,
    prepare: impl FnOnce(&OwnedFd) -> Result<()>,
) -> Result<TcpStream> {
    let fd = raw::stream(family(to), protocol)?;
    prepare(&fd)?;
    rustix::io::ioctl_fionbio(&fd, true)?;
    match connect(&fd, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    rustix::io::ioctl_fionbio(&fd, false)?;
    Ok(fd.into())
}

/// Dials from this address, which may have been used before.
pub(crate) fn dial_from(from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let fd = raw::stream(family(to), libc::IPPROTO_TCP)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    bind(&fd, &from)?;
    connect(&fd, &to)?;
    Ok(fd.into())
}

/// A TCP socket that is not connected.
pub(crate) fn unconnected() -> Result<OwnedFd> {
    Ok(raw::stream(libc::AF_INET, libc::IPPROTO_TCP)?)
}

/// A socket of this protocol that is not connected.
pub(crate) fn unconnected_by(protocol: libc::c_int) -> Result<OwnedFd> {
    Ok(raw::stream(libc::AF_INET, protocol)?)
}

/// An accepted connection: the server's end and the client's.
pub(crate) fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(listener.local_addr()?)?;
    client.set_nodelay(true)?;
    let (server, _) = listener.accept()?;
    server.set_nodelay(true)?;
    Ok((server, client))
}

/// Closes with a reset.
pub(crate) fn reset(stream: TcpStream) -> Result<()> {
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    Ok(())
}

/// Writes until the send buffer is full; returns the number of bytes written.
pub(crate) fn fill_send_buffer(mut stream: &TcpStream) -> Result<usize> {
    stream.set_nonblocking(true)?;
    let mut written = 0;
    loop {
        match stream.write(&[7; 65536]) {
            Ok(n) => written += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(written)
}

pub(crate) fn read_bytes(mut stream: &TcpStream, n: usize) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream
        .read_exact(&mut vec![0; n])
        .with_context(|| format!("reading {n} bytes"))
}

pub(crate) fn read_to_end(mut stream: &TcpStream) -> Result<u64> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(std::io::copy(&mut stream, &mut std::io::sink())?)
}

pub(crate) fn write_bytes(mut stream: &TcpStream, n: usize) -> Result<()> {
    stream.write_all(&vec![b'x'; n])?;
    Ok(())
}

/// Destroys the socket whose own end is `local`, like `ss -K` (SOCK_DESTROY over netlink, net/ipv4/inet_diag.c). In the
/// calling thread's namespace, for IPv4 only.
pub(crate) fn destroy(local: SocketAddr, remote: SocketAddr) -> Result<()> {
    const SOCK_DESTROY: u16 = 21;
    const REQUEST_AND_ACK: u16 = 0x5;
    let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (local, remote) else {
        anyhow::bail!("only IPv4 is needed here");
    };
    let mut r = Vec::with_capacity(72);
    r.extend(72u32.to_ne_bytes());
    r.extend(SOCK_DESTROY.to_ne_bytes());
    r.extend(REQUEST_AND_ACK.to_ne_bytes());
    r.extend([0; 8]);
    r.extend([2, 6, 0, 0]); // AF_INET, IPPROTO_TCP
    r.extend(u32::MAX.to_ne_bytes()); // any state
    r.extend(local.port().to_be_bytes());
    r.extend(remote.port().to_be_bytes());
    for address in [local.ip(), remote.ip()] {
        r.extend(address.octets());
        r.extend([0; 12]);
    }
    r.extend([0; 4]); // any interface
    r.extend([0xff; 8]); // INET_DIAG_NOCOOKIE
    let fd = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    send(&fd, &r, SendFlags::empty())?;
    let mut reply = [0; 1024];
    let (n, _) = recv(&fd, reply.as_mut_slice(), RecvFlags::empty())?;
    ensure!(n >= 20, "a reply of {n} bytes");
    let errno = i32::from_ne_bytes(reply[16..20].try_into()?);
    match errno {
        0 => Ok(()),
        e if e == -libc::EOPNOTSUPP => {
            anyhow::bail!("this kernel can't do the case: no CONFIG_INET_DIAG_DESTROY")
        }
        e => Err(std::io::Error::from_raw_os_error(-e)).context("SOCK_DESTROY"),
    }
}

/// Sets an integer option.
pub(crate) fn set(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: i32,
) -> Result<()> {
    raw::set(socket, level, name, &value)
        .with_context(|| format!("this kernel can't do the case: option {level}/{name}"))
}

fn family(at: SocketAddr) -> libc::c_int {
    if at.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    }
}

/// Disconnects a socket, by `connect(AF_UNSPEC)`.
pub(crate) fn disconnect(socket: &impl AsFd) -> Result<()> {
    Ok(rustix::net::connect_unspec(socket)?)
}

/// `shutdown(SHUT_RD)`, which makes a listener stop listening.
pub(crate) fn shut_reading(socket: &impl AsFd) -> Result<()> {
    Ok(rustix::net::shutdown(socket, rustix::net::Shutdown::Read)?)
}
