//! Makes the owner of an idle connection close it.
//!
//! ebb shuts down the read side of the socket (`SHUT_RD`) through a duplicate of the owner's descriptor. The server
//! then reads the end of the stream and closes, and the peer gets an orderly FIN. Shutting down the write side, or
//! destroying the socket, would lose a request that has just arrived.
//!
//! With `SHUT_RD` the server still reads such a request, but many servers abandon a request when they read the end of
//! the stream before they have answered. So before the last check, a socket filter starts to drop what the peer sends
//! ([`Blocked`]). If the check finds that the connection has changed, the filter is removed, and the peer
//! retransmits. Otherwise the server closes without having seen any part of a request.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::SocketAddr,
    os::fd::OwnedFd,
    time::Duration,
};

use aya::programs::SocketFilter;
use ebb_core::{
    clock::BootTime,
    flow::{Flow, Sample, TcpState},
    ids::{NetnsInode, SocketCookie},
};
use rustix::{
    net::{Shutdown, shutdown, sockopt::socket_cookie},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use tokio_util::sync::CancellationToken;

use super::{programs::Programs, socket_dump::look_up_connections};
use crate::linux::{netns::Netns, socket_filter};

/// A process that has a socket open, and the number of its descriptor.
type SocketOwner = (Pid, i32);

/// Closes those of `idle` that have not changed since the dump that showed them, and returns which. Skips sockets
/// with a filter of their owner's. Stops when `over` is cancelled.
pub(super) fn close_idle(
    programs: &Programs,
    netns: &Netns,
    idle: &[Flow],
    over: &CancellationToken,
) -> io::Result<Vec<SocketCookie>> {
    netns.run(|| close(programs, netns.inode(), idle, over))
}

/// Must run in the namespace.
fn close(
    programs: &Programs,
    netns: NetnsInode,
    idle: &[Flow],
    over: &CancellationToken,
) -> io::Result<Vec<SocketCookie>> {
    let flows: HashMap<_, _> = idle.iter().map(|flow| (flow.cookie, flow)).collect();
    let tuples: Vec<(SocketAddr, SocketAddr)> = idle.iter().map(|f| (f.local, f.remote)).collect();
    let mut unchanged = HashMap::new();
    for sample in look_up_connections(&programs.inspector, &tuples)? {
        if let Some(flow) = flows.get(&sample.cookie)
            && is_unchanged(&sample, flow)
        {
            unchanged.insert(sample.inode, *flow);
        }
    }
    let owners = owners(netns, &unchanged.keys().copied().collect());
    let closed = close_each(unchanged.into_iter(), over, |(inode, flow)| {
        let Some(socket) = owners.get(&inode).and_then(|owner| duplicate(*owner, flow)) else {
            return Ok(None);
        };
        // Finding the owner took a while. Check again, now that no payload can arrive.
        let Ok(blocked) = Blocked::new(&socket, programs) else {
            return Ok(None);
        };
        let now = look_up_connections(&programs.inspector, &[(flow.local, flow.remote)])?;
        // `shutdown` fails if the connection was reset after the check.
        if now.iter().any(|s| is_unchanged(s, flow))
            && blocked.leaves_time_to_shut_down()
            && shutdown(&socket, Shutdown::Read).is_ok()
        {
            blocked.make_permanent();
            return Ok(Some(flow.cookie));
        }
        Ok(None)
    });
    Ok(closed)
}

/// Closes one after the other, until `over` is cancelled or a lookup fails. In either case returns which were closed,
/// because the drain reports them.
fn close_each<T>(
    idle: impl Iterator<Item = T>,
    over: &CancellationToken,
    mut close: impl FnMut(T) -> io::Result<Option<SocketCookie>>,
) -> Vec<SocketCookie> {
    let mut closed = Vec::new();
    for flow in idle.take_while(|_| !over.is_cancelled()) {
        match close(flow) {
            Ok(cookie) => closed.extend(cookie),
            Err(e) => {
                tracing::debug!("closing idle connections: {e}");
                break;
            }
        }
    }
    closed
}

/// Whether the connection is as in the dump that showed it idle.
fn is_unchanged(sample: &Sample, flow: &Flow) -> bool {
    sample.cookie == flow.cookie
        // The owner of a half-closed connection has read the end of the stream already.
        && sample.state == TcpState::Established
        && sample.unread == 0
        && sample.unacked == 0
        && sample.payload_received() == flow.bytes_in
        && sample.bytes_acked == flow.bytes_out
}

/// After this time the filter lets payload through again, in case the agent is killed and can't detach it. The check
/// and the shutdown take microseconds, or milliseconds on a busy node.
const BLOCK_TIME: Duration = Duration::from_millis(500);

/// How much of [`BLOCK_TIME`] must be left for the shutdown.
const SHUTDOWN_TIME: Duration = Duration::from_millis(100);

/// A socket that receives no payload until this handle is dropped or [`BLOCK_TIME`] has passed. Acknowledgements, FIN
/// and RST get through. The kernel does not acknowledge dropped payload, so the peer retransmits it after 200 ms or
/// more.
struct Blocked<'a> {
    socket: &'a OwnedFd,
    programs: &'a Programs,
    since: BootTime,
}

