//! The counters against the kernel's own tables (`iter/tcp`).
//!
//! The kernel holds the lock of each socket while it shows it here, and changes a socket's state under it: what
//! the record says and what the socket is are of the same moment. Where they differ, the socket wins. The
//! counters can't be compared here, only by who adds up what is written; what they lack is then added by
//! [`correct`], since a map that user space writes to would lose what is counted at the same time.

use core::ffi::c_void;

use ebb_common::{Audited, CORRECTIONS, Correction, ROLE_INBOUND, is_counted};

use crate::{
    account,
    iter::{self, IterTcp},
    maps::CORRECT,
    seed,
    sock::Sock,
};

/// Writes an [`Audited`] for each socket that is an inbound flow or is counted as one, and brings its record in line.
/// Returns 0: show the next one.
///
/// # Safety
///
/// For the kernel to call.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
unsafe extern "C" fn audit(ctx: *const IterTcp) -> i32 {
    // SAFETY: the kernel passes a valid context.
    if let Some(sk) = unsafe { iter::socket(ctx) } {
        visit(ctx, sk);
    }
    0
}

#[inline(always)]
fn visit(ctx: *const IterTcp, sk: *const c_void) -> Option<()> {
    let state = Sock(sk).state();
    let Some(record) = account::record(sk) else {
        let first = seed::inferred(Sock(sk), false).filter(|first| first.role == ROLE_INBOUND)?;
        // Without the ephemeral ports, what was dialled looks the same: a record would make it inbound for good.
        if !seed::ports_are_known(first.key.netns) {
            return None;
        }
        let found = Audited {
            key: first.key,
            flow: 1,
            agrees: 0,
            zero: [0; 6],
        };
        // SAFETY: the program's own context. What can't be written is shown again, and must not be mended yet.
        if unsafe { iter::write(ctx, found) } {
            account::moved_to(account::create(sk, first)?, state);
        }
        return None;
    };
    let flow = is_counted(record.role, state);
    let counted = record.counted != 0;
    if !flow && !counted {
        record.state = state;
        return None;
    }
    let found = Audited {
        key: record.key,
        flow: u8::from(flow),
        agrees: u8::from(flow == counted),
        zero: [0; 6],
    };
    // SAFETY: as above.
    if unsafe { iter::write(ctx, found) } {
        record.state = state;
        account::moved_to(record, state);
    }
    None
}

/// At the end of its walk, adds what is in [`CORRECT`] to the counters, once. Returns 0: show the next one.
///
/// # Safety
///
/// For the kernel to call.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
unsafe extern "C" fn correct(ctx: *const IterTcp) -> i32 {
    // SAFETY: the kernel passes a valid context.
    if !unsafe { iter::is_over(ctx) } {
        return 0;
    }
    for place in 0..CORRECTIONS as u32 {
        if let Some(correction) = CORRECT.get_ptr_mut(place) {
            // SAFETY: a map value, which nobody else touches during the walk.
            let correction: &mut Correction = unsafe { &mut *correction };
            if correction.used != 0 {
                account::correct(correction);
                correction.used = 0;
            }
        }
    }
    0
}
