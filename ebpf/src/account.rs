//! The accounting that tracking and seeding share: a record in each socket, counters for its workload.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE},
    helpers::{bpf_ktime_get_boot_ns, generated::bpf_sk_storage_get},
};
use ebb_common::{
    Correction, FlowRecord, LOST_STORAGE, LOST_WORKLOAD, Workload, WorkloadKey, is_counted,
};

use crate::maps::{FLOWS, LAST_LOST, LOST, WORKLOADS};

/// The record of a socket, if it has one.
///
/// `sk` must be the pointer that the program got from its context or from `bpf_skc_to_tcp_sock`; the
/// verifier sees to it.
#[inline(always)]
pub(crate) fn record<'a>(sk: *const c_void) -> Option<&'a mut FlowRecord> {
    storage(sk, ptr::null_mut(), 0)
}

/// Gives a socket a record. `None` if the kernel has no memory for it.
///
/// Where somebody else's storage of this socket is being freed at the same moment (an agent that has just ended), the
/// kernel says EAGAIN (`bpf_local_storage_update` in kernel/bpf/bpf_local_storage.c): a second try finds that done.
#[inline(always)]
pub(crate) fn create<'a>(sk: *const c_void, mut first: FlowRecord) -> Option<&'a mut FlowRecord> {
    let create = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    match storage(sk, &raw mut first, create) {
        None => storage(sk, &raw mut first, create),
        created => created,
    }
}

/// Counts a socket that could not be given a record, once for both copies of the tracker. The `first` copy counts in any
/// case; the other one does where the first was passed over (see `track`), which shows by that it has not noted this
/// socket just before on this CPU.
#[inline(always)]
pub(crate) fn unrecorded(sk: *const c_void, first: bool) {
    let Some(last) = LAST_LOST.get_ptr_mut(0) else {
        return;
    };
    let this = sk.addr() as u64;
    // SAFETY: a map value, this CPU's own.
    if first || unsafe { *last } != this {
        lost(LOST_STORAGE);
    }
    // SAFETY: as above.
    unsafe { *last = this };
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
    let is = is_counted(record.role, state);
    let was = record.counted != 0;
    if is == was {
        return;
    }
    if is {
        record.opened_at = now();
    }
    let Some(workload) = workload(&record.key) else {
        // Each further change tries again; the loss is one.
        if record.lost == 0 {
            record.lost = 1;
            lost(LOST_WORKLOAD);
        }
        return;
    };
    // SAFETY: a map value, valid while the program runs; shared with other CPUs, hence the atomics.
    let workload = unsafe { &*workload };
    if is {
        record.counted = 1;
        record.lost = 0;
        add(&raw const workload.inbound, 1);
        increment(&raw const workload.inbound_total);
    } else {
        record.counted = 0;
        add(&raw const workload.inbound, -1);
    }
}

/// Adds what an audit found missing. Counts made meanwhile on other CPUs are not lost.
#[inline(always)]
pub(crate) fn correct(by: &Correction) {
    let key = WorkloadKey {
        cgroup: by.cgroup,
        netns: by.netns,
        zero: 0,
    };
    if let Some(workload) = workload(&key) {
        // SAFETY: a map value, valid while the program runs; shared with other CPUs, hence the atomics.
        let workload = unsafe { &*workload };
        add(&raw const workload.inbound, by.inbound);
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
pub(crate) fn add(counter: *const i64, n: i64) {
    use core::intrinsics::{AtomicOrdering::Relaxed, atomic_xadd};
    // SAFETY: an aligned field of a map value; all writers are atomic.
    unsafe { atomic_xadd::<i64, i64, { Relaxed }>(counter.cast_mut(), n) };
}

#[cfg(not(target_arch = "bpf"))]
pub(crate) fn add(_: *const i64, _: i64) {}
