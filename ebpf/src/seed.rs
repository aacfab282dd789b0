//! Sockets that are older than the agent (`iter/tcp`), through the same accounting as new ones.
//!
//! The tracker is attached before this runs. The kernel holds the lock of each socket while it shows it
//! here, so a socket gets its record either from a state change or from here, and is counted once.
//!
//! Nothing in an old socket says who opened it. The iterator shows listeners first: a flow on the port of
//! a listener of its namespace is inbound, any other on a port of the ephemeral range outbound. A flow on
//! another port has lost its listener and is taken for inbound: not knowing must not cut anybody off.

use core::ffi::c_void;

use ebb_common::{FlowRecord, ListenKey, ROLE_INBOUND, ROLE_OUTBOUND, is_flow, tcp_state::LISTEN};

use crate::{
    account,
    iter::{self, IterTcp},
    maps::{EPHEMERAL_PORTS, LISTENERS},
    sock::Sock,
};

/// Returns 0: show the next one.
///
/// # Safety
///
/// For the kernel to call.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
unsafe extern "C" fn seed(ctx: *const IterTcp) -> i32 {
    // SAFETY: the kernel passes a valid context.
    if let Some(sk) = unsafe { iter::socket(ctx) } {
        visit(sk);
    }
    0
}

#[inline(always)]
fn visit(sk: *const c_void) -> Option<()> {
    let sock = Sock(sk);
    let state = sock.state()?;
    let port = sock.num()?;
    let key = sock.workload()?;
    let listen = ListenKey {
        netns: key.netns,
        port: u32::from(port),
    };
    if state == LISTEN {
        return LISTENERS.insert(listen, 1, 0).ok();
    }
    if account::record(sk).is_some() {
        return None;
    }
    let ephemeral = EPHEMERAL_PORTS.load();
    let inbound =
        LISTENERS.get_ptr(listen).is_some() || port < ephemeral.first || port > ephemeral.last;
    let role = if inbound { ROLE_INBOUND } else { ROLE_OUTBOUND };
    if !is_flow(role, state) {
        return None;
    }
    let first = FlowRecord {
        key,
        opened_at: 0,
        role,
        counted: 0,
        seeded: 1,
        state,
        zero: [0; 4],
    };
    account::moved_to(account::create(sk, first)?, state);
    Some(())
}
