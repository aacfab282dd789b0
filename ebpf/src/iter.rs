//! What the programs that walk the TCP sockets of a namespace (`iter/tcp`) have in common.

use core::{ffi::c_void, mem::size_of};

use aya_ebpf::helpers::generated::{bpf_seq_write, bpf_skc_to_tcp_sock};

/// The context of an `iter/tcp` program (`struct bpf_iter__tcp` in net/ipv4/tcp_ipv4.c).
#[repr(C)]
pub(crate) struct IterTcp {
    meta: *const IterMeta,
    sk_common: *const c_void,
    uid: u32,
}

/// `struct bpf_iter_meta` (kernel/bpf/bpf_iter.c), as far as it is used.
#[repr(C)]
struct IterMeta {
    seq: *mut c_void,
}

/// The socket that the walk has come to; `None` at its end, and for one that is no full TCP socket
/// (request and TIME_WAIT sockets).
///
/// # Safety
///
/// `ctx` is the program's own context.
#[inline(always)]
pub(crate) unsafe fn socket(ctx: *const IterTcp) -> Option<*const c_void> {
    // SAFETY: the kernel passes a valid context.
    let sk_common = unsafe { (*ctx).sk_common };
    if sk_common.is_null() {
        return None;
    }
    // SAFETY: the helper takes any socket.
    let sk: *const c_void = unsafe { bpf_skc_to_tcp_sock(sk_common.cast_mut()) }.cast();
    (!sk.is_null()).then_some(sk)
}

/// Whether the walk has come to its end, where the kernel calls once more, without a socket.
///
/// # Safety
///
/// `ctx` is the program's own context.
#[inline(always)]
pub(crate) unsafe fn is_over(ctx: *const IterTcp) -> bool {
    // SAFETY: the kernel passes a valid context.
    unsafe { (*ctx).sk_common }.is_null()
}

/// Appends to what the reader of the iterator gets. `false` if it does not fit: the kernel then calls again for
/// this socket.
///
/// # Safety
///
/// `ctx` is the program's own context.
#[inline(always)]
pub(crate) unsafe fn write<T: Copy>(ctx: *const IterTcp, what: T) -> bool {
    // SAFETY: the kernel passes a valid context.
    let meta = unsafe { (*ctx).meta };
    // SAFETY: and valid metadata in it.
    let seq = unsafe { (*meta).seq };
    // SAFETY: a value on the stack.
    unsafe { bpf_seq_write(seq.cast(), (&raw const what).cast(), size_of::<T>() as u32) == 0 }
}
