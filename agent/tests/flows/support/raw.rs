//! The system calls that have no safe interface.

#![allow(
    unsafe_code,
    reason = "socket options and ioctls take pointers; the calls here pass whole values that outlive them"
)]

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd},
};

use rustix::thread::{UnshareFlags, unshare_unsafe};

fn check(status: libc::c_int) -> io::Result<libc::c_int> {
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status)
}

/// Gives the calling thread a descriptor table of its own, with nothing but the standard streams in it: the
/// limit of open files is one per table. What the thread had open before it must not touch again.
pub(crate) fn own_descriptors() -> io::Result<()> {
    // SAFETY: no pointers; the other threads keep their table.
    let status = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_UNSHARE,
        )
    };
    check(status as libc::c_int).map(drop)
}

/// Moves the calling thread into a new network namespace.
pub(super) fn unshare_network() -> io::Result<()> {
    // SAFETY: unsafe for file descriptor tables, which NEWNET leaves alone.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(Into::into)
}

/// As `ip link set lo up`, in the namespace of `socket`.
pub(super) fn loopback_up(socket: RawFd) -> io::Result<()> {
    // SAFETY: plain data for which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: reads an ifreq.
    check(unsafe { libc::ioctl(socket, libc::SIOCSIFFLAGS, &request) }).map(drop)
}

/// Sets a socket option.
pub(crate) fn set<T: Copy>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes of a live value.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const *value).cast(),
            length,
        )
    })
    .map(drop)
}

/// From now on nothing that arrives is heard by `socket`, nor acknowledged: a socket filter drops it before
/// TCP sees it.
pub(crate) fn deafen(socket: &impl AsRawFd) -> io::Result<()> {
    let mut nothing = libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let program = libc::sock_fprog {
        len: 1,
        filter: &mut nothing,
    };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// Ends what [`deafen`] began.
pub(crate) fn undeafen(socket: &impl AsRawFd) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0i32)
}

/// A TCP (or MPTCP) stream socket.
pub(super) fn stream(family: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd =
        check(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
