//! Durations, sizes, addresses and errors as text, and durations read from text.

use std::{error::Error, fmt::Write as _, net::SocketAddr, ops::RangeInclusive, time::Duration};

/// Milliseconds, in at most two units: `840ms`, `8.2s`, `12m31s`, `3h04m`, `2d07h`.
pub fn duration(ms: u64) -> String {
    let mut text = String::new();
    push_duration(&mut text, ms);
    text
}

/// Appends a [`duration`]. The `push_` functions are for lists of 100,000 rows, where [`std::fmt`] would take most of
/// the time.
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
    // Tenths of the unit, as integers: rounding up would give four digits just below the next unit.
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

/// Appends an address as its `Display` writes it.
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

/// An error and its causes on one line, without repetitions.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    /// Cuts off verifier logs, which help only in debugging ebb. `EBB_LOG=debug` shows no more of them.
    const LONGEST: usize = 1000;
    let mut line = String::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = error.to_string().replace('\n', "; ");
        // Some errors include their cause in their own text.
        if !line.contains(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
        cause = error.source();
    }
    shortened(line, LONGEST)
}

/// The text, cut to `bytes` bytes including an ellipsis if it is longer.
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

/// A parser of durations within `range`, for flags. Its errors name a valid form.
pub fn duration_within(
    range: RangeInclusive<Duration>,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync {
    move |text| {
        let d = humantime::parse_duration(text)
            .map_err(|e| format!("{e}; write a number and a unit, such as 30s or 1m30s"))?;
        if range.contains(&d) {
            return Ok(d);
        }
        let [least, most] = [range.start(), range.end()].map(|d| humantime::format_duration(*d));
        Err(format!("not between {least} and {most}"))
    }
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
    fn addresses_are_written_as_their_display_does() {
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

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Caused {
        text: &'static str,
        source: Option<Box<Self>>,
    }

    #[test]
    fn causes_are_on_one_line_and_not_repeated() {
        let disk = |source| Caused {
            text: "disk\nfull",
            source,
        };
        let e = Caused {
            text: "writing x",
            source: Some(Box::new(disk(Some(Box::new(disk(None)))))),
        };
        assert_eq!(one_line(&e), "writing x: disk; full");
    }
}
