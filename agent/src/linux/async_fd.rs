//! Polls descriptors on the async runtime: BPF ring buffers and pidfds.

#![allow(
    unsafe_code,
    reason = "AsyncFd can't check that the value keeps its descriptor"
)]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor with the async runtime, to wait until it is readable.
///
/// # Errors
///
/// The descriptor can't be polled.
pub(crate) fn readable<T: OwnsDescriptor>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `OwnsDescriptor` types own one descriptor as long as they exist and never replace it.
    unsafe { AsyncFd::register_with_interest(inner, Interest::READABLE) }.map_err(Into::into)
}

/// Types that own one open descriptor, and keep it as long as they exist.
pub(crate) trait OwnsDescriptor: AsRawFd {}
impl OwnsDescriptor for aya::maps::RingBuf<aya::maps::MapData> {}
impl OwnsDescriptor for OwnedFd {}
impl<T> OwnsDescriptor for aya_log::EbpfLogger<T> {}
