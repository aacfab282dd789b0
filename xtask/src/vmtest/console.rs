//! Reads a guest's console: its phase, its output and its end.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// The time limit for booting. Kernels took 5 to 20 s to reach the init script, two guests at a time.
const BOOT: Duration = Duration::from_secs(180);
/// The time limit for the command. A test that hangs fails by itself long before.
const RUN: Duration = Duration::from_secs(45 * 60);

/// init.sh prints these before and after the command.
const STARTED: &str = "ebb-guest: Linux ";
const ENDED: &str = "ebb-guest: exit status ";

/// How a guest ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum GuestEnd {
    /// The command ended with this exit status.
    Exited(u8),
    /// The guest went down before the command ended, as after a kernel panic.
    Down(GuestPhase),
    /// The phase took too long.
    TimedOut(GuestPhase),
}

/// How far a guest got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GuestPhase {
    /// The kernel or the init script runs.
    Booting,
    /// The command runs.
    Running,
}

impl fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exit status {status}"),
            Self::Down(GuestPhase::Booting) => f.write_str("did not boot"),
            Self::Down(GuestPhase::Running) => f.write_str("went down"),
            Self::TimedOut(GuestPhase::Booting) => write!(f, "did not boot within {BOOT:?}"),
            Self::TimedOut(GuestPhase::Running) => write!(f, "still running after {RUN:?}"),
        }
    }
}

/// A guest's console, up to the last line read.
pub(super) struct Console {
    begun: Instant,
    pub(super) phase: GuestPhase,
    /// From the start of the emulator to the start of the command.
    pub(super) boot: Duration,
    /// The lines that the command printed, or the kernel while the command ran.
    pub(super) output: Vec<String>,
}

impl Console {
    pub(super) fn new(begun: Instant) -> Self {
        Self {
            phase: GuestPhase::Booting,
            begun,
            boot: Duration::ZERO,
            output: Vec::new(),
        }
    }

    /// The time that is left for the phase.
    pub(super) fn left(&self) -> Duration {
        let limit = match self.phase {
            GuestPhase::Booting => BOOT,
            GuestPhase::Running => self.boot + RUN,
        };
        limit.saturating_sub(self.begun.elapsed())
    }

    /// Takes the next line. Returns the guest's end if the line reports it.
    pub(super) fn take(&mut self, line: String) -> Option<GuestEnd> {
        match self.phase {
            GuestPhase::Booting if line.contains(STARTED) => {
                self.phase = GuestPhase::Running;
                self.boot = self.begun.elapsed();
            }
            GuestPhase::Booting => {}
            // The command's output may end without a newline.
            GuestPhase::Running => match line.split_once(ENDED) {
                Some((_, status)) => {
                    return Some(match status.parse() {
                        Ok(status) => GuestEnd::Exited(status),
                        Err(_) => GuestEnd::Down(GuestPhase::Running),
                    });
                }
                None => self.output.push(line),
            },
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end_of(lines: &[&str]) -> (Option<GuestEnd>, GuestPhase, Vec<String>) {
        let mut console = Console::new(Instant::now());
        let end = lines.iter().find_map(|line| console.take((*line).into()));
        (end, console.phase, console.output)
    }

    #[test]
    fn the_status_line_after_the_start_ends_the_guest() {
        let lines = [
            "SeaBIOS",
            "ebb-guest: Linux 6.1.0",
            "ok",
            "ebb-guest: exit status 101",
        ];
        let (end, _, output) = end_of(&lines);
        assert_eq!(end, Some(GuestEnd::Exited(101)));
        assert_eq!(output, ["ok"]);
    }

    #[test]
    fn a_guest_that_fails_to_start_the_command_is_still_booting() {
        let lines = ["ebb-guest: cannot mount proc", "ebb-guest: exit status 0"];
        assert_eq!(end_of(&lines), (None, GuestPhase::Booting, vec![]));
    }

    #[test]
    fn a_status_that_is_not_a_number_is_not_success() {
        let lines = ["ebb-guest: Linux 6.1.0", "ebb-guest: exit status 0x"];
        assert_eq!(end_of(&lines).0, Some(GuestEnd::Down(GuestPhase::Running)));
    }
}
