//! Counts accepted connections at each TCP state change (`tp_btf/inet_sock_set_state`), before the kernel stores the
//! new state.
//!
//! The tracepoint only covers connections: request sockets (SYN received, handshake not done) and TIME_WAIT sockets
//! change their state without it, and entering TIME_WAIT shows as CLOSE.
//!
//! The kernel skips the program for a state change while it is already running on that CPU, and counts that in
//! `recursion_misses`. When the number changes, the agent dumps the sockets again.
//!
//! For the gaps between openings, the kubelet's probes do not count. A probe's own end opens before the pod's, on the
//! same node, so the program notes it there (`PROBES`).

use core::ffi::{c_int, c_void};

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_socket_cookie, bpf_ktime_get_boot_ns, generated::bpf_jiffies64},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::debug;
use ebb_common::{
    DIALLED, FlowEvent, LIFETIMES_MS, LOST_COUNT, LOST_EVENT, PROBE_DIALS, ProbeDial, TICK_SHIFT,
    Workload, WorkloadKey, WorkloadWatch, is_open, stamp_time,
    tcp_state::{SYN_RECV, SYN_SENT},
    user_locks,
};

use crate::{
    maps::{
        EVENTS, HOST_NETNS, JIFFY, KUBELET, LOST, OPENED_AT, PROBES, WATCHED, WATCHED_COUNT,
        WORKLOADS,
    },
    sock::{AF_INET, Sock},
};

const IPPROTO_TCP: u16 = 6;

#[btf_tracepoint(function = "inet_sock_set_state")]
fn track(ctx: BtfTracePointContext) -> i32 {
    let sk: *const c_void = ctx.arg(0);
    let from: c_int = ctx.arg(1);
    let to: c_int = ctx.arg(2);
    // The kernel's states fit in a byte (`enum` in include/net/tcp_states.h).
    let (was, is) = (is_open(from as u8), is_open(to as u8));
    if was != is {
        opened_or_closed(&ctx, sk, from as u8, is);
    }
    0
}

#[inline(always)]
fn opened_or_closed(ctx: &BtfTracePointContext, sk: *const c_void, from: u8, opened: bool) {
    let sock = Sock(sk);
    if opened && from == SYN_SENT {
        note_probe(sock);
    }
    let Some(evidence) = evidence(sock) else {
        return;
    };
    // The tracepoint also serves SCTP, DCCP and the outer sockets of MPTCP.
    if sock.protocol() != IPPROTO_TCP {
        return;
    }
    let now = jiffies();
    let key;
    if opened {
        let accepted =
            from == SYN_RECV && (evidence == OriginEvidence::Backlog || !sock.is_owned());
        if !accepted {
            if evidence == OriginEvidence::Backlog {
                put_stamp(sock, DIALLED);
            }
            return;
        }
        key = sock.workload();
        // On the host's network, addresses do not tell one pod from another.
        let within_pod = key.netns != HOST_NETNS.load() && sock.has_one_address();
        let by_client = !within_pod && !take_probe(sock);
        count(&key, |workload| {
            add(&raw const workload.opened, 1);
            if by_client {
                count_arrival(workload, now);
            }
        });
        // After the atomic additions, because these would wait for this store, whose target is rarely in a cache.
        put_stamp(sock, now);
    } else {
        let since = take_stamp(sock);
        if since == Some(DIALLED) || (since.is_none() && evidence == OriginEvidence::Nothing) {
            return;
        }
        key = sock.workload();
        count(&key, |workload| match since {
            Some(since) => count_lifetime(workload, stamp_time(now).saturating_sub(since)),
            None => add(&raw const workload.closed_unstamped, 1),
        });
    }
    if let Some(watch) = watch(&key) {
        report(ctx, sk, &key, watch, opened);
    }
}

/// Why a socket may have been accepted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OriginEvidence {
    /// It has the backlog of a listener. A socket that listened or was accepted before it was connected again also
    /// has one.
    Backlog,
    /// No property shows that it was dialled. This covers accepted sockets whose listener had a backlog of 0.
    Nothing,
}

