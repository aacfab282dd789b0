//! What a container's first process does with its stop signal, by `/proc/PID/status`. Pure.
//!
//! The kernel drops a signal to the first process of a PID namespace that has no handler for it
//! (`sig_task_ignored`, kernel/signal.c). So a program that does not catch its stop signal goes on as if nothing
//! had happened, and is killed when the grace period is over.

/// A process, as far as its signals are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signals {
    caught: u64,
    ignored: u64,
    /// It is the first process of its PID namespace.
    pub is_first: bool,
}

/// What a signal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The program handles it.
    Caught,
    /// Nothing.
    None,
    /// It ends the process at once.
    Ends,
}

impl Signals {
    /// Reads `/proc/PID/status`; `None` if that is not what it is.
    pub fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name))?;
            Some(line.trim())
        };
        let mask = |name| u64::from_str_radix(field(name)?, 16).ok();
        Some(Self {
            caught: mask("SigCgt:")?,
            ignored: mask("SigIgn:")?,
            // The last one is its pid in its own namespace.
            is_first: field("NSpid:")?.split_ascii_whitespace().next_back() == Some("1"),
        })
    }

    /// What a signal, of those that end a process by default, does.
    pub fn effect(&self, signal: u32) -> Effect {
        let bit = 1_u64.checked_shl(signal.wrapping_sub(1)).unwrap_or(0);
        if self.caught & bit != 0 {
            Effect::Caught
        } else if self.ignored & bit != 0 || self.is_first {
            Effect::None
        } else {
            Effect::Ends
        }
    }
}

/// The number of a stop signal as images name it: `SIGTERM`, `TERM`, `15` (`ParseSignal` in containerd,
/// `moby/sys/signal`). Only those that are in use for it; `None` for others.
pub fn signal_number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let name = name.to_ascii_uppercase();
    Some(match name.strip_prefix("SIG").unwrap_or(&name) {
        "HUP" => 1,
        "INT" => 2,
        "QUIT" => 3,
        "KILL" => 9,
        "USR1" => 10,
        "USR2" => 12,
        "TERM" => 15,
        "WINCH" => 28,
        "PWR" => 30,
        name => name.strip_prefix("RTMIN+")?.parse::<u32>().ok()? + 34,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tapp\nNSpid:\t4242\t1\nSigQ:\t0/1\nSigIgn:\t0000000000001000\n\
        SigCgt:\t0000000000004002\n";

    #[test]
    fn the_first_process_does_not_feel_what_it_does_not_catch() {
        let first = Signals::parse(STATUS).unwrap();
        assert_eq!(first.effect(15), Effect::Caught);
        assert_eq!(first.effect(2), Effect::Caught);
        assert_eq!(first.effect(13), Effect::None);
        assert_eq!(first.effect(3), Effect::None);
    }

    #[test]
    fn any_other_process_ends_by_what_it_does_not_catch() {
        let shared = Signals::parse(&STATUS.replace("4242\t1", "4242\t17")).unwrap();
        assert_eq!(shared.effect(15), Effect::Caught);
        assert_eq!(shared.effect(3), Effect::Ends);
        assert_eq!(shared.effect(13), Effect::None);
    }

    #[test]
    fn this_process_can_be_read() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(Signals::parse(&status).is_some());
        assert_eq!(Signals::parse("Name:\tx\n"), None);
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (name, number) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("SIGQUIT", Some(3)),
            ("3", Some(3)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGNONSENSE", None),
        ] {
            assert_eq!(signal_number(name), number, "{name}");
        }
    }
}
