//! Closing an idle connection for its owner, so that nobody notices but the two ends.
//!
//! The reading side of the socket is shut down (`SHUT_RD`) through a duplicate of the owner's descriptor:
//! the server reads the end of the stream, closes, and the peer gets an orderly FIN. Shutting down the
//! writing side, or destroying the socket, would lose a request that has just arrived. This way it is read,
//! but many servers give up a request when they read the end of the stream before they have answered, and a
//! request may arrive until they do. So from before the last look on, what the peer sends is dropped before it
//! gets to the socket ([`Deaf`]): either the connection turns out to have moved, and the peer sends it again,
//! or the server closes, without having seen the half of it.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::fd::OwnedFd,
    sync::Mutex,
    time::Duration,
};

use aya::programs::SocketFilter;
use rustix::{
    net::{Shutdown, shutdown, sockopt::socket_cookie},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use tokio_util::sync::CancellationToken;

use super::{Netns, filter, pool::DiagPool, programs::Programs, sock_diag::SockDiag};
use crate::{
    clock::BootTime,
    flow::{Flow, Sample, TcpState},
    ids::{NetnsInode, SocketCookie},
    lock::lock,
};

/// Who has a socket open: a process and the number of a descriptor of its.
type Owner = (Pid, i32);

/// Closes those of `idle` that have not moved since they were looked at, and returns which. Those whose owner filters
/// what they get are left alone. Ends where it is once there is nothing to close them for any more.
pub(super) fn idle(
    programs: &Mutex<Programs>,
    pool: &DiagPool,
    idle: &[Flow],
    over: &CancellationToken,
) -> io::Result<Vec<SocketCookie>> {
    pool.ask(|diag| close(programs, diag, pool.netns().inode(), idle, over))
}

fn close(
    programs: &Mutex<Programs>,
    diag: &mut SockDiag,
    netns: NetnsInode,
    idle: &[Flow],
    over: &CancellationToken,
) -> io::Result<Vec<SocketCookie>> {
    let mut at_rest = HashMap::new();
    for flow in idle {
        if let Some(sample) = diag.find(flow.local, flow.remote)?
            && is_untouched(&sample, flow)
        {
            at_rest.insert(sample.inode, flow);
        }
    }
    let owners = owners(netns, &at_rest.keys().copied().collect());
    let closed = each(at_rest.into_iter(), over, |(inode, flow)| {
        let Some(socket) = owners.get(&inode).and_then(|owner| duplicate(*owner, flow)) else {
            return Ok(None);
        };
        // Finding the owner took a while: look once more, now that nothing can arrive.
        let Ok(deaf) = Deaf::new(&socket, programs) else {
            return Ok(None);
        };
        let still = diag.find(flow.local, flow.remote)?;
        // It may have been reset in this very moment.
        if still.is_some_and(|s| is_untouched(&s, flow))
            && deaf.lasts()
            && shutdown(&socket, Shutdown::Read).is_ok()
        {
            deaf.for_good();
            return Ok(Some(flow.cookie));
        }
        Ok(None)
    });
    Ok(closed)
}

/// Closes one after the other, until it is over or the kernel does not answer any more; returns which were closed by then,
/// since those are to be told of in any case.
fn each<T>(
    idle: impl Iterator<Item = T>,
    over: &CancellationToken,
    mut close: impl FnMut(T) -> io::Result<Option<SocketCookie>>,
) -> Vec<SocketCookie> {
    let mut closed = Vec::new();
    for one in idle.take_while(|_| !over.is_cancelled()) {
        match close(one) {
            Ok(cookie) => closed.extend(cookie),
            Err(e) => {
                tracing::debug!("closing idle connections: {e}");
                break;
            }
        }
    }
    closed
}

/// Nothing has moved on the connection since the look that called it idle.
fn is_untouched(sample: &Sample, flow: &Flow) -> bool {
    sample.cookie == flow.cookie
        // A half-closed one has nothing to read any more: its owner knows already.
        && sample.state == TcpState::Established
        && sample.unread == 0
        && sample.unacked == 0
        && sample.payload_received() == flow.bytes_in
        && sample.bytes_acked == flow.bytes_out
}

/// How long a socket stays deaf if this process comes to its end meanwhile: then nobody lets it hear again. Looking and
/// shutting down take some microseconds, more where another process keeps sock_diag busy.
const DEAF_FOR: Duration = Duration::from_millis(500);

/// What has to be left of it for shutting down.
const TO_SHUT_DOWN: Duration = Duration::from_millis(100);

/// A socket that gets no payload until this is dropped, or [`DEAF_FOR`] is over. Everything else gets through:
/// acknowledgements, a FIN, a reset. What is dropped is not acknowledged, and the peer repeats it after 200 ms or more.
struct Deaf<'a> {
    socket: &'a OwnedFd,
    programs: &'a Mutex<Programs>,
    since: BootTime,
}

impl<'a> Deaf<'a> {
    /// Fails where the owner has locked the socket's filter, or has one of its own, which this one would replace.
    /// So does a socket that an agent which came to its end had made deaf.
    fn new(socket: &'a OwnedFd, programs: &'a Mutex<Programs>) -> io::Result<Self> {
        if filter::is_set(socket) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let since = BootTime::now();
        lock(programs).deafen(socket, since + DEAF_FOR)?;
        Ok(Self {
            socket,
            programs,
            since,
        })
    }

    /// Whether it is sure to be deaf until the caller has shut it down.
    fn lasts(&self) -> bool {
        BootTime::now().since(self.since) + TO_SHUT_DOWN < DEAF_FOR
    }

    /// There is nothing to be read from it any more.
    fn for_good(self) {
        if let Err(e) = lock(self.programs).deafen_for_good(self.socket) {
            tracing::debug!("a connection that is being closed may hear what comes late: {e}");
        }
        std::mem::forget(self);
    }
}

impl Drop for Deaf<'_> {
    fn drop(&mut self) {
        if let Err(e) = SocketFilter::detach(self.socket) {
            tracing::warn!("can't let a connection hear again: {e}");
        }
    }
}

/// A descriptor for each socket, among the processes of the namespace. Which of several does not matter.
fn owners(netns: NetnsInode, sockets: &HashSet<u32>) -> HashMap<u32, Owner> {
    let mut found = HashMap::new();
    // Processes and descriptors come and go while this looks: what can't be read is gone.
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

/// A duplicate of the owner's descriptor, if it still is this flow's socket: numbers are reused.
fn duplicate((process, number): Owner, flow: &Flow) -> Option<OwnedFd> {
    let pidfd = pidfd_open(process, PidfdFlags::empty()).ok()?;
    let socket = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok()?;
    (socket_cookie(&socket).ok()? == flow.cookie.0).then_some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_closed_is_told_of_also_if_the_kernel_then_fails_or_the_drain_is_over() {
        let over = CancellationToken::new();
        let closed = each(1..9, &over, |n| match n {
            2 => Ok(None),
            4 => Err(io::ErrorKind::TimedOut.into()),
            n => Ok(Some(SocketCookie(n))),
        });
        assert_eq!(closed, [SocketCookie(1), SocketCookie(3)]);
        let closed = each(1..9, &over, |n| {
            over.cancel();
            Ok(Some(SocketCookie(n)))
        });
        assert_eq!(closed, [SocketCookie(1)]);
    }
}
