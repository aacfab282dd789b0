//! ebb's BPF programs: who has which TCP connections open.
//!
//! [`track`] runs at each TCP state change and nowhere else; [`seed`] walks the sockets that are older than
//! the agent through the same accounting, [`audit`] compares all sockets with it, and [`remember`] tells what the next
//! agent is to know of them. Nothing is on the data path, but [`deaf`] at connections that are being closed.

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features))]
#![allow(
    unsafe_code,
    reason = "BPF helpers and the names a loader looks for are unsafe by nature"
)]

mod account;
mod audit;
mod bare_ack;
mod deaf;
mod iter;
mod maps;
mod probe;
mod remember;
mod seed;
mod sock;
mod track;

/// The verifier rejects an endless loop that can be reached, so a program that could panic does not load.
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
