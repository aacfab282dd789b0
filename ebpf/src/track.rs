//! At each TCP state change (`tp_btf/inet_sock_set_state`), before the kernel stores the new state.
//!
//! Only connections get here: request sockets (SYN received, handshake not done) and TIME_WAIT sockets
//! change no state by this way, and entering TIME_WAIT shows as CLOSE.
//!
//! The program is attached twice. The kernel never runs one inside itself on the same CPU: where an interrupt brings
//! packets in while a task's own state change is being tracked, the changes made meanwhile would be missed
//! (`recursion_misses` in kernel/bpf; under load up to four in 100,000 connections). They meet the other copy. Two
//! suffice: tasks do not preempt each other in a tracepoint, and packets are not processed inside each other.
//! The copy that comes later finds the record in the new state and is done.

use core::ffi::{c_int, c_void};

use aya_ebpf::{
    helpers::bpf_get_socket_cookie, macros::btf_tracepoint, programs::BtfTracePointContext,
};
use aya_log_ebpf::debug;
use ebb_common::{
    FlowEvent, FlowRecord, LOST_EVENT, OPENING, ROLE_INBOUND, ROLE_NONE, ROLE_OUTBOUND, Watch,
    WorkloadKey, is_open,
    tcp_state::{CLOSE, LISTEN, SYN_RECV, SYN_SENT},
};

use crate::{
    account,
    maps::{EVENTS, HOST_NETNS, WATCHED, WATCHES},
    probe,
    sock::Sock,
};

const IPPROTO_TCP: u16 = 6;
const AF_INET: u16 = 2;

#[btf_tracepoint(function = "inet_sock_set_state")]
fn track(ctx: BtfTracePointContext) -> i32 {
    changed(&ctx, true)
}

#[btf_tracepoint(function = "inet_sock_set_state")]
fn track_second(ctx: BtfTracePointContext) -> i32 {
    changed(&ctx, false)
}

#[inline(always)]
fn changed(ctx: &BtfTracePointContext, first_copy: bool) -> i32 {
    let sk: *const c_void = ctx.arg(0);
    let from: c_int = ctx.arg(1);
    let to: c_int = ctx.arg(2);
    // The kernel's states fit in a byte (`enum` in include/net/tcp_states.h).
    state_change(ctx, sk, from as u8, to as u8, first_copy);
    0
}

#[inline(always)]
fn state_change(ctx: &BtfTracePointContext, sk: *const c_void, from: u8, to: u8, first_copy: bool) {
    // From one such state to another (who closes first, what is acknowledged) nothing changes that is counted: only
    // who watches wants to know.
    if is_open(from) && is_open(to) && !is_anything_watched() {
        return;
    }
    let known = account::record(sk);
    if known.as_ref().is_some_and(|record| record.state == to) {
        return;
    }
    let record = match known {
        Some(record) => {
            record.state = to;
            if to == SYN_SENT {
                // A socket that was closed and dials again: AF_UNSPEC, or a listener that was shut down.
                record.role = ROLE_OUTBOUND;
                record.seeded = 0;
                record.probe = 0;
            }
            record
        }
        None => match first_record(ctx, sk, from, to, first_copy) {
            Some(record) => record,
            None => return,
        },
    };
    if record.role == ROLE_INBOUND {
        probe::at_listening_end(Sock(sk), record, from, to);
    } else {
        probe::at_dialling_end(Sock(sk), from, to);
    }
    account::moved_to(record, to);
    if record.role == ROLE_INBOUND
        && let Some(watch) = watch(&record.key)
    {
        report(ctx, sk, record, watch, from, to);
    }
    if to == CLOSE {
        record.role = ROLE_NONE;
    }
}

