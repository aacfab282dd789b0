//! The results of a run, as one JSON document or as a table.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use crate::stats::Interval;

/// The value that a result should have.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    /// Any: a baseline, or for information.
    None,
    AtMost(f64),
    AtLeast(f64),
    /// The low end of the confidence interval is at most this: the result is not significantly above it.
    IntervalAtMost(f64),
}
pub(crate) use Goal::{AtLeast, AtMost, IntervalAtMost};

struct Measurement {
    key: &'static str,
    value: f64,
    interval: Option<(f64, f64)>,
    unit: &'static str,
    what: String,
    target: Goal,
}

/// All results, in the order of measuring.
#[derive(Default)]
pub(crate) struct BenchResults {
    list: Vec<Measurement>,
    facts: Vec<(&'static str, Value)>,
}

impl BenchResults {
    /// Adds a result under a dotted key, `group.name`.
    ///
    /// # Errors
    /// If the value is not finite, because then nothing was measured.
    pub(crate) fn add(
        &mut self,
        key: &'static str,
        value: f64,
        unit: &'static str,
        what: impl Into<String>,
        target: Goal,
    ) -> Result<()> {
        ensure!(value.is_finite(), "{key} is {value}: nothing was measured");
        self.list.push(Measurement {
            key,
            value,
            interval: None,
            unit,
            what: what.into(),
            target,
        });
        Ok(())
    }

    /// Adds a result with its interval, which is `…_low` and `…_high` in the document.
    ///
    /// # Errors
    /// As [`BenchResults::add`].
    pub(crate) fn add_interval(
        &mut self,
        key: &'static str,
        value: Interval,
        unit: &'static str,
        what: impl Into<String>,
        target: Goal,
    ) -> Result<()> {
        self.add(key, value.median, unit, what, target)?;
        if let Some(measurement) = self.list.last_mut() {
            measurement.interval = Some((value.low, value.high));
        }
        Ok(())
    }

    /// Adds a fact about the run, such as the machine.
    pub(crate) fn fact(&mut self, key: &'static str, value: Value) {
        self.facts.push((key, value));
    }

    /// One object, with an object per group in it.
    pub(crate) fn json(&self) -> Value {
        let mut document = Map::new();
        for (key, value) in &self.facts {
            document.insert((*key).into(), value.clone());
        }
        for measurement in &self.list {
            let (group, name) = measurement
                .key
                .split_once('.')
                .unwrap_or(("", measurement.key));
            let group = document.entry(group).or_insert_with(|| json!({}));
            group[name] = json!(round(measurement.value));
            if let Some((low, high)) = measurement.interval {
                group[format!("{name}_low")] = json!(round(low));
                group[format!("{name}_high")] = json!(round(high));
            }
        }
        document.into()
    }

    /// A line per result: value, interval, target and description.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let mut group = "";
        // Writing to a string does not fail.
        for (key, value) in &self.facts {
            let _ = writeln!(out, "{key}: {}", plain(value));
        }
        for measurement in &self.list {
            let of = measurement.key.split('.').next().unwrap_or("");
            if of != group {
                group = of;
                out.push('\n');
            }
            let value = format!("{} {}", number(measurement.value), measurement.unit);
            let interval = measurement
                .interval
                .map_or_else(String::new, |(low, high)| {
                    format!("{} to {}", number(low), number(high))
                });
            let target = measurement.target.text(measurement);
            let _ = writeln!(
                out,
                "{:<36}{:>14}  {:<16}  {:<16}{}",
                measurement.key,
                value.trim_end(),
                interval,
                target,
                measurement.what
            );
        }
        out
    }
}

impl Goal {
    fn text(self, measurement: &Measurement) -> String {
        let value = measurement.value;
        let (sign, target, met) = match self {
            Self::None => return String::new(),
            Self::AtMost(most) => ("≤", most, value <= most),
            Self::AtLeast(least) => ("≥", least, value >= least),
            Self::IntervalAtMost(most) => {
                let low = measurement.interval.map_or(value, |(low, _)| low);
                ("within", most, low <= most)
            }
        };
        let target = number(target);
        format!("{sign} {target}{}", if met { "" } else { " missed" })
    }
}

/// Rounds to three digits after the point, because more are noise.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Formats a number with its significant digits.
fn number(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 1000.0 {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Object(map) => {
            let parts: Vec<_> = map
                .iter()
                .map(|(key, value)| format!("{key} {}", plain(value)))
                .collect();
            parts.join(", ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> BenchResults {
        let mut results = BenchResults::default();
        results.fact("machine", json!({"cores": 2}));
        results
            .add("bpf.ns_per_event", 123.4567, "ns", "cost", AtMost(200.0))
            .unwrap();
        results
            .add("churn.rps_ratio", 0.97, "", "on ÷ off", AtLeast(0.98))
            .unwrap();
        results
    }

    #[test]
    fn dotted_keys_become_objects() {
        let json = results().json();
        assert_eq!(json["bpf"]["ns_per_event"], 123.457);
        assert_eq!(json["churn"]["rps_ratio"], 0.97);
        assert_eq!(json["machine"]["cores"], 2);
    }

    #[test]
    fn the_table_marks_a_missed_target() {
        let table = results().table();
        assert!(table.contains("≤ 200"), "{table}");
        assert!(table.contains("≥ 0.980 missed"), "{table}");
    }

    #[test]
    fn an_interval_is_shown_and_decides_an_interval_goal() {
        let mut results = BenchResults::default();
        for (key, low) in [("a.good", 0.99), ("a.bad", 1.01)] {
            let (median, high) = (1.02, 1.05);
            let value = Interval { median, low, high };
            let target = IntervalAtMost(1.0);
            results.add_interval(key, value, "", "", target).unwrap();
        }
        let json = results.json();
        assert_eq!(json["a"]["good_low"], 0.99);
        assert_eq!(json["a"]["good_high"], 1.05);
        let table = results.table();
        let line = |key: &str| table.lines().find(|l| l.starts_with(key)).unwrap();
        assert!(line("a.good").contains("0.990 to 1.050"), "{table}");
        assert!(!line("a.good").contains("missed"), "{table}");
        assert!(line("a.bad").contains("missed"), "{table}");
    }

    #[test]
    fn a_value_that_is_not_finite_is_an_error() {
        let mut results = BenchResults::default();
        assert!(results.add("a.b", f64::NAN, "", "", Goal::None).is_err());
    }
}
