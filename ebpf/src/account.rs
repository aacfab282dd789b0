//! The accounting that tracking and seeding share: a record in each socket, counters for its workload.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE},
    helpers::{bpf_ktime_get_boot_ns, generated::bpf_sk_storage_get},
};
use ebb_common::{
    FlowRecord, LOST_STORAGE, LOST_WORKLOAD, ROLE_INBOUND, Workload, WorkloadKey, is_flow,
};

use crate::maps::{FLOWS, LOST, WORKLOADS};

/// The record of a socket, if it has one.
///
/// `sk` must be the pointer that the program got from its context or from `bpf_skc_to_tcp_sock`; the
/// verifier sees to it.
#[inline(always)]
pub(crate) fn record<'a>(sk: *const c_void) -> Option<&'a mut FlowRecord> {
    storage(sk, ptr::null_mut(), 0)
}

/// Gives a socket a record. `None`, and counted as a loss, if the kernel has no memory for it.
#[inline(always)]
pub(crate) fn create<'a>(sk: *const c_void, mut first: FlowRecord) -> Option<&'a mut FlowRecord> {
    let made = storage(sk, &raw mut first, u64::from(BPF_SK_STORAGE_GET_F_CREATE));
    if made.is_none() {
        lost(LOST_STORAGE);
    }
    made
}

#[inline(always)]
fn storage<'a>(
    sk: *const c_void,
    first: *mut FlowRecord,
    flags: u64,
) -> Option<&'a mut FlowRecord> {
    let map = (&raw const FLOWS).cast_mut().cast::<c_void>();
    // SAFETY: the map is socket storage of `FlowRecord`, `first` is null or points to one; the verifier
    // checks `sk`.
    let found = unsafe { bpf_sk_storage_get(map, sk.cast_mut(), first.cast(), flags) };
    // SAFETY: null, or the record of this socket, which lives as long as the socket, that is longer than
    // this program. The kernel changes a socket's state under its lock, so no other program has it.
    unsafe { found.cast::<FlowRecord>().as_mut() }
}

/// Brings the counters in line with the socket's new state. All that counts passes here.
#[inline(always)]
pub(crate) fn moved_to(record: &mut FlowRecord, state: u8) {
    let is = is_flow(record.role, state);
    let was = record.counted != 0;
    if is == was {
        return;
    }
    if is {
        record.opened_at = now();
    }
    let Some(workload) = workload(&record.key) else {
        lost(LOST_WORKLOAD);
        return;
    };
    // SAFETY: a map value, valid while the program runs; shared with other CPUs, hence the atomics.
    let workload = unsafe { &*workload };
    let (counter, total) = if record.role == ROLE_INBOUND {
        (&raw const workload.inbound, true)
    } else {
        (&raw const workload.outbound, false)
    };
    if is {
        record.counted = 1;
        add(counter, 1);
        if total {
            increment(&raw const workload.inbound_total);
        }
    } else {
        record.counted = 0;
        add(counter, -1);
    }
}

#[inline(always)]
fn workload(key: &WorkloadKey) -> Option<*mut Workload> {
    WORKLOADS.get_ptr_mut(key).or_else(|| {
        // Another CPU may have been first: then this fails, and the lookup finds that one.
        let _ = WORKLOADS.insert(
            key,
            Workload {
                inbound: 0,
                outbound: 0,
                inbound_total: 0,
            },
            u64::from(BPF_NOEXIST),
        );
        WORKLOADS.get_ptr_mut(key)
    })
}

/// The boot-time clock, in nanoseconds. Reading it is a good part of what a state change costs, so it is read
/// only where the time is kept.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: no arguments, no preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Counts a loss.
#[inline(always)]
pub(crate) fn lost(kind: u32) {
    if let Some(n) = LOST.get_ptr(kind) {
        increment(n);
    }
}

#[inline(always)]
fn increment(counter: *const u64) {
    add(counter.cast(), 1);
}

/// `core::sync::atomic` has no read-modify-write on the BPF target, the intrinsic below it has.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn add(counter: *const i64, n: i64) {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};
    // SAFETY: an aligned field of a map value; all writers are atomic.
    unsafe { atomic_xadd::<i64, i64, { Relaxed }>(counter.cast_mut(), n) };
}

#[cfg(not(target_arch = "bpf"))]
fn add(_: *const i64, _: i64) {}