/// Why the socket may have been accepted; `None` if it was dialled. The agent's `flow/origin.rs` explains the
/// properties.
#[inline(always)]
fn evidence(sock: Sock) -> Option<OriginEvidence> {
    let locks = sock.user_locks();
    if locks & user_locks::BOUND_PORT != 0 {
        None
    } else if sock.backlog() != 0 {
        Some(OriginEvidence::Backlog)
    } else if locks & user_locks::BOUND_BY_CONNECT != 0 {
        None
    } else {
        Some(OriginEvidence::Nothing)
    }
}

/// The time of the last timer interrupt. Reading the clock would cost as much as the rest of the program.
#[inline(always)]
fn jiffies() -> u64 {
    // SAFETY: no arguments, no preconditions.
    unsafe { bpf_jiffies64() }
}

#[inline(always)]
fn put_stamp(sock: Sock, now: u64) {
    let key = sock.stamp_key();
    if let Some(slot) = OPENED_AT.get_ptr_mut(key.slot()) {
        // SAFETY: a map value. If two connections share a slot, the later one overwrites the other.
        unsafe { slot.write_volatile(key.stamp(now)) };
    }
}

/// When the connection was opened, if known. Clears the slot.
#[inline(always)]
fn take_stamp(sock: Sock) -> Option<u64> {
    let key = sock.stamp_key();
    let slot = OPENED_AT.get_ptr_mut(key.slot())?;
    // SAFETY: a map value.
    let since = key.time_of(unsafe { slot.read_volatile() })?;
    // SAFETY: as above.
    unsafe { slot.write_volatile(0) };
    Some(since)
}

#[inline(always)]
fn count(key: &WorkloadKey, what: impl FnOnce(&Workload)) {
    let found = WORKLOADS.get_ptr_mut(key).or_else(|| {
        // If another CPU was first, the insertion fails and the lookup finds that CPU's entry.
        let _ = WORKLOADS.insert(key, Workload::default(), u64::from(BPF_NOEXIST));
        WORKLOADS.get_ptr_mut(key)
    });
    match found {
        // SAFETY: a map value, valid while the program runs. Fields that other CPUs change, too, are changed
        // atomically.
        Some(workload) => what(unsafe { &*workload }),
        None => count_loss(LOST_COUNT),
    }
}

/// Adds the gap since the last opening by a client.
#[inline(always)]
fn count_arrival(workload: &Workload, now: u64) {
    let (last, gap) = (&raw const workload.last_opened, &raw const workload.gap);
    // SAFETY: a map value. If several CPUs write, any of their values will do: a gap that is lost is one of many.
    let since = unsafe { last.read_volatile() };
    // SAFETY: as above.
    unsafe { last.cast_mut().write_volatile(now) };
    if since != 0 && now > since {
        let nanoseconds = (now - since).wrapping_mul(JIFFY.load());
        // SAFETY: as above.
        let before = unsafe { gap.read_volatile() };
        // SAFETY: as above.
        unsafe { gap.cast_mut().write_volatile(before.with(nanoseconds)) };
    }
}

/// If the kubelet dialled this connection, notes it. The other end opens next.
#[inline(always)]
fn note_probe(sock: Sock) {
    let Some(kubelet) = KUBELET.get(0) else {
        return;
    };
    let cgroup = sock.cgroup();
    if cgroup == 0 || !kubelet.each.contains(&cgroup) {
        return;
    }
    let (Some(address), Some(from)) = (sock.remote(), sock.local_port()) else {
        return;
    };
    if let Some(place) = PROBES.get_ptr_mut(u32::from(from) % PROBE_DIALS as u32) {
        let to = sock.remote_port();
        // SAFETY: a map value. If two probes share a place, the later one overwrites the other, which then counts as a
        // client.
        unsafe {
            place.write_volatile(ProbeDial {
                address,
                from,
                to,
                zero: 0,
            })
        };
    }
}

