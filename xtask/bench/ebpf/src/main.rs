//! BPF programs that the bench compares ebb's with, and a counter.
//!
//! - [`empty`]: returns at once, so its cost is the least of any program at the same hook.
//! - [`transition`]: after BCC's tcpstates. At each state change it looks up the time since the last one in a hash keyed
//!   by socket, and sends an event that wakes the reader.
//! - [`changes`]: counts state changes, those of one port's connections and all.

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]
#![allow(unsafe_code, reason = "BPF helpers and exported symbols need unsafe")]

use aya_ebpf::{
    EbpfContext as _, Global,
    btf_maps::{Array, HashMap, RingBuf},
    helpers::bpf_ktime_get_ns,
    macros::{btf_map, btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};

/// The time of each socket's last state change.
#[btf_map]
static SINCE: HashMap<u64, u64, 65536> = HashMap::new();

#[btf_map]
static EVENTS: RingBuf<StateChange, 1048576> = RingBuf::new();

/// Numbers of state changes: on [`PORT`], and in total.
#[btf_map]
static CHANGES: Array<u64, 2> = Array::new();

/// The port whose connections are counted separately.
#[unsafe(no_mangle)]
static PORT: Global<u32> = Global::new(0);

/// BPF_RB_FORCE_WAKEUP (include/uapi/linux/bpf.h): tcpstates' perf buffer wakes its reader per event as well.
const WAKE_UP: u64 = 2;
const IPPROTO_TCP: u16 = 6;
const TCP_CLOSE: i32 = 7;

/// Layout shared with `src/tcpstates.rs`: 80 bytes without padding.
#[repr(C)]
pub struct StateChange {
    at: u64,
    socket: u64,
    in_state: u64,
    from: i32,
    to: i32,
    local: [u8; 16],
    remote: [u8; 16],
    local_port: u16,
    remote_port: u16,
    family: u16,
    zero: u16,
    pid: u32,
    zero_too: u32,
}

#[btf_tracepoint(function = "inet_sock_set_state")]
fn empty(_: BtfTracePointContext) -> i32 {
    0
}

#[tracepoint(category = "sock", name = "inet_sock_set_state")]
fn transition(ctx: TracePointContext) -> u32 {
    let _ = report(&ctx);
    0
}

#[tracepoint(category = "sock", name = "inet_sock_set_state")]
fn changes(ctx: TracePointContext) -> u32 {
    let _ = count(&ctx);
    0
}

// Offsets of the tracepoint's fields: events/sock/inet_sock_set_state/format in tracefs.
fn field<T>(ctx: &TracePointContext, offset: usize) -> Result<T, i32> {
    // SAFETY: all fields read are made of integers.
    unsafe { ctx.read_at(offset) }
}

#[inline(always)]
fn report(ctx: &TracePointContext) -> Result<(), i32> {
    if field::<u16>(ctx, 30)? != IPPROTO_TCP {
        return Ok(());
    }
    let socket: u64 = field(ctx, 8)?;
    let to: i32 = field(ctx, 20)?;
    // SAFETY: no arguments, no preconditions.
    let at = unsafe { bpf_ktime_get_ns() };
    let since = match SINCE.get_ptr(socket) {
        // SAFETY: a map value, valid while the program runs.
        Some(since) => unsafe { *since },
        None => at,
    };
    let event = StateChange {
        at,
        socket,
        in_state: at.wrapping_sub(since),
        from: field(ctx, 16)?,
        to,
        local: field(ctx, 40)?,
        remote: field(ctx, 56)?,
        local_port: field(ctx, 24)?,
        remote_port: field(ctx, 26)?,
        family: field(ctx, 28)?,
        zero: 0,
        pid: ctx.pid(),
        zero_too: 0,
    };
    let _ = EVENTS.output(event, WAKE_UP);
    if to == TCP_CLOSE {
        SINCE.remove(socket)
    } else {
        SINCE.insert(socket, at, 0)
    }
}

#[inline(always)]
fn count(ctx: &TracePointContext) -> Result<(), i32> {
    let port = PORT.load() as u16;
    let here = field::<u16>(ctx, 24)? == port || field::<u16>(ctx, 26)? == port;
    if here {
        increment(0);
    }
    increment(1);
    Ok(())
}

#[inline(always)]
fn increment(index: u32) {
    if let Some(n) = CHANGES.get_ptr_mut(index) {
        add(n);
    }
}

#[cfg(target_arch = "bpf")]
#[inline(always)]
fn add(counter: *mut u64) {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};
    // SAFETY: an aligned map value; all writers are atomic.
    unsafe { atomic_xadd::<u64, u64, { Relaxed }>(counter, 1) };
}

#[cfg(not(target_arch = "bpf"))]
fn add(_: *mut u64) {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
