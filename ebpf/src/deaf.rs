//! Socket filters (`SO_ATTACH_BPF`) that drop what carries payload, for connections that are being closed. The kernel
//! asks a socket's filter before TCP sees a segment, and shows it from the TCP header on (`tcp_filter` in
//! net/ipv4/tcp_ipv4.c). What is dropped is not acknowledged: the peer sends it again.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_ktime_get_boot_ns, programs::SkBuffContext};

use crate::maps::DEAF_UNTIL;

/// All of the segment. A filter answers how much of it to keep.
const TAKE: i64 = u32::MAX as i64;

const DROP: i64 = 0;

/// Drops payload up to the moment in [`DEAF_UNTIL`]. The filter outlives an agent that is killed, the deafness must not.
///
/// # Safety
///
/// For the kernel to call.
#[unsafe(link_section = "socket")]
#[unsafe(no_mangle)]
unsafe extern "C" fn deaf_for_now(ctx: *mut __sk_buff) -> i64 {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    match DEAF_UNTIL.get(0) {
        Some(until) if now < *until => without_payload(&SkBuffContext::new(ctx)),
        _ => TAKE,
    }
}

/// Drops payload.
///
/// # Safety
///
/// For the kernel to call.
#[unsafe(link_section = "socket")]
#[unsafe(no_mangle)]
unsafe extern "C" fn deaf(ctx: *mut __sk_buff) -> i64 {
    without_payload(&SkBuffContext::new(ctx))
}

#[inline(always)]
fn without_payload(segment: &SkBuffContext) -> i64 {
    // The upper half of byte 12 is the header's length in words.
    match segment.load::<u8>(12) {
        Ok(offset) if segment.len() > u32::from(offset >> 4) * 4 => DROP,
        _ => TAKE,
    }
}
