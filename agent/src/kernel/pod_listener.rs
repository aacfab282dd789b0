//! ebb's own listeners inside pods.
//!
//! The socket is made by a thread inside the pod's namespace, where it then belongs whoever uses it, and is
//! served by the agent's ordinary tasks. A socket keeps its namespace alive, so a listener is not to outlive
//! its pod: [`PodListener::accept`] ends when the pod's sandbox does.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{
    io::unix::AsyncFd,
    net::{TcpListener, TcpStream},
};

use super::{netns::Netns, poll};
use crate::{
    flow::{Sample, TcpState},
    ids::NetnsInode,
    lock::lock,
};

/// The accept queue of a listener. Only the kubelet has business there.
const BACKLOG: i32 = 64;

/// Both ends of a connection, the pod's first. Without what IPv6 has besides, as in the kernel's tables.
type Ends = (SocketAddr, SocketAddr);

/// What of a port is ebb's.
#[derive(Debug, Default)]
struct Use {
    listeners: usize,
    /// Those that were accepted and are open. They may outlive the listener.
    connections: HashMap<Ends, usize>,
}

/// Which ports of which namespaces are ebb's. While ebb listens on all addresses of a port, nobody else in
/// that namespace can, so a connection to it is one to ebb. Once it does not, the port may be the application's, and
/// only the connections that are left are ebb's.
#[derive(Debug, Default)]
pub(super) struct OwnPorts {
    used: Mutex<HashMap<(NetnsInode, u16), Use>>,
}

impl OwnPorts {
    /// Whether this connection in the namespace is one to ebb.
    pub(super) fn has(&self, netns: NetnsInode, local: SocketAddr, remote: SocketAddr) -> bool {
        let used = self.lock();
        let port = used.get(&(netns, local.port()));
        port.is_some_and(|used| used.has(local, remote))
    }

    /// Marks the connections to ebb's own listeners among the sockets of a namespace.
    pub(super) fn mark(&self, netns: NetnsInode, samples: &mut [Sample]) {
        let used = self.lock();
        for sample in samples.iter_mut().filter(|s| s.state != TcpState::Listen) {
            let port = used.get(&(netns, sample.local.port()));
            sample.to_wait_port = port.is_some_and(|used| used.has(sample.local, sample.remote));
        }
    }

    /// Takes a share of a port: all of it, or a connection to it.
    fn take(self: &Arc<Self>, netns: NetnsInode, port: u16, connection: Option<Ends>) -> OwnPort {
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

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(NetnsInode, u16), Use>> {
        // What a panic between two steps could leave is one that counts for longer than it is there.
        lock(&self.used)
    }
}

impl Use {
    fn has(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.listeners > 0
            || self
                .connections
                .contains_key(&(plain(local), plain(remote)))
    }

    fn count(&mut self, connection: Option<Ends>) -> &mut usize {
        match connection {
            Some(ends) => self.connections.entry(ends).or_default(),
            None => &mut self.listeners,
        }
    }

