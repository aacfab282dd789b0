//! Waiting for a BPF ring buffer on the async runtime.

#![allow(
    unsafe_code,
    reason = "tokio's AsyncFd can't know that a descriptor stays the same"
)]

use std::{io, os::fd::AsRawFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Waits for a ring buffer that owns its descriptor.
///
/// # Errors
///
/// The descriptor can't be polled.
pub(super) fn readable<T: OwnsDescriptor>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `OwnsDescriptor` types own one descriptor for life and never replace it.
    unsafe { AsyncFd::register_with_interest(inner, Interest::READABLE) }.map_err(Into::into)
}

/// Types that own one open descriptor from their making to their end, and always name that one.
pub(super) trait OwnsDescriptor: AsRawFd {}
impl OwnsDescriptor for aya::maps::RingBuf<aya::maps::MapData> {}
impl<T> OwnsDescriptor for aya_log::EbpfLogger<T> {}
