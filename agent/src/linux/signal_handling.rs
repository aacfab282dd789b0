//! What a process does with a signal, from `/proc/PID`.
//!
//! The kernel drops a signal to the first process of a PID namespace that has no handler for it
//! (`sig_task_ignored`, kernel/signal.c). So a program that does not catch its stop signal runs on, and is killed at
//! the end of the grace period.

mod names;
mod waiting;

use std::{fs, path::Path, thread, time::Duration};

pub(crate) use self::names::{signal_name, signal_number};

/// Signals that are ignored unless they are caught (`SIG_KERNEL_IGNORE_MASK`, include/linux/signal.h): CHLD, CONT, URG
/// and WINCH.
const IGNORED_BY_DEFAULT: [u32; 4] = [17, 18, 23, 28];

/// Which signals a process catches, waits for and ignores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SignalHandling {
    caught: u64,
    /// The signals that a thread waits for (sigwait), or that a descriptor delivers (signalfd).
    waited_for: u64,
    ignored: u64,
    blocked: u64,
    /// It is the first process of its PID namespace.
    pub(crate) is_first: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SignalEffect {
    /// The program handles it.
    Caught,
    /// The kernel drops the signal, or the process ignores it.
    None,
    /// It ends the process at once.
    Ends,
}

/// How often a process that is running is read again, and how long each pause is.
const READ_AGAIN: (usize, Duration) = (10, Duration::from_millis(2));

impl SignalHandling {
    /// Reads a process below `proc`; `None` if it is gone. Without CAP_SYS_PTRACE, the signals that it waits for are
    /// unknown. Takes up to 20 ms if the process is running all the time.
    pub(crate) fn of(proc: &Path, pid: u32) -> Option<Self> {
        let process = proc.join(pid.to_string());
        read_asleep(|| {
            let was_running = waiting::is_running(&process);
            let handling = Self::read(&process)?;
            Some((handling, was_running || waiting::is_running(&process)))
        })
    }

    fn read(process: &Path) -> Option<Self> {
        let status = fs::read_to_string(process.join("status")).ok()?;
        let handling = Self::parse(&status)?;
        Some(Self {
            waited_for: waiting::signals(process),
            ..handling
        })
    }

    /// Parses `/proc/PID/status`; `None` if a field is missing or malformed.
    pub(crate) fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name))?;
            Some(line.trim())
        };
        let mask = |name| u64::from_str_radix(field(name)?, 16).ok();
        Some(Self {
            caught: mask("SigCgt:")?,
            waited_for: 0,
            ignored: mask("SigIgn:")?,
            blocked: mask("SigBlk:")?,
            // The last value is the pid in the process's own namespace.
            is_first: field("NSpid:")?.split_ascii_whitespace().next_back() == Some("1"),
        })
    }

    /// Whether its main thread blocks the signal. A program that waits for signals does so between two waits.
    pub(crate) const fn blocks(&self, signal: u32) -> bool {
        match 1_u64.checked_shl(signal.wrapping_sub(1)) {
            Some(bit) => self.blocked & bit != 0,
            None => false,
        }
    }

    /// The effect of a signal. One that stops or continues a process counts as one that ends it.
    pub(crate) fn effect(&self, signal: u32) -> SignalEffect {
        let bit = 1_u64.checked_shl(signal.wrapping_sub(1)).unwrap_or(0);
        if (self.caught | self.waited_for) & bit != 0 {
            SignalEffect::Caught
        } else if self.ignored & bit != 0 || self.is_first || IGNORED_BY_DEFAULT.contains(&signal) {
            SignalEffect::None
        } else {
            SignalEffect::Ends
        }
    }
}

/// The first reading of a process that was not running meanwhile, or that shows the signals that it waits for; else the
/// last one. `read` also returns whether the process was running.
fn read_asleep(mut read: impl FnMut() -> Option<(SignalHandling, bool)>) -> Option<SignalHandling> {
    let (times, pause) = READ_AGAIN;
    for _ in 0..times {
        let (handling, was_running) = read()?;
        if handling.waited_for != 0 || !was_running {
            return Some(handling);
        }
        thread::sleep(pause);
    }
    read().map(|(handling, _)| handling)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tapp\nNSpid:\t4242\t1\nSigQ:\t0/1\nSigBlk:\t0000000000004000\nSigIgn:\t0000000000001000\n\
        SigCgt:\t0000000000004002\n";

    #[test]
    fn the_first_process_ignores_signals_that_it_does_not_catch() {
        let first = SignalHandling::parse(STATUS).unwrap();
        assert_eq!(first.effect(15), SignalEffect::Caught);
        assert_eq!(first.effect(2), SignalEffect::Caught);
        assert_eq!(first.effect(13), SignalEffect::None);
        assert_eq!(first.effect(3), SignalEffect::None);
        assert!(first.blocks(15) && !first.blocks(2) && !first.blocks(0) && !first.blocks(99));
        let waiting = SignalHandling {
            waited_for: 1 << 2,
            ..first
        };
        assert_eq!(waiting.effect(3), SignalEffect::Caught);
    }

    #[test]
    fn any_other_process_ends_on_signals_that_it_does_not_catch() {
        let shared = SignalHandling::parse(&STATUS.replace("4242\t1", "4242\t17")).unwrap();
        assert_eq!(shared.effect(15), SignalEffect::Caught);
        assert_eq!(shared.effect(3), SignalEffect::Ends);
        assert_eq!(shared.effect(13), SignalEffect::None);
        assert_eq!(shared.effect(28), SignalEffect::None, "SIGWINCH");
    }

    #[test]
    fn a_process_that_is_running_is_read_again() {
        let woken = SignalHandling {
            blocked: 0,
            caught: 0,
            ..SignalHandling::parse(STATUS).unwrap()
        };
        let waiting = SignalHandling {
            waited_for: 1 << 14,
            ..woken
        };
        let read = |readings: &[(SignalHandling, bool)]| {
            let mut readings = readings.iter().copied();
            read_asleep(|| readings.next()).map(|handling| handling.effect(15))
        };
        let (caught, none) = (Some(SignalEffect::Caught), Some(SignalEffect::None));
        assert_eq!(read(&[(woken, true), (waiting, false)]), caught);
        assert_eq!(read(&[(waiting, true)]), caught);
        assert_eq!(read(&[(woken, false)]), none);
        assert_eq!(read(&[(woken, true); READ_AGAIN.0 + 1]), none);
        // It is gone.
        assert_eq!(read(&[(woken, true)]), None);
    }

    #[test]
    fn the_status_of_this_process_is_parsed() {
        let handling = SignalHandling::of(Path::new("/proc"), std::process::id());
        assert!(handling.is_some());
        assert_eq!(SignalHandling::parse("Name:\tx\n"), None);
    }
}
