//! The figures of a run: one JSON document, or a table for people.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

/// What a figure should be.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// Nothing in particular: a baseline, or something to know.
    None,
    AtMost(f64),
    AtLeast(f64),
}
pub(crate) use Target::{AtLeast, AtMost};

struct Figure {
    key: &'static str,
    value: f64,
    unit: &'static str,
    what: String,
    target: Target,
}

/// All figures, in the order in which they were measured.
#[derive(Default)]
pub(crate) struct Figures {
    list: Vec<Figure>,
    facts: Vec<(&'static str, Value)>,
}

impl Figures {
    /// Adds a figure under a dotted key, `group.name`.
    ///
    /// # Errors
    /// If it is not a finite number: then nothing was measured.
    pub(crate) fn add(
        &mut self,
        key: &'static str,
        value: f64,
        unit: &'static str,
        what: impl Into<String>,
        target: Target,
    ) -> Result<()> {
        ensure!(value.is_finite(), "{key} is {value}: nothing was measured");
        self.list.push(Figure {
            key,
            value,
            unit,
            what: what.into(),
            target,
        });
        Ok(())
    }

    /// Adds something that is not measured: the machine, how it was run.
    pub(crate) fn fact(&mut self, key: &'static str, value: Value) {
        self.facts.push((key, value));
    }

    /// One object, with one for each group in it.
    pub(crate) fn json(&self) -> Value {
        let mut document = Map::new();
        for (key, value) in &self.facts {
            document.insert((*key).into(), value.clone());
        }
        for figure in &self.list {
            let (group, name) = figure.key.split_once('.').unwrap_or(("", figure.key));
            let group = document.entry(group).or_insert_with(|| json!({}));
            group[name] = json!(round(figure.value));
        }
        document.into()
    }

    /// A line for each figure: what it is, and its target where it has one.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let mut group = "";
        // Writing to a string does not fail.
        for (key, value) in &self.facts {
            let _ = writeln!(out, "{key}: {}", plain(value));
        }
        for figure in &self.list {
            let of = figure.key.split('.').next().unwrap_or("");
            if of != group {
                group = of;
                out.push('\n');
            }
            let value = format!("{} {}", number(figure.value), figure.unit);
            let target = figure.target.text(figure.value);
            let _ = writeln!(
                out,
                "{:<34}{:>16}  {:<16}{}",
                figure.key,
                value.trim_end(),
                target,
                figure.what
            );
        }
        out
    }
}

impl Target {
    fn text(self, value: f64) -> String {
        let (sign, target, met) = match self {
            Self::None => return String::new(),
            Self::AtMost(most) => ("≤", most, value <= most),
            Self::AtLeast(least) => ("≥", least, value >= least),
        };
        let target = number(target);
        format!("{sign} {target}{}", if met { "" } else { " missed" })
    }
}

/// Three digits after the point: more is noise.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// As many digits as mean something.
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

    fn figures() -> Figures {
        let mut figures = Figures::default();
        figures.fact("machine", json!({"cores": 2}));
        figures
            .add("bpf.ns_per_event", 123.4567, "ns", "cost", AtMost(200.0))
            .unwrap();
        figures
            .add("churn.rps_ratio", 0.97, "", "on ÷ off", AtLeast(0.98))
            .unwrap();
        figures
    }

    #[test]
    fn dotted_keys_become_objects() {
        let json = figures().json();
        assert_eq!(json["bpf"]["ns_per_event"], 123.457);
        assert_eq!(json["churn"]["rps_ratio"], 0.97);
        assert_eq!(json["machine"]["cores"], 2);
    }

    #[test]
    fn a_missed_target_is_said_to_be_missed() {
        let table = figures().table();
        assert!(table.contains("≤ 200"), "{table}");
        assert!(table.contains("≥ 0.980 missed"), "{table}");
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let mut figures = Figures::default();
        assert!(figures.add("a.b", f64::NAN, "", "", Target::None).is_err());
    }
}
