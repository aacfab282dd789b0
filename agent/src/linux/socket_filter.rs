//! Tells whether a socket has a filter.

#![allow(unsafe_code, reason = "no library has the option SO_GET_FILTER")]

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    ptr::null_mut,
};

/// Whether a classic or an extended filter is attached to a socket. With an empty buffer the kernel returns the
/// length of a classic filter, 0 if there is none, and an error for an extended one (`sk_get_filter` in
/// net/core/filter.c). Any other error counts as a filter, too.
pub(crate) fn is_set(socket: &OwnedFd) -> bool {
    let mut length: libc::socklen_t = 0;
    // SAFETY: `length` is 0, so the kernel only writes to `length`, which outlives the call.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            null_mut(),
            &raw mut length,
        )
    };
    status != 0 || length > 0
}

#[cfg(test)]
mod tests {
    use socket2::{SockFilter, SockRef};

    use super::*;

    #[test]
    fn an_attached_and_a_detached_filter_are_detected() {
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
