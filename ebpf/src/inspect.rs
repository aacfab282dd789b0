//! Looks up single connections and reads their sockets. The program is a classifier that is never attached: the agent
//! runs it with `BPF_PROG_TEST_RUN` on a thread inside a network namespace, and it searches that namespace.
//!
//! The lookup is the one by which the kernel finds the socket of a packet. It takes a reference, which keeps the
//! socket alive while it is read.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    helpers::{
        bpf_ktime_get_ns,
        generated::{
            bpf_for_each_map_elem, bpf_jiffies64, bpf_sk_release, bpf_skc_lookup_tcp,
            bpf_skc_to_tcp_sock,
        },
    },
    macros::classifier,
    programs::TcContext,
};
use ebb_common::{INSPECTIONS, InspectQuery, InspectResult, TUPLE_V4, TUPLE_V6, found};

use crate::{
    maps::{OPENED_AT, QUERIES, RESULTS, SLOTS},
    sock::{Sock, load, offset},
};

/// `BPF_F_CURRENT_NETNS`: the namespace of the packet's device. In a test run that is the caller's loopback.
const CURRENT_NETNS: u64 = -1_i64 as u64;

/// What all queries of a run share.
#[repr(C)]
struct Run {
    ctx: *mut c_void,
    now: u64,
    jiffies: u64,
}

/// Looks up what is in `QUERIES`. Uses a callback, because the verifier checks a callback once, but each round of a
/// loop.
#[classifier]
fn inspect(ctx: TcContext) -> i32 {
    let mut run = Run {
        ctx: ctx.as_ptr(),
        // SAFETY: no arguments, no preconditions.
        now: unsafe { bpf_ktime_get_ns() },
        // SAFETY: as above.
        jiffies: unsafe { bpf_jiffies64() },
    };
    let slots = (&raw const SLOTS).cast_mut().cast();
    // SAFETY: the callback has the signature of one for an array map, and `run` outlives the call.
    unsafe { bpf_for_each_map_elem(slots, inspect_one as *mut c_void, (&raw mut run).cast(), 0) };
    0
}

/// Looks up the connection of one query. Returns 0 to continue with the next one, 1 at the end.
///
/// # Safety
///
/// Only the kernel may call it, for an element of `SLOTS`.
unsafe extern "C" fn inspect_one(
    _map: *mut c_void,
    key: *const u32,
    _value: *mut c_void,
    run: *const Run,
) -> i64 {
    // SAFETY: the kernel passes a valid pointer.
    let slot = unsafe { *key } as usize;
    // SAFETY: as above.
    let run = unsafe { &*run };
    let (Some(queries), Some(results)) = (QUERIES.get(0), RESULTS.get_ptr_mut(0)) else {
        return 1;
    };
    if slot >= INSPECTIONS {
        return 1;
    }
    let query = &queries.each[slot];
    if query.size == 0 {
        return 1;
    }
    // SAFETY: a map value, which the agent reads after the run.
    let result = unsafe { &mut (*results).each[slot] };
    result.now = run.now;
    result.jiffies = run.jiffies;
    result.found = found::NOTHING;
    look_up(run.ctx, query, result);
    0
}

#[inline(always)]
fn look_up(ctx: *mut c_void, query: &InspectQuery, result: &mut InspectResult) {
    // The kernel only reads the tuple.
    let tuple = query.tuple.as_ptr().cast_mut().cast();
    let size = if query.size == TUPLE_V4 as u32 {
        TUPLE_V4
    } else {
        TUPLE_V6
    };
    // SAFETY: the verifier checks the arguments, and that the socket is released.
    let skc = unsafe { bpf_skc_lookup_tcp(ctx, tuple, size as u32, CURRENT_NETNS, 0) };
    if skc.is_null() {
        return;
    }
    // SAFETY: the helper accepts a socket of any kind.
    let sk: *const c_void = unsafe { bpf_skc_to_tcp_sock(skc.cast()) }.cast();
    if sk.is_null() {
        // SAFETY: every socket that the lookup returns has this field.
        result.state = unsafe { (*skc).state } as u8;
        result.found = found::OTHER;
    } else {
        read(Sock(sk), result);
    }
    // SAFETY: the lookup returned it, and it is released once.
    unsafe { bpf_sk_release(skc.cast()) };
}

#[inline(always)]
fn read(sock: Sock, result: &mut InspectResult) {
    result.cookie = sock.load(offset!(sock_common_cookie));
    result.cgroup = sock.cgroup();
    result.opened_at = opened_at(sock).unwrap_or(0);
    result.sent_at = sock.load(offset!(tcp_sock_lsndtime));
    result.received_at = sock.load(offset!(icsk_ack_lrcvtime));
    result.acked_at = sock.load(offset!(tcp_sock_rcv_tstamp));
    result.bytes_received = sock.load(offset!(tcp_sock_bytes_received));
    result.bytes_acked = sock.load(offset!(tcp_sock_bytes_acked));
    result.delivered_at = sock.load(offset!(tcp_sock_delivered_mstamp));
    result.backlog = sock.backlog();
    result.rcv_nxt = sock.load(offset!(tcp_sock_rcv_nxt));
    result.copied_seq = sock.load(offset!(tcp_sock_copied_seq));
    result.snd_wl1 = sock.load(offset!(tcp_sock_snd_wl1));
    result.write_seq = sock.load(offset!(tcp_sock_write_seq));
    result.snd_una = sock.load(offset!(tcp_sock_snd_una));
    result.rto = sock.load(offset!(icsk_rto));
    result.retransmits = sock.load(offset!(icsk_retransmits));
    result.probes = sock.load(offset!(icsk_probes_out));
    result.backoff = sock.load(offset!(icsk_backoff));
    result.state = sock.load(offset!(sock_common_state));
    result.locks = sock.user_locks();
    result.inode = sock.inode();
    let bucket: *const c_void = sock.load(offset!(icsk_bind_hash));
    result.bound = u8::from(!bucket.is_null());
    result.fast_reuse = load(bucket, offset!(bind_bucket_fastreuse));
    result.found = found::CONNECTION;
}

#[inline(always)]
fn opened_at(sock: Sock) -> Option<u64> {
    let key = sock.stamp_key();
    key.time_of(*OPENED_AT.get(key.slot())?)
}
