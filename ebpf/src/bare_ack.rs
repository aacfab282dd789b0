//! Whether the peer's last word was a bare acknowledgement (`iter/tcp`).
//!
//! The kernel's times of the last data sent and received have jiffy resolution: a fast answer carries the
//! same time as its request, and so does a request that follows hard upon the previous answer. The sequence
//! numbers tell them apart: each segment from the peer leaves its own in `snd_wl1` (`tcp_update_wl` in
//! net/ipv4/tcp_input.c), and only one without data has the number that is expected next. So has the answer
//! to a keep-alive probe, which acknowledges no data; the time when data was last acknowledged
//! (`tcp_rate_gen` in net/ipv4/tcp_rate.c) stays what it was before the probe.

use aya_ebpf::helpers::bpf_get_socket_cookie;
use ebb_common::{BareAck, tcp_state::ESTABLISHED};

use crate::{
    iter::{self, IterTcp},
    sock::Sock,
};

/// Writes a [`BareAck`] for each socket for which it is so. Returns 0: show the next one.
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
    if sock.state() == ESTABLISHED
        && sock.received_up_to().is_some()
        && sock.received_up_to() == sock.window_updated_by()
    {
        // SAFETY: a full socket, from the walk.
        let cookie = unsafe { bpf_get_socket_cookie(sk.cast_mut()) };
        let found = BareAck {
            cookie,
            delivered_at: sock.delivered_at().unwrap_or(0),
            touched_at: sock.touched_at().unwrap_or(u64::MAX),
        };
        // SAFETY: the kernel passes a valid context.
        unsafe { iter::write(ctx, found) };
    }
    0
}
