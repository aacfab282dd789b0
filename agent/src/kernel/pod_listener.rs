//! ebb's own listeners inside pods.
//!
//! A thread inside the pod's namespace creates the socket; the agent's ordinary tasks serve it. A socket keeps its
//! namespace alive, so a listener must not outlive its pod: [`PodListener::accept`] returns `None` when the pod's
//! sandbox is gone.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use ebb_core::{flow::Sample, ids::NetnsInode};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{
    io::unix::AsyncFd,
    net::{TcpListener, TcpStream},
};

use crate::linux::{async_fd, netns::Netns, sync::lock};

/// The accept queue of a listener. Only the kubelet connects to it.
const BACKLOG: i32 = 64;

/// The pod's and the peer's address of a connection, both normalised by [`plain`].
type AddrPair = (SocketAddr, SocketAddr);

/// ebb's use of a port.
#[derive(Debug, Default)]
struct PortUse {
    listeners: usize,
    /// The accepted connections that are open. They may outlive the listener.
    connections: HashMap<AddrPair, usize>,
}

/// The ports in pods' namespaces that ebb uses. While ebb listens on all addresses of a port, no other process in the
/// namespace can, so every connection to it is one to ebb. Afterwards the application may use the port, and only the
/// accepted connections that are still open are ebb's.
#[derive(Debug, Default)]
pub(super) struct OwnPorts {
    used: Mutex<HashMap<(NetnsInode, u16), PortUse>>,
}

impl OwnPorts {
    /// Whether this connection in the namespace is one to ebb.
    pub(super) fn has(&self, netns: NetnsInode, local: SocketAddr, remote: SocketAddr) -> bool {
        let used = self.lock();
        let port = used.get(&(netns, local.port()));
        port.is_some_and(|used| used.has(local, remote))
    }

    /// Marks ebb's own listeners, and the connections to them, among the sockets of a namespace.
    pub(super) fn mark(&self, netns: NetnsInode, samples: &mut [Sample]) {
        let used = self.lock();
        for sample in samples {
            let port = used.get(&(netns, sample.local.port()));
            sample.to_wait_port = port.is_some_and(|used| used.has(sample.local, sample.remote));
        }
    }

