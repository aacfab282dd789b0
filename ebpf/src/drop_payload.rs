//! Socket filters (`SO_ATTACH_BPF`) that drop segments with payload, for connections that ebb closes. The kernel runs
//! a socket's filter before TCP processes a segment, and passes the segment from the TCP header on (`tcp_filter` in
//! net/ipv4/tcp_ipv4.c). A dropped segment is not acknowledged, so the peer sends it again.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_ktime_get_boot_ns, programs::SkBuffContext};

use crate::maps::DROP_UNTIL;

/// A filter returns how many bytes of the segment to keep.
const KEEP: i64 = u32::MAX as i64;

const DROP: i64 = 0;

/// Drops segments with payload until the time in [`DROP_UNTIL`]. The filter stays attached if the agent is killed,
/// and must not drop for ever.
///
/// # Safety
///
/// Only the kernel may call it.
#[unsafe(link_section = "socket")]
#[unsafe(no_mangle)]
unsafe extern "C" fn drop_payload_for_now(ctx: *mut __sk_buff) -> i64 {
    // SAFETY: no arguments, no preconditions.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    match DROP_UNTIL.get(0) {
        Some(until) if now < *until => drop_if_payload(&SkBuffContext::new(ctx)),
        _ => KEEP,
    }
}

/// Drops segments with payload.
///
/// # Safety
///
/// Only the kernel may call it.
#[unsafe(link_section = "socket")]
#[unsafe(no_mangle)]
unsafe extern "C" fn drop_payload(ctx: *mut __sk_buff) -> i64 {
    drop_if_payload(&SkBuffContext::new(ctx))
}

#[inline(always)]
fn drop_if_payload(segment: &SkBuffContext) -> i64 {
    // The upper half of byte 12 is the length of the TCP header in words.
    match segment.load::<u8>(12) {
        Ok(offset) if segment.len() > u32::from(offset >> 4) * 4 => DROP,
        _ => KEEP,
    }
}
