//! Durations, sizes and errors for people.

/// Milliseconds, in at most two units: `840ms`, `8.2s`, `12m31s`, `3h04m`, `2d07h`.
pub fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms}ms"),
        1..60 => format!("{s}.{}s", ms % 1000 / 100),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86_400, s / 3600 % 24),
    }
}

/// Bytes, in three digits: `0`, `512`, `4.2K`, `17M`, `1.1G`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["K", "M", "G", "T", "P", "E"];
    if n < 1000 {
        return n.to_string();
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
        format!("{}.{}{unit}", tenths / 10, tenths % 10)
    } else {
        format!("{}{unit}", tenths / 10)
    }
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
    if let Some((end, _)) = line.char_indices().nth(LONGEST) {
        line.truncate(end);
        line.push('…');
    }
    line
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
    fn causes_are_on_one_line_and_not_repeated() {
        let e = anyhow::anyhow!("disk\nfull")
            .context("disk\nfull")
            .context("writing x");
        assert_eq!(one_line(&e), "writing x: disk; full");
    }
}