    /// Registers the use of a port: by a listener (`None`), or by one accepted connection.
    fn register(
        self: &Arc<Self>,
        netns: NetnsInode,
        port: u16,
        connection: Option<AddrPair>,
    ) -> OwnPort {
        let mut used = self.lock();
        let used = used.entry((netns, port)).or_default();
        *used.count(connection) += 1;
        OwnPort {
            ports: Arc::clone(self),
            netns,
            port,
            connection,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(NetnsInode, u16), PortUse>> {
        // After a panic in the middle of a change, at worst a use stays registered for too long.
        lock(&self.used)
    }
}

impl PortUse {
    fn has(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.listeners > 0
            || self
                .connections
                .contains_key(&(plain(local), plain(remote)))
    }

    fn count(&mut self, connection: Option<AddrPair>) -> &mut usize {
        match connection {
            Some(pair) => self.connections.entry(pair).or_default(),
            None => &mut self.listeners,
        }
    }

    fn is_unused(&self) -> bool {
        self.listeners == 0 && self.connections.is_empty()
    }
}

/// Turns an IPv4-mapped address into IPv4, and removes the scope id and flow label of IPv6, as in the kernel's tables.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// ebb's use of a port in a pod. As long as this exists, all connections to the port, or this one connection, count as
/// ebb's and not as the pod's.
#[derive(Debug)]
pub(crate) struct OwnPort {
    ports: Arc<OwnPorts>,
    netns: NetnsInode,
    port: u16,
    /// `None` for a listener.
    connection: Option<AddrPair>,
}

impl OwnPort {
    /// Registers an accepted connection to this port.
    fn connection(&self, local: SocketAddr, remote: SocketAddr) -> Self {
        let pair = (plain(local), plain(remote));
        self.ports.register(self.netns, self.port, Some(pair))
    }
}

impl Drop for OwnPort {
    fn drop(&mut self) {
        let key = (self.netns, self.port);
        let mut ports = self.ports.lock();
        let Some(used) = ports.get_mut(&key) else {
            return;
        };
        *used.count(self.connection) -= 1;
        used.connections.retain(|_, n| *n > 0);
        if used.is_unused() {
            ports.remove(&key);
        }
    }
}

/// A listener inside a pod's network namespace.
#[derive(Debug)]
pub(crate) struct PodListener {
    listener: TcpListener,
    own: OwnPort,
    /// A pidfd of the process that keeps the namespace: readable when it has exited (pidfd_open(2)).
    process: AsyncFd<OwnedFd>,
}

impl PodListener {
    /// The next connection; `None` when the pod's sandbox is gone. Keep the [`OwnPort`] as long as the connection is
    /// open.
    ///
    /// # Errors
    ///
    /// The connection was closed before it was accepted, or no descriptors are left. Retry after a moment.
    pub(crate) async fn accept(&self) -> io::Result<Option<(TcpStream, SocketAddr, OwnPort)>> {
        tokio::select! {
            biased;
            ended = self.process.readable() => ended.map(|_| None),
            accepted = self.listener.accept() => {
                let (stream, remote) = accepted?;
                let own = self.own.connection(stream.local_addr()?, remote);
                Ok(Some((stream, remote, own)))
            }
        }
    }
}

/// Listens on all addresses of a port in the namespace of `pid`, which must be `netns`. Blocking.
///
/// # Errors
///
/// The process or the namespace is gone, or the port is in use ([`io::ErrorKind::AddrInUse`]).
pub(super) fn listen_in(
    ports: &Arc<OwnPorts>,
    netns: &Netns,
    pid: u32,
    port: u16,
) -> io::Result<OpenedListener> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(raw.ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
    // Pids are reused: `netns` may have been opened through an earlier process with this pid.
    if Netns::of_process(pid)?.inode() != netns.inode() {
        return Err(Errno::SRCH.into());
    }
    // Before the socket listens, so that no connection to it counts as the pod's.
    let own = ports.register(netns.inode(), port, None);
    let socket = netns.run(|| Ok(dual_stack(port)?))?;
    Ok(OpenedListener {
        socket,
        own,
        process,
    })
}

/// A listener that is not registered with the async runtime yet.
pub(super) struct OpenedListener {
    socket: OwnedFd,
    own: OwnPort,
    process: OwnedFd,
}

impl OpenedListener {
    /// Registers the listener. Must run on the async runtime.
    ///
    /// # Errors
    ///
    /// The listener or the pidfd can't be polled.
    pub(super) fn register(self) -> io::Result<PodListener> {
        Ok(PodListener {
            listener: TcpListener::from_std(self.socket.into())?,
            own: self.own,
            process: async_fd::readable(self.process)?,
        })
    }
}

/// A listening socket for IPv4 and IPv6, or for IPv4 alone if the namespace has no IPv6.
fn dual_stack(port: u16) -> Result<OwnedFd, Errno> {
    let v6 = socket(AddressFamily::INET6).and_then(|socket| {
        sockopt::set_ipv6_v6only(&socket, false)?;
        bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
        Ok(socket)
    });
    let socket = match v6 {
        Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
            let socket = socket(AddressFamily::INET)?;
            bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
            socket
        }
        v6 => v6?,
    };
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn socket(family: AddressFamily) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // Connections of an earlier agent may be in TIME_WAIT.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::flow::sample::testing::sample;

    const HERE: NetnsInode = NetnsInode(7);

    fn v4(last: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], port))
    }

    fn has_port(ports: &OwnPorts, netns: NetnsInode, port: u16) -> bool {
        ports.has(netns, v4(1, port), v4(9, 9999))
    }

    #[test]
    fn a_port_is_ebbs_while_ebb_listens_and_a_connection_while_it_is_open() {
        let ports = Arc::new(OwnPorts::default());
        let listener = ports.register(HERE, 9690, None);
        // A dual-stack socket reports IPv4 addresses like this.
        let mapped = |a: SocketAddr| match a.ip() {
            std::net::IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), a.port()),
            std::net::IpAddr::V6(_) => a,
        };
        let (local, remote) = (v4(1, 9690), v4(2, 40_000));
        let connection = listener.connection(mapped(local), mapped(remote));
        assert!(has_port(&ports, HERE, 9690) && ports.has(HERE, local, remote));
        assert!(!has_port(&ports, HERE, 80) && !has_port(&ports, NetnsInode(8), 9690));
        drop(listener);
        // The application may use the port now.
        assert!(!has_port(&ports, HERE, 9690));
        assert!(!ports.has(HERE, local, v4(2, 40_001)) && !ports.has(HERE, local, v4(3, 40_000)));
        assert!(ports.has(HERE, local, remote));
        drop(connection);
        assert!(!ports.has(HERE, local, remote));
        assert!(ports.lock().is_empty());
    }

    #[test]
    fn only_connections_to_the_port_in_that_namespace_are_marked() {
        let ports = Arc::new(OwnPorts::default());
        let own = ports.register(HERE, 9690, None);
        let mut samples = vec![sample(), sample(), sample()];
        samples[0].local.set_port(9690);
        // The pod dials the same port number of a peer.
        samples[1].remote.set_port(9690);
        samples[2].local.set_port(9690);
        samples[2].remote = v4(2, 40_001);
        let mut marked = |netns| {
            ports.mark(netns, &mut samples);
            samples.iter().map(|s| s.to_wait_port).collect::<Vec<_>>()
        };
        assert_eq!(marked(HERE), [true, false, true]);
        assert_eq!(marked(NetnsInode(8)), [false; 3]);
        // ebb no longer listens, but one connection is still open.
        let local = SocketAddr::new(sample().local.ip(), 9690);
        let _open = own.connection(local, v4(2, 40_001));
        drop(own);
        assert_eq!(marked(HERE), [false, false, true]);
    }

    #[tokio::test]
    async fn a_port_in_use_is_refused_and_a_free_one_serves_both_families() {
        let ports = Arc::new(OwnPorts::default());
        let pid = std::process::id();
        let here = Netns::of_process(pid).unwrap();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let refused = listen_in(&ports, &here, pid, port).err().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        assert!(!has_port(&ports, here.inode(), port));
        drop(taken);
        let own = listen_in(&ports, &here, pid, port)
            .unwrap()
            .register()
            .unwrap();
        assert!(has_port(&ports, here.inode(), port));
        let _v4 = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let (_, remote, _) = own.accept().await.unwrap().unwrap();
        assert!(remote.ip().to_canonical().is_loopback());
        if std::path::Path::new("/proc/net/if_inet6").exists()
            && TcpStream::connect(("::1", port)).await.is_ok()
        {
            let (_, remote, _) = own.accept().await.unwrap().unwrap();
            assert!(remote.is_ipv6());
        }
    }
}
