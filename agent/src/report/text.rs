//! Durations, sizes, errors and drains for people.

use std::{fmt::Write as _, net::SocketAddr};

use super::{news::News, table::by_state};
use crate::drain::report::{Phase, Report};

/// Milliseconds, in at most two units: `840ms`, `8.2s`, `12m31s`, `3h04m`, `2d07h`.
pub fn duration(ms: u64) -> String {
    let mut text = String::new();
    push_duration(&mut text, ms);
    text
}

/// Appends a [`duration`]. This and its like are for lists of 100,000 rows, where [`std::fmt`] takes most of the time.
pub fn push_duration(out: &mut String, ms: u64) {
    let s = ms / 1000;
    let (high, unit, low, last) = match s {
        0 => return push(out, ms, "ms"),
        1..60 => {
            push(out, s, ".");
            return push(out, ms % 1000 / 100, "s");
        }
        60..3600 => (s / 60, "m", s % 60, "s"),
        3600..86_400 => (s / 3600, "h", s / 60 % 60, "m"),
        _ => (s / 86_400, "d", s / 3600 % 24, "h"),
    };
    push(out, high, unit);
    if low < 10 {
        out.push('0');
    }
    push(out, low, last);
}

/// Bytes, in three digits: `0`, `512`, `4.2K`, `17M`, `1.1G`.
pub fn bytes(n: u64) -> String {
    let mut text = String::new();
    push_bytes(&mut text, n);
    text
}

/// Appends [`bytes`].
pub fn push_bytes(out: &mut String, n: u64) {
    const UNITS: [&str; 6] = ["K", "M", "G", "T", "P", "E"];
    if n < 1000 {
        return push(out, n, "");
    }
    // Tenths of the unit: integers, so that nothing is ever rounded up into the next unit's digits.
    let mut tenths = u128::from(n) * 10;
    let mut unit = "";
    for u in UNITS {
        if tenths < 10_000 {
            break;
        }
        tenths /= 1024;
        unit = u;
    }
    if tenths < 100 {
        push(out, tenths / 10, ".");
        push(out, tenths % 10, unit);
    } else {
        push(out, tenths / 10, unit);
    }
}

/// Appends an address as it displays itself.
pub fn push_address(out: &mut String, address: SocketAddr) {
    match address {
        SocketAddr::V4(v4) => {
            let [a, b, c, d] = v4.ip().octets();
            for (octet, after) in [(a, "."), (b, "."), (c, "."), (d, ":")] {
                push(out, octet, after);
            }
            push(out, v4.port(), "");
        }
        SocketAddr::V6(v6) => {
            let _ = write!(out, "{v6}");
        }
    }
}

fn push(out: &mut String, n: impl itoa::Integer, after: &str) {
    out.push_str(itoa::Buffer::new().format(n));
    out.push_str(after);
}

/// An error and its causes on one line, each said once.
pub fn one_line(error: &anyhow::Error) -> String {
    /// A verifier log is of use to those who debug ebb; `EBB_LOG=debug` has no more of it than this.
    const LONGEST: usize = 1000;
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', "; ");
        // Some say their cause themselves, where it reads better.
        if !line.contains(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
    }
    shortened(line, LONGEST)
}

/// At most so many bytes of a text, with an ellipsis if it had more.
pub fn shortened(mut text: String, bytes: usize) -> String {
    const ELLIPSIS: char = '…';
    if text.len() > bytes {
        let most = bytes.saturating_sub(ELLIPSIS.len_utf8());
        let end = (0..=most).rev().find(|n| text.is_char_boundary(*n));
        text.truncate(end.unwrap_or(0));
        text.push(ELLIPSIS);
    }
    text
}

/// A drain in a few lines: where it is or how it ended, and what is open.
pub fn report(r: &Report) -> String {
    let mut out = format!("{}: ", r.pod);
    match (r.reason, r.phase) {
        (Some(_), _) => {
            let News { what, note, .. } = News::finished(r);
            let _ = write!(out, "{}: {note}", what.name());
        }
        (None, phase) => {
            let doing = if phase == Phase::Settle {
                "settling"
            } else {
                "draining"
            };
            let (held, most) = (duration(r.held_ms), duration(r.deadline_ms));
            let _ = write!(out, "still {doing} after {held}, {most} at most");
            if let Some(now) = &r.flows_now {
                let _ = write!(out, ": {} now", by_state(now));
            }
        }
    }
    out.push('\n');
    for warning in &r.warnings {
        let _ = writeln!(out, "{}: {warning}", r.pod);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_at_most_two_units() {
        let cases = [
            (0, "0ms"),
            (840, "840ms"),
            (8_250, "8.2s"),
            (59_999, "59.9s"),
            (751_000, "12m31s"),
            (11_040_000, "3h04m"),
            (198_000_000, "2d07h"),
        ];
        for (ms, text) in cases {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn sizes_have_at_most_three_digits() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "0.9K"),
            (4300, "4.1K"),
            (1 << 20, "1.0M"),
            (17 << 20, "17M"),
            (1023 << 10, "0.9M"),
            (u64::MAX, "15E"),
        ];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn addresses_are_written_as_they_display_themselves() {
        for address in ["0.0.0.0:0", "255.20.3.104:65535", "[2001:db8::1]:80"] {
            let mut text = String::new();
            push_address(&mut text, address.parse().unwrap());
            assert_eq!(text, address);
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(shortened("äöü".into(), 6), "äöü");
        assert_eq!(shortened("äöüß".into(), 6), "ä…");
        assert_eq!(shortened("äöüß".into(), 7), "äö…");
    }

    #[test]
    fn causes_are_on_one_line_and_not_repeated() {
        let e = anyhow::anyhow!("disk\nfull")
            .context("disk\nfull")
            .context("writing x");
        assert_eq!(one_line(&e), "writing x: disk; full");
    }
}
