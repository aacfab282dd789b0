//! Giving memory back.
//!
//! An agent is small for months and large for a moment: it loads its programs once, which takes the kernel's whole
//! type information apart (some 20 MiB), and rarely lists 100,000 flows (some 60). glibc would keep all of that.

#![allow(unsafe_code, reason = "mallopt(3) and malloc_trim(3) are C functions")]

/// From this size on, in bytes, memory is mapped for each use. Set by hand: glibc raises it to 32 MiB by itself when
/// something large is freed, and what is not mapped stays with the thread that freed it, out of reach of [`give_back`].
#[cfg(target_env = "gnu")]
const MAP_FROM: i32 = 256 << 10;

/// Has large memory go back to the system as soon as it is freed. For the start of a process.
pub(crate) fn map_large() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers, any thread may call it at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAP_FROM);
    }
}

/// Returns what the allocator keeps for later to the system. Takes milliseconds.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: as above.
    unsafe {
        libc::malloc_trim(0);
    }
}