/// Gives a socket its record, if it needs one and has none.
///
/// What dials does not, as a rule: the kernel gives it a port of the ephemeral range that no listener has, later in
/// the same call (`tcp_v4_connect` in net/ipv4/tcp_ipv4.c), and by that a look knows it. What was bound to a port before is
/// remembered.
#[inline(always)]
fn first_record<'a>(
    ctx: &BtfTracePointContext,
    sk: *const c_void,
    from: u8,
    to: u8,
    first_copy: bool,
) -> Option<&'a mut FlowRecord> {
    let sock = Sock(sk);
    let role = match (from, to) {
        (LISTEN, SYN_RECV) => ROLE_INBOUND,
        (_, SYN_SENT) if sock.num() != 0 => ROLE_OUTBOUND,
        // Its birth could not be recorded: a look shows it, so that nobody may do without one.
        (SYN_RECV, _) => ROLE_NONE,
        _ => {
            // A copy that comes later has nothing to tell by that this is done.
            if first_copy {
                probe::at_dialling_end(sock, from, to);
            }
            return None;
        }
    };
    // The tracepoint also serves SCTP, DCCP and the outer sockets of MPTCP.
    if sock.protocol() != IPPROTO_TCP {
        return None;
    }
    let key = sock.workload();
    if role == ROLE_NONE {
        unreported(&key);
        return None;
    }
    let first = FlowRecord {
        key,
        opened_at: 0,
        role,
        counted: 0,
        seeded: 0,
        state: to,
        probe: 0,
        lost: 0,
        watch: 0,
    };
    let record = account::create(sk, first);
    if record.is_none() {
        account::unrecorded(sk, first_copy);
        debug!(ctx, "no memory for socket storage");
        unreported(&key);
    }
    record
}

/// Most of the time nothing is. This costs less than a lookup, in a socket or in the hash.
#[inline(always)]
fn is_anything_watched() -> bool {
    WATCHES.get(0).is_some_and(|n| *n != 0)
}

/// The watch of a workload, if there is one.
#[inline(always)]
fn watch<'a>(key: &WorkloadKey) -> Option<&'a Watch> {
    if !is_anything_watched() {
        return None;
    }
    let watch = if key.netns == HOST_NETNS.load() {
        WorkloadKey { netns: 0, ..*key }
    } else {
        WorkloadKey { cgroup: 0, ..*key }
    };
    // SAFETY: a map value: the kernel frees it no earlier than when this program is done. What changes in
    // it is changed atomically.
    WATCHED.get_ptr(watch).map(|watch| unsafe { &*watch })
}

/// Counts a change of a flow, then reports it: who has been told of as many as are counted has missed none.
#[inline(always)]
fn report(
    ctx: &BtfTracePointContext,
    sk: *const c_void,
    record: &mut FlowRecord,
    watch: &Watch,
    from: u8,
    to: u8,
) {
    // A new child shares its listener's cookie and peer until its next change (before 6.15): its birth is
    // counted, and taken back when that change is. With fast open that may be a while.
    if from == LISTEN {
        record.watch = watch.number;
        return count(watch, OPENING as i64);
    }
    let born = from == SYN_RECV && record.watch == watch.number;
    // Of a probe, which is known for one by now, nobody is told.
    let told = record.probe == 0;
    count(
        watch,
        i64::from(told) - if born { OPENING as i64 } else { 0 },
    );
    if told {
        emit(ctx, sk, &record.key, watch, from, to);
    }
}

/// Counts a change that nobody will be told of.
#[inline(always)]
fn unreported(key: &WorkloadKey) {
    if let Some(watch) = watch(key) {
        count(watch, 1);
    }
}

#[inline(always)]
fn count(watch: &Watch, n: i64) {
    account::add((&raw const watch.edges).cast(), n);
}

#[inline(always)]
fn emit(
    ctx: &BtfTracePointContext,
    sk: *const c_void,
    key: &WorkloadKey,
    watch: &Watch,
    from: u8,
    to: u8,
) {
    let Some(event) = event(sk, key, watch, from, to) else {
        return;
    };
    if EVENTS.output(event, 0).is_err() {
        account::lost(LOST_EVENT);
        debug!(ctx, "ring buffer full");
    }
}

#[inline(always)]
fn event(
    sk: *const c_void,
    key: &WorkloadKey,
    watch: &Watch,
    from: u8,
    to: u8,
) -> Option<FlowEvent> {
    let sock = Sock(sk);
    let family = sock.family();
    let (local_addr, remote_addr) = if family == AF_INET {
        (widen(sock.local_v4()), widen(sock.remote_v4()))
    } else {
        (sock.local_v6()?, sock.remote_v6()?)
    };
    Some(FlowEvent {
        at: account::now(),
        // SAFETY: `sk` is the tracepoint's own argument.
        cookie: unsafe { bpf_get_socket_cookie(sk.cast_mut()) },
        cgroup: key.cgroup,
        netns: key.netns,
        watch: u32::from(watch.number),
        local_addr,
        remote_addr,
        local_port: sock.local_port()?,
        remote_port: sock.remote_port(),
        family,
        from,
        to,
    })
}

#[inline(always)]
fn widen([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}
