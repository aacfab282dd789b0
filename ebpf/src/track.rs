//! At each TCP state change (`tp_btf/inet_sock_set_state`), before the kernel stores the new state.
//!
//! Only connections get here: request sockets (SYN received, handshake not done) and TIME_WAIT sockets
//! change no state by this way, and entering TIME_WAIT shows as CLOSE.
//!
//! The program is attached three times. The kernel never runs one inside itself on the same CPU: where another
//! task preempts it, or an interrupt brings packets in (`lock_sock` leaves both on), the changes made meanwhile
//! would be missed (`recursion_misses` in kernel/bpf; under load up to four in 100,000 connections). They meet
//! the second copy, and what interrupts that one the third: with two copies one change in some millions was still
//! missed. Whichever comes later finds the record in the new state and is done.

use core::ffi::{c_int, c_void};

use aya_ebpf::{
    helpers::bpf_get_socket_cookie, macros::btf_tracepoint, programs::BtfTracePointContext,
};
use aya_log_ebpf::debug;
use ebb_common::{
    FlowEvent, FlowRecord, LOST_EVENT, ROLE_INBOUND, ROLE_NONE, ROLE_OUTBOUND, WorkloadKey,
    tcp_state::{CLOSE, LISTEN, SYN_RECV, SYN_SENT},
};

use crate::{
    account,
    maps::{EVENTS, HOST_NETNS, WATCHED, WATCHES},
    sock::Sock,
};

const IPPROTO_TCP: u16 = 6;
const AF_INET: u16 = 2;

#[btf_tracepoint(function = "inet_sock_set_state")]
fn track(ctx: BtfTracePointContext) -> i32 {
    changed(&ctx)
}

#[btf_tracepoint(function = "inet_sock_set_state")]
fn track_second(ctx: BtfTracePointContext) -> i32 {
    changed(&ctx)
}

#[btf_tracepoint(function = "inet_sock_set_state")]
fn track_third(ctx: BtfTracePointContext) -> i32 {
    changed(&ctx)
}

#[inline(always)]
fn changed(ctx: &BtfTracePointContext) -> i32 {
    let sk: *const c_void = ctx.arg(0);
    let from: c_int = ctx.arg(1);
    let to: c_int = ctx.arg(2);
    // The kernel's states fit in a byte (`enum` in include/net/tcp_states.h).
    state_change(ctx, sk, from as u8, to as u8);
    0
}

#[inline(always)]
fn state_change(ctx: &BtfTracePointContext, sk: *const c_void, from: u8, to: u8) {
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
            }
            record
        }
        None => {
            let role = match (from, to) {
                (LISTEN, SYN_RECV) => ROLE_INBOUND,
                // From SYN_SENT: it was dialling already when the tracker was attached.
                (_, SYN_SENT) | (SYN_SENT, _) => ROLE_OUTBOUND,
                _ => return,
            };
            let sock = Sock(sk);
            // The tracepoint also serves SCTP, DCCP and the outer sockets of MPTCP.
            if sock.protocol() != Some(IPPROTO_TCP) {
                return;
            }
            let Some(key) = sock.workload() else {
                return;
            };
            let first = FlowRecord {
                key,
                opened_at: 0,
                role,
                counted: 0,
                seeded: 0,
                state: to,
                zero: [0; 4],
            };
            let Some(record) = account::create(sk, first) else {
                debug!(ctx, "no memory for socket storage");
                return;
            };
            record
        }
    };
    account::moved_to(record, to);
    // A new child shares its listener's cookie and peer until its next change (before 6.15).
    if record.role == ROLE_INBOUND && from != LISTEN && is_watched(&record.key) {
        emit(ctx, sk, record.key, from, to);
    }
    if to == CLOSE {
        record.role = ROLE_NONE;
    }
}

#[inline(always)]
fn is_watched(key: &WorkloadKey) -> bool {
    // Most of the time nothing is, and this costs less than a lookup in the hash.
    if WATCHES.get(0).is_none_or(|n| *n == 0) {
        return false;
    }
    let watch = if key.netns == HOST_NETNS.load() {
        WorkloadKey { netns: 0, ..*key }
    } else {
        WorkloadKey { cgroup: 0, ..*key }
    };
    WATCHED.get_ptr(watch).is_some()
}

#[inline(always)]
fn emit(ctx: &BtfTracePointContext, sk: *const c_void, key: WorkloadKey, from: u8, to: u8) {
    let Some(event) = event(sk, key, from, to) else {
        return;
    };
    if EVENTS.output(event, 0).is_err() {
        account::lost(LOST_EVENT);
        debug!(ctx, "ring buffer full");
    }
}

#[inline(always)]
fn event(sk: *const c_void, key: WorkloadKey, from: u8, to: u8) -> Option<FlowEvent> {
    let sock = Sock(sk);
    let family = sock.family()?;
    let (local_addr, remote_addr) = if family == AF_INET {
        (widen(sock.local_v4()?), widen(sock.remote_v4()?))
    } else {
        (sock.local_v6()?, sock.remote_v6()?)
    };
    Some(FlowEvent {
        at: account::now(),
        // SAFETY: `sk` is the tracepoint's own argument.
        cookie: unsafe { bpf_get_socket_cookie(sk.cast_mut()) },
        key,
        local_addr,
        remote_addr,
        local_port: sock.local_port()?,
        remote_port: sock.remote_port()?,
        family,
        from,
        to,
    })
}

#[inline(always)]
fn widen([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}