/// Whether the kubelet has dialled this connection. Clears the note.
#[inline(always)]
fn take_probe(sock: Sock) -> bool {
    let from = sock.remote_port();
    let Some(place) = PROBES.get_ptr_mut(u32::from(from) % PROBE_DIALS as u32) else {
        return false;
    };
    // SAFETY: a map value. Another CPU may be writing it: a mixture of two dials is that of neither, or of no probe.
    let dial = unsafe { place.read_volatile() };
    if dial.from != from {
        return false;
    }
    let (Some([start, end]), Some(to)) = (sock.local(), sock.local_port()) else {
        return false;
    };
    if dial.to != to || dial.address[0] != start || dial.address[1] != end {
        return false;
    }
    let none = ProbeDial { from: 0, ..dial };
    // SAFETY: as above.
    unsafe { place.write_volatile(none) };
    true
}

/// Adds the lifetime of a closed connection to the sum and the histogram.
#[inline(always)]
fn count_lifetime(workload: &Workload, jiffies: u64) {
    let ticks = jiffies.wrapping_mul(JIFFY.load()) >> TICK_SHIFT;
    add(&raw const workload.lifetime_ticks, ticks as i64);
    let mut bucket = &raw const workload.lifetimes[LIFETIMES_MS.len()];
    for (bound, this) in LIFETIMES_MS.iter().zip(&workload.lifetimes) {
        if ticks <= (bound * 1_000_000) >> TICK_SHIFT {
            bucket = this;
            break;
        }
    }
    add(bucket, 1);
}

/// The watch of a workload, if there is one.
#[inline(always)]
fn watch<'a>(key: &WorkloadKey) -> Option<&'a WorkloadWatch> {
    // Most of the time no workload is watched, and this check costs less than a lookup in the hash map.
    if WATCHED_COUNT.get(0).is_none_or(|n| *n == 0) {
        return None;
    }
    let watch = if key.netns == HOST_NETNS.load() {
        WorkloadKey { netns: 0, ..*key }
    } else {
        WorkloadKey { cgroup: 0, ..*key }
    };
    // SAFETY: a map value, which the kernel does not free before this program returns. Its fields are changed
    // atomically.
    WATCHED.get_ptr(watch).map(|watch| unsafe { &*watch })
}

/// Counts an event, then sends it. If the agent has received as many events as are counted, it has missed none.
#[inline(always)]
fn report(
    ctx: &BtfTracePointContext,
    sk: *const c_void,
    key: &WorkloadKey,
    watch: &WorkloadWatch,
    opened: bool,
) {
    add(&raw const watch.sent, 1);
    let Some(event) = event(sk, key, watch, opened) else {
        return count_loss(LOST_EVENT);
    };
    if EVENTS.output(event, 0).is_err() {
        count_loss(LOST_EVENT);
        debug!(ctx, "ring buffer full");
    }
}

#[inline(always)]
fn event(
    sk: *const c_void,
    key: &WorkloadKey,
    watch: &WorkloadWatch,
    opened: bool,
) -> Option<FlowEvent> {
    let sock = Sock(sk);
    let family = sock.family();
    let (local_addr, remote_addr) = if family == AF_INET {
        (widen(sock.local_v4()), widen(sock.remote_v4()))
    } else {
        (sock.local_v6()?, sock.remote_v6()?)
    };
    Some(FlowEvent {
        // SAFETY: no arguments, no preconditions.
        at: unsafe { bpf_ktime_get_boot_ns() },
        // SAFETY: `sk` is the tracepoint's own argument.
        cookie: unsafe { bpf_get_socket_cookie(sk.cast_mut()) },
        cgroup: key.cgroup,
        netns: key.netns,
        watch: watch.number,
        local_addr,
        remote_addr,
        local_port: sock.local_port()?,
        remote_port: sock.remote_port(),
        family,
        opened: u16::from(opened),
    })
}

#[inline(always)]
fn widen([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

#[inline(always)]
fn count_loss(kind: u32) {
    if let Some(n) = LOST.get_ptr(kind) {
        add(n, 1);
    }
}

/// Adds atomically. `core::sync::atomic` has no read-modify-write on the BPF target, but the intrinsic has.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn add(counter: *const u64, n: i64) {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};
    // SAFETY: an aligned field of a map value, which all writers change atomically.
    unsafe { atomic_xadd::<i64, i64, { Relaxed }>(counter.cast::<i64>().cast_mut(), n) };
}

#[cfg(not(target_arch = "bpf"))]
fn add(_: *const u64, _: i64) {}
