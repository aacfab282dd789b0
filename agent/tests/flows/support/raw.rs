//! System calls without a safe interface.

#![allow(
    unsafe_code,
    reason = "socket options take pointers; the calls here pass whole values that outlive them"
)]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd},
};

fn check(status: libc::c_int) -> io::Result<libc::c_int> {
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status)
}

/// Gives the calling thread a descriptor table of its own with only the standard streams, because the limit of open files
/// is per table. The thread must not use a descriptor that it had before.
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

/// From now on a socket filter drops every segment for `socket` before TCP receives or acknowledges it.
pub(crate) fn block_receive(socket: &impl AsRawFd) -> io::Result<()> {
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

/// Ends what [`block_receive`] began.
pub(crate) fn unblock_receive(socket: &impl AsRawFd) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0i32)
}

/// A TCP (or MPTCP) stream socket.
pub(super) fn stream(family: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd =
        check(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: a new descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
