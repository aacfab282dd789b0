//! ebb's BPF programs.
//!
//! [`track`] runs at each TCP state change, and counts accepted connections as they are opened and closed.
//! [`inspect`] is never attached: the agent runs it to look up single connections. No program is on the data path,
//! except [`drop_payload`] for connections that ebb closes.

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]
#![allow(
    unsafe_code,
    reason = "BPF helpers and the symbol names that the loader expects need it"
)]

mod drop_payload;
mod inspect;
mod maps;
mod sock;
mod track;

/// The verifier rejects an endless loop that is reachable, so a program that can panic does not load.
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
