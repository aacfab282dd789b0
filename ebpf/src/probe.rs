//! The kubelet's probes, recognised by the socket at their other end.
//!
//! A source address says nothing: masquerading gives the kubelet's to anybody. But a client's socket becomes
//! ESTABLISHED before it sends the acknowledgement that makes the server's child (`tcp_finish_connect`, then
//! `tcp_send_ack` in net/ipv4/tcp_input.c). So where the client is the kubelet's, its connection is noted then,
//! and the child finds it when its own handshake is done, however short-lived both are. A connection whose
//! addresses are translated on its way is not found, and counts as any other.

use ebb_common::{
    Connection, FlowRecord,
    tcp_state::{CLOSE, ESTABLISHED, SYN_RECV, SYN_SENT},
};

use crate::{
    account,
    maps::{HOST_NETNS, KUBELETS, KUBELETS_KNOWN, PROBES},
    sock::Sock,
};

/// The child follows its client by the time that the acknowledgement takes; one lost segment is allowed for. What
/// is older is left over, and must not exempt whoever has the port now.
const FRESH: u64 = 2_000_000_000;

const AF_INET: u16 = 2;

/// Takes in a state change of an inbound flow, before it is accounted. Nothing is looked up as long as no kubelet is
/// known.
#[inline(always)]
pub(crate) fn at_listening_end(sock: Sock, record: &mut FlowRecord, from: u8, to: u8) {
    if from == SYN_RECV && to != CLOSE && kubelet_is_known() {
        record.probe = u8::from(accepted(sock) == Some(true));
    }
}

/// Takes in a state change of a socket that dials, or is no flow. Notes a connection that the kubelet dialled; doing
/// it twice does no harm. One that nobody on this node accepts goes by its age.
#[inline(always)]
pub(crate) fn at_dialling_end(sock: Sock, from: u8, to: u8) {
    if (from, to) == (SYN_SENT, ESTABLISHED)
        && kubelet_is_known()
        && is_kubelets(sock)
        && let Some(connection) = connection(sock)
    {
        // One that does not fit is a probe that counts as any flow.
        let _ = PROBES.insert(connection, account::now(), 0);
    }
}

#[inline(always)]
fn kubelet_is_known() -> bool {
    KUBELETS_KNOWN.get(0).is_some_and(|n| *n != 0)
}

/// Whether the kubelet made the socket.
#[inline(always)]
fn is_kubelets(sock: Sock) -> bool {
    sock.netns() == HOST_NETNS.load() && KUBELETS.get_ptr(sock.cgroup()).is_some()
}

/// Whether the connection's other end is the kubelet's. Each that it dialled is accepted once.
#[inline(always)]
fn accepted(sock: Sock) -> Option<bool> {
    let Connection {
        local_addr,
        remote_addr,
        local_port,
        remote_port,
    } = connection(sock)?;
    let from_its_end = &Connection {
        local_addr: remote_addr,
        remote_addr: local_addr,
        local_port: remote_port,
        remote_port: local_port,
    };
    let dialled_at = PROBES.get_ptr(from_its_end)?;
    // SAFETY: a map value, valid while the program runs; written whole, before its key could be found.
    let dialled_at = unsafe { *dialled_at };
    let _ = PROBES.remove(from_its_end);
    Some(account::now().saturating_sub(dialled_at) < FRESH)
}

/// The two ends in one form: IPv4 as IPv4-mapped IPv6, as the sockets of a listener on both have it.
#[inline(always)]
fn connection(sock: Sock) -> Option<Connection> {
    let (local_addr, remote_addr) = if sock.family() == AF_INET {
        (mapped(sock.local_v4()), mapped(sock.remote_v4()))
    } else {
        (sock.local_v6()?, sock.remote_v6()?)
    };
    Some(Connection {
        local_addr,
        remote_addr,
        local_port: sock.local_port()?,
        remote_port: sock.remote_port(),
    })
}

#[inline(always)]
fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}
