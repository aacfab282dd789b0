//! Sockets that are older than the agent (`iter/tcp`), through the same accounting as new ones.
//!
//! The tracker is attached before this runs. The kernel holds the lock of each socket while it shows it
//! here, so a socket gets its record either from a state change or from here, and is counted once.
//!
//! Nothing in an old socket says who opened it, unless it is still dialling. The iterator shows listeners first: a
//! flow on the port of a listener of its namespace is inbound, any other on a port of the ephemeral range outbound,
//! which needs no record. A flow on another port has lost its listener and is taken for inbound: not knowing must
//! not cut anybody off. What an earlier agent had recorded needs no inference, and keeps its age.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_get_socket_cookie;
use ebb_common::{
    EphemeralPorts, FlowRecord, LOST_LISTENER, ListenKey, ROLE_INBOUND, ROLE_OUTBOUND, Remembered,
    WorkloadKey, is_counted,
    tcp_state::{LISTEN, SYN_SENT},
};

use crate::{
    account,
    iter::{self, IterTcp},
    maps::{EARLIER, EARLIER_KNOWN, LISTENERS, PORTS},
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
fn visit(sk: *const c_void) {
    if account::record(sk).is_some() {
        return;
    }
    let sock = Sock(sk);
    let earlier = earlier(sk).filter(|_| is_counted(ROLE_INBOUND, sock.state()));
    let first = match earlier {
        Some(_) => Some(seeded(sock.workload(), ROLE_INBOUND, sock.state())),
        None => inferred(sock, true),
    };
    let Some(first) = first else {
        return;
    };
    let Some(record) = account::create(sk, first) else {
        return account::unrecorded(sk, true);
    };
    account::moved_to(record, first.state);
    if let Some(earlier) = earlier {
        record.opened_at = earlier.opened_at;
        record.seeded = earlier.seeded;
        record.probe = earlier.probe;
    }
}

/// What an earlier agent knew of a flow.
#[inline(always)]
fn earlier(sk: *const c_void) -> Option<Remembered> {
    if EARLIER_KNOWN.load() == 0 {
        return None;
    }
    // SAFETY: a full socket, from the walk.
    let cookie = unsafe { bpf_get_socket_cookie(sk.cast_mut()) };
    // SAFETY: a map value, valid while the program runs; nobody writes it during the walk.
    EARLIER.get_ptr(cookie).map(|known| unsafe { *known })
}

/// Whether the ephemeral ports of a namespace are known, and all its listeners.
#[inline(always)]
pub(crate) fn ports_are_known(netns: u32) -> bool {
    PORTS
        .get_ptr_mut(netns)
        // SAFETY: a map value, valid while the program runs; nobody else writes it during the walk.
        .is_some_and(|ports| unsafe { (*ports).are_known() })
}

/// The first record of a flow that nobody saw being opened. `None` for what needs none; a listener's port is
/// remembered. One that finds no place is a loss when `seeding`; an audit then passes over what has no record.
#[inline(always)]
pub(crate) fn inferred(sock: Sock, seeding: bool) -> Option<FlowRecord> {
    let state = sock.state();
    let port = sock.num();
    let key = sock.workload();
    let listen = ListenKey {
        netns: key.netns,
        port: u32::from(port),
    };
    let ephemeral = PORTS.get_ptr_mut(key.netns);
    if state == LISTEN {
        if LISTENERS.insert(listen, 1, 0).is_err() {
            if seeding {
                account::lost(LOST_LISTENER);
            }
            if let Some(ports) = ephemeral {
                // SAFETY: a map value, valid while the program runs; nobody else writes it during the walk.
                unsafe { *ports = EphemeralPorts::NONE };
            }
        }
        return None;
    }
    // SAFETY: as above.
    if ephemeral.is_some_and(|ports| unsafe { (*ports).contain(port) })
        && LISTENERS.get_ptr(listen).is_none()
    {
        return None;
    }
    let role = match state {
        SYN_SENT => ROLE_OUTBOUND,
        _ if is_counted(ROLE_INBOUND, state) => ROLE_INBOUND,
        _ => return None,
    };
    Some(seeded(key, role, state))
}

#[inline(always)]
const fn seeded(key: WorkloadKey, role: u8, state: u8) -> FlowRecord {
    FlowRecord {
        key,
        opened_at: 0,
        role,
        counted: 0,
        seeded: 1,
        state,
        probe: 0,
        lost: 0,
        watch: 0,
    }
}
