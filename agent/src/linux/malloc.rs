//! Returns memory to the system.
//!
//! The agent rarely needs much memory: about 20 MiB once, to parse the kernel's type information when it loads the
//! programs, and about 60 MiB to list 100,000 flows. glibc would keep all of that.

#![allow(unsafe_code, reason = "mallopt(3) and malloc_trim(3) are C functions")]

/// glibc maps each allocation of at least this many bytes, and unmaps it when it is freed. By default glibc raises
/// this to up to 32 MiB when a large block is freed. Smaller blocks stay with the arena of the freeing thread, where
/// [`trim`] may not reach them.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: i32 = 256 << 10;

/// Makes large blocks return to the system when they are freed. Call it at the start of the process.
pub(crate) fn set_mmap_threshold() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and any thread may call it at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
    }
}

/// Returns the allocator's free memory to the system. Takes milliseconds.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: as above.
    unsafe {
        libc::malloc_trim(0);
    }
}
