//! Whether the peer's last word was a bare acknowledgement (`iter/tcp`).
//!
//! The kernel's times of the last data sent and received have jiffy resolution: a fast answer carries the
//! same time as its request, and so does a request that follows hard upon the previous answer. The sequence
//! numbers tell them apart: each segment from the peer leaves its own in `snd_wl1` (`tcp_update_wl` in
//! net/ipv4/tcp_input.c), and only one without data has the number that is expected next.

use aya_ebpf::helpers::bpf_get_socket_cookie;
use ebb_common::tcp_state::ESTABLISHED;

use crate::{
    iter::{self, IterTcp},
    sock::Sock,
};

/// Writes the cookies of the sockets for which it is so. Returns 0: show the next one.
///
/// # Safety
///
/// For the kernel to call.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
unsafe extern "C" fn bare_ack(ctx: *const IterTcp) -> i32 {
    // SAFETY: the kernel passes a valid context.
    let Some(sk) = (unsafe { iter::socket(ctx) }) else {
        return 0;
    };
    let sock = Sock(sk);
    if sock.state() == Some(ESTABLISHED)
        && sock.received_up_to().is_some()
        && sock.received_up_to() == sock.window_updated_by()
    {
        // SAFETY: a full socket, from the walk.
        let cookie = unsafe { bpf_get_socket_cookie(sk.cast_mut()) };
        // SAFETY: the kernel passes a valid context.
        unsafe { iter::write(ctx, cookie) };
    }
    0
}
