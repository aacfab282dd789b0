//! The two text formats of `/metrics`.
//!
//! The registry writes OpenMetrics. Prometheus' older format, which a scrape without an Accept header gets, differs in
//! little: the family of a counter has the name of its series (with `_total`), and there are neither units nor an end.
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::fmt::Write as _;

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exposition {
    OpenMetrics,
    Prometheus,
}

impl Exposition {
    /// The format to answer with, by the values of the Accept header: OpenMetrics if it is named and no less wanted.
    pub(crate) fn accepted(accept: &str) -> Self {
        let (mut open_metrics, mut plain) = (0.0_f32, 0.0_f32);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut weight, mut is_version_1) = (1.0, true);
            for (name, value) in parts.filter_map(|part| part.split_once('=')) {
                match name.trim() {
                    "q" => weight = value.trim().parse().unwrap_or(0.0),
                    "version" => is_version_1 = value.trim_matches([' ', '"']) == "1.0.0",
                    _ => {}
                }
            }
            match media.as_str() {
                "application/openmetrics-text" if is_version_1 => {
                    open_metrics = open_metrics.max(weight);
                }
                "text/plain" => plain = plain.max(weight),
                _ => {}
            }
        }
        match open_metrics > 0.0 && open_metrics >= plain {
            true => Self::OpenMetrics,
            false => Self::Prometheus,
        }
    }

    pub(crate) const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// The text of a registry, which is OpenMetrics, in this format.
    pub(super) fn of(self, open_metrics: String) -> String {
        match self {
            Self::OpenMetrics => open_metrics,
            Self::Prometheus => to_prometheus(&open_metrics),
        }
    }
}

fn to_prometheus(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    let mut help = "";
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // Written with the type, which follows it.
            help = rest;
        } else if let Some((name, kind)) = family(line) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let help = help.strip_prefix(name).unwrap_or(help);
            // Writing to a string does not fail.
            let _ = writeln!(out, "# HELP {name}{suffix}{help}");
            let _ = writeln!(out, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with('#') {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// The name and type that a line declares.
pub(super) fn family(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("# TYPE ")?.split_once(' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_is_sent_only_to_clients_that_want_it() {
        // Prometheus 2.42, and 3 with protobuf.
        let older = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
            text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let newer = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,\
            application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for accept in [older, newer, "application/openmetrics-text"] {
            assert_eq!(
                Exposition::accepted(accept),
                Exposition::OpenMetrics,
                "{accept}"
            );
        }
        for accept in [
            "",
            "*/*",
            "text/plain",
            "text/html,*/*;q=0.8",
            "application/openmetrics-text;version=0.0.1",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=0.3,text/plain;q=0.9",
        ] {
            assert_eq!(
                Exposition::accepted(accept),
                Exposition::Prometheus,
                "{accept}"
            );
        }
    }

    #[test]
    fn a_counters_family_has_the_name_of_its_series_and_nothing_else_changes() {
        let open_metrics = "# HELP a_b How many.\n# TYPE a_b counter\na_b_total{c=\"# TYPE\"} 1\n\
            # HELP d_seconds How long.\n# TYPE d_seconds gauge\n# UNIT d_seconds seconds\nd_seconds 2.0\n# EOF\n";
        let text = "# HELP a_b_total How many.\n# TYPE a_b_total counter\na_b_total{c=\"# TYPE\"} 1\n\
            # HELP d_seconds How long.\n# TYPE d_seconds gauge\nd_seconds 2.0\n";
        assert_eq!(to_prometheus(open_metrics), text);
    }
}