impl<'a> Blocked<'a> {
    /// Fails if the owner has locked the socket's filter, or has attached a filter, which this one would replace. Also
    /// fails if the socket still has the filter of a killed agent.
    fn new(socket: &'a OwnedFd, programs: &'a Programs) -> io::Result<Self> {
        if socket_filter::is_set(socket) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let since = BootTime::now();
        programs.block_receive_until(socket, since + BLOCK_TIME)?;
        Ok(Self {
            socket,
            programs,
            since,
        })
    }

    /// Whether the socket stays blocked until the caller has shut it down.
    fn leaves_time_to_shut_down(&self) -> bool {
        BootTime::now().since(self.since) + SHUTDOWN_TIME < BLOCK_TIME
    }

    /// Blocks the socket until it is closed: its owner must not read anything any more.
    fn make_permanent(self) {
        if let Err(e) = self.programs.block_receive(self.socket) {
            tracing::debug!("a connection that is being closed may still receive payload: {e}");
        }
        std::mem::forget(self);
    }
}

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        if let Err(e) = SocketFilter::detach(self.socket) {
            tracing::warn!("can't detach the filter that drops a connection's payload: {e}");
        }
    }
}

/// One owner of each socket, by inode, among the processes of the namespace.
fn owners(netns: NetnsInode, sockets: &HashSet<u32>) -> HashMap<u32, SocketOwner> {
    let mut found = HashMap::new();
    // Processes exit and descriptors are closed during the search, so errors are ignored.
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let inside = Netns::of_process(pid).is_ok_and(|n| n.inode() == netns);
        let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            continue;
        };
        if !inside {
            continue;
        }
        for fd in fs::read_dir(entry.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let number = fd.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(number), Some(inode)) = (number, socket_inode(&fd))
                && sockets.contains(&inode)
            {
                found.insert(inode, (process, number));
            }
        }
    }
    found
}

/// The inode in a link such as `socket:[4711]`.
fn socket_inode(fd: &fs::DirEntry) -> Option<u32> {
    let link = fs::read_link(fd.path()).ok()?;
    let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

/// Duplicates the owner's descriptor, if it still is this flow's socket. Pids and descriptor numbers are reused.
fn duplicate((process, number): SocketOwner, flow: &Flow) -> Option<OwnedFd> {
    let pidfd = pidfd_open(process, PidfdFlags::empty()).ok()?;
    let socket = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok()?;
    (socket_cookie(&socket).ok()? == flow.cookie.0).then_some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_flows_are_returned_even_if_a_lookup_fails_later_or_the_drain_is_over() {
        let over = CancellationToken::new();
        let closed = close_each(1..9, &over, |n| match n {
            2 => Ok(None),
            4 => Err(io::ErrorKind::TimedOut.into()),
            n => Ok(Some(SocketCookie(n))),
        });
        assert_eq!(closed, [SocketCookie(1), SocketCookie(3)]);
        let closed = close_each(1..9, &over, |n| {
            over.cancel();
            Ok(Some(SocketCookie(n)))
        });
        assert_eq!(closed, [SocketCookie(1)]);
    }
}
