//! What the next agent is to know of the flows that are open when this one ends (`iter/tcp`).

use aya_ebpf::helpers::bpf_get_socket_cookie;
use ebb_common::{Remembered, RememberedFlow};

use crate::{
    account,
    iter::{self, IterTcp},
};

/// Writes a [`RememberedFlow`] for each inbound flow. Returns 0: show the next one.
///
/// # Safety
///
/// For the kernel to call.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
unsafe extern "C" fn remember(ctx: *const IterTcp) -> i32 {
    // SAFETY: the kernel passes a valid context.
    let Some(sk) = (unsafe { iter::socket(ctx) }) else {
        return 0;
    };
    if let Some(record) = account::record(sk)
        && record.counted != 0
    {
        let found = RememberedFlow {
            // SAFETY: a full socket, from the walk.
            cookie: unsafe { bpf_get_socket_cookie(sk.cast_mut()) },
            flow: Remembered {
                opened_at: record.opened_at,
                seeded: record.seeded,
                probe: record.probe,
                zero: [0; 6],
            },
        };
        // SAFETY: the kernel passes a valid context.
        unsafe { iter::write(ctx, found) };
    }
    0
}