    fn is_over(&self) -> bool {
        self.listeners == 0 && self.connections.is_empty()
    }
}

/// IPv4 in IPv6 becomes IPv4, and a link-local address loses its link.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A share in a port of ebb's: as long as it is there, the connections to it, or this one, are not the pod's.
#[derive(Debug)]
pub struct OwnPort {
    ports: Arc<OwnPorts>,
    netns: NetnsInode,
    port: u16,
    /// `None`: all of the port.
    connection: Option<Ends>,
}

impl OwnPort {
    /// The share that one connection to this port keeps.
    fn connection(&self, local: SocketAddr, remote: SocketAddr) -> Self {
        let ends = (plain(local), plain(remote));
        self.ports.take(self.netns, self.port, Some(ends))
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
        if used.is_over() {
            ports.remove(&key);
        }
    }
}

/// A listener inside a pod's network namespace.
#[derive(Debug)]
pub struct PodListener {
    listener: TcpListener,
    own: OwnPort,
    /// Readable once the process that keeps the namespace has ended (pidfd_open(2)).
    process: AsyncFd<OwnedFd>,
}

impl PodListener {
    /// The next connection, with the share in the port that it keeps; `None` once the pod's sandbox is gone.
    ///
    /// # Errors
    ///
    /// The connection was gone already, or there are no descriptors left: try again after a moment.
    pub async fn accept(&self) -> io::Result<Option<(TcpStream, SocketAddr, OwnPort)>> {
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
/// The process or the namespace is gone, or the port is taken ([`io::ErrorKind::AddrInUse`]).
pub(super) fn listen_in(
    ports: &Arc<OwnPorts>,
    netns: &Netns,
    pid: u32,
    port: u16,
) -> io::Result<Opened> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(raw.ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
    // The namespace may have been opened by an earlier process of that number.
    if Netns::of_process(pid)?.inode() != netns.inode() {
        return Err(Errno::SRCH.into());
    }
    // Before there is a listener, so that no connection is ever taken for the pod's.
    let own = ports.take(netns.inode(), port, None);
    let socket = netns.run(|| Ok(dual_stack(port)?))?;
    Ok(Opened {
        socket,
        own,
        process,
    })
}

/// A listener that is not registered with the runtime yet.
pub(super) struct Opened {
    socket: OwnedFd,
    own: OwnPort,
    process: OwnedFd,
}

impl Opened {
    /// Registers it. Needs the runtime.
    ///
    /// # Errors
    ///
    /// It can't be polled.
    pub(super) fn register(self) -> io::Result<PodListener> {
        Ok(PodListener {
            listener: TcpListener::from_std(self.socket.into())?,
            own: self.own,
            process: poll::readable(self.process)?,
        })
    }
}

/// For both families, or for IPv4 where there is no IPv6.
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
    // What an agent before this one has closed may linger in TIME_WAIT.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::sample::testing::sample;

    const HERE: NetnsInode = NetnsInode(7);

    fn v4(last: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], port))
    }

    fn has_port(ports: &OwnPorts, netns: NetnsInode, port: u16) -> bool {
        ports.has(netns, v4(1, port), v4(9, 9999))
    }

    #[test]
    fn a_port_is_ebbs_as_long_as_a_listener_has_it_and_a_connection_as_long_as_it_is_open() {
        let ports = Arc::new(OwnPorts::default());
        let listener = ports.take(HERE, 9690, None);
        // As a dual-stack socket says it.
        let mapped = |a: SocketAddr| match a.ip() {
            std::net::IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), a.port()),
            std::net::IpAddr::V6(_) => a,
        };
        let (local, remote) = (v4(1, 9690), v4(2, 40_000));
        let connection = listener.connection(mapped(local), mapped(remote));
        assert!(has_port(&ports, HERE, 9690) && ports.has(HERE, local, remote));
        assert!(!has_port(&ports, HERE, 80) && !has_port(&ports, NetnsInode(8), 9690));
        drop(listener);
        // The application's by now.
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
        let own = ports.take(HERE, 9690, None);
        let mut samples = vec![sample(), sample(), sample()];
        samples[0].local.set_port(9690);
        // The pod dials somebody else's port of that number.
        samples[1].remote.set_port(9690);
        samples[2].local.set_port(9690);
        samples[2].remote = v4(2, 40_001);
        let mut marked = |netns| {
            ports.mark(netns, &mut samples);
            samples.iter().map(|s| s.to_wait_port).collect::<Vec<_>>()
        };
        assert_eq!(marked(HERE), [true, false, true]);
        assert_eq!(marked(NetnsInode(8)), [false; 3]);
        // It has been given back, and one connection is still open.
        let local = SocketAddr::new(sample().local.ip(), 9690);
        let _open = own.connection(local, v4(2, 40_001));
        drop(own);
        assert_eq!(marked(HERE), [false, false, true]);
    }

    #[tokio::test]
    async fn a_taken_port_is_refused_and_a_free_one_serves_both_families() {
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
