//! Closing an idle connection for its owner, so that nobody notices but the two ends.
//!
//! The reading side of the socket is shut down (`SHUT_RD`) through a duplicate of the owner's descriptor:
//! the server reads the end of the stream, closes, and the peer gets an orderly FIN. A request that arrived
//! a moment before is in the queue and is answered first. Shutting down the writing side, or destroying the
//! socket, would lose it.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::fd::OwnedFd,
};

use rustix::{
    net::{Shutdown, shutdown, sockopt::socket_cookie},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{Netns, sock_diag::SockDiag};
use crate::{
    flow::{Flow, Sample, TcpState},
    ids::{NetnsInode, SocketCookie},
};

/// Who has a socket open: a process and the number of a descriptor of its.
type Owner = (Pid, i32);

/// Closes those of `idle` that have not moved since they were looked at, and returns which.
pub(super) fn idle(netns: &Netns, idle: &[Flow]) -> io::Result<Vec<SocketCookie>> {
    let diag = netns.run(SockDiag::open)?;
    let mut at_rest = HashMap::new();
    for flow in idle {
        if let Some(sample) = diag.find(flow.local, flow.remote)?
            && is_untouched(&sample, flow)
        {
            at_rest.insert(sample.inode, flow);
        }
    }
    let owners = owners(netns.inode(), &at_rest.keys().copied().collect());
    let mut closed = Vec::new();
    for (inode, flow) in at_rest {
        let Some(socket) = owners.get(&inode).and_then(|owner| duplicate(*owner, flow)) else {
            continue;
        };
        // Finding the owner took a while: look once more, right before.
        let still = diag.find(flow.local, flow.remote)?;
        if still.is_some_and(|s| is_untouched(&s, flow)) {
            // It may have been reset in this very moment.
            if shutdown(&socket, Shutdown::Read).is_ok() {
                closed.push(flow.cookie);
            }
        }
    }
    Ok(closed)
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
