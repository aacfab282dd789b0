//! Waiting for descriptors on the async runtime: BPF ring buffers and processes.

#![allow(
    unsafe_code,
    reason = "tokio's AsyncFd can't know that a descriptor stays the same"
)]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Waits until a descriptor can be read.
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
impl OwnsDescriptor for OwnedFd {}
impl<T> OwnsDescriptor for aya_log::EbpfLogger<T> {}
