//! Whether a socket has a filter.

#![allow(unsafe_code, reason = "no library has the option SO_GET_FILTER")]

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    ptr::null_mut,
};

/// Whether a filter is attached to a socket, of either kind. With no room for it, the kernel tells how long a classic one
/// is, 0 without any, and refuses to show an extended one (`sk_get_filter` in net/core/filter.c). Where it can't be
/// told there may be one.
pub(super) fn is_set(socket: &OwnedFd) -> bool {
    let mut length: libc::socklen_t = 0;
    // SAFETY: a length of 0, so the kernel writes to `length` alone, which outlives the call.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            null_mut(),
            &raw mut length,
        )
    };
    answer != 0 || length > 0
}

#[cfg(test)]
mod tests {
    use socket2::{SockFilter, SockRef};

    use super::*;

    #[test]
    fn a_filter_is_seen_and_its_end_too() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = OwnedFd::from(socket);
        assert!(!is_set(&socket));
        let all = SockFilter::new(0x06, 0, 0, u32::MAX);
        SockRef::from(&socket).attach_filter(&[all]).unwrap();
        assert!(is_set(&socket));
        SockRef::from(&socket).detach_filter().unwrap();
        assert!(!is_set(&socket));
    }
}
