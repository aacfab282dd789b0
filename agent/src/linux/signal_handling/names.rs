//! Names and numbers of signals, as on x86-64 and arm64 (signal(7)).

/// The names without `SIG`. The first name of a number is the one that ebb prints.
const NAMES: [(&str, u32); 35] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", 34),
];

/// The number of a stop signal as images name it: `SIGTERM`, `TERM`, `15` (`ParseSignal` in containerd,
/// `moby/sys/signal`). `None` for any other name.
pub(crate) fn signal_number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some((_, number)) = NAMES.iter().find(|(n, _)| *n == name) {
        return Some(*number);
    }
    if let Some(n) = name.strip_prefix("RTMIN+") {
        return Some(n.parse::<u32>().ok()? + 34);
    }
    match name.strip_prefix("RTMAX") {
        Some("") => Some(64),
        Some(n) => 64_u32.checked_sub(n.strip_prefix('-')?.parse().ok()?),
        None => None,
    }
}

/// The name of a signal, such as `SIGTERM`.
pub(crate) fn signal_name(number: u32) -> String {
    match NAMES.iter().find(|(_, n)| *n == number) {
        Some((name, _)) => format!("SIG{name}"),
        None if (35..=64).contains(&number) => format!("SIGRTMIN+{}", number - 34),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (name, number) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("SIGQUIT", Some(3)),
            ("3", Some(3)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMAX", Some(64)),
            ("SIGRTMAX-14", Some(50)),
            ("SIGNONSENSE", None),
            ("SIGRTMAX3", None),
        ] {
            assert_eq!(signal_number(name), number, "{name}");
        }
        for number in 1..=64 {
            let name = signal_name(number);
            let known = !(32..34).contains(&number);
            assert_eq!(signal_number(&name), known.then_some(number), "{name}");
        }
    }
}
