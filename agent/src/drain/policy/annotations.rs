//! A pod's annotations, laid over the node's policy.
//!
//! A bad value never stops a pod from terminating: it becomes a warning, and what the node says stays.

use std::{collections::BTreeMap, fmt::Display, ops::RangeInclusive, time::Duration};

use super::Policy;

/// What the names of ebb's annotations begin with.
pub const PREFIX: &str = "ebb.dev/";

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// What `quiet` may be.
pub const QUIET: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(10 * 60);
/// What `idle-after` may be: the kernel's times have jiffy resolution, and a flow is not at rest sooner.
pub const IDLE_AFTER: RangeInclusive<Duration> = Duration::from_millis(100)..=HOUR;
/// What `reserve` may be.
pub const RESERVE: RangeInclusive<Duration> = Duration::ZERO..=HOUR;
/// What `max-hold` may be.
pub const MAX_HOLD: RangeInclusive<Duration> = SECOND..=Duration::from_secs(24 * 60 * 60);

/// The annotations ebb knows, without their prefix.
pub const KEYS: [&str; 10] = [
    "drain",
    "until",
    "quiet",
    "idle-after",
    "idle-flows",
    "reserve",
    "max-hold",
    "ports",
    "ignore-ports",
    "wait-port",
];

impl Policy {
    /// The policy of a pod with these annotations, on a node whose policy is `self`, and one line for
    /// each annotation that could not be obeyed. Annotations that are not under `ebb.dev/` are not read.
    pub fn from_annotations(&self, annotations: &BTreeMap<String, String>) -> (Self, Vec<String>) {
        let mut policy = self.clone();
        let mut warnings = Vec::new();
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(PREFIX) else {
                continue;
            };
            if let Err(why) = policy.set(key, value.trim()) {
                warnings.push(format!("annotation {name}: {why}"));
            }
        }
        if policy.quiet > policy.settle_max && policy.quiet != self.quiet {
            warnings.push(format!(
                "annotation {PREFIX}quiet: {} is longer than the settle phase can last on this node; it \
                 ends after {}",
                show(policy.quiet),
                show(policy.settle_max),
            ));
        }
        (policy, warnings)
    }

    /// Lays one annotation over this policy. On failure the policy is as before.
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "drain" => {
                self.enabled = match value {
                    "on" => true,
                    "off" => false,
                    _ => {
                        let kept = if self.enabled { "on" } else { "off" };
                        return Err(instead(format!("{value:?} is not one of on, off"), kept));
                    }
                }
            }
            "until" => self.until = value.parse().map_err(|e| instead(e, self.until))?,
            "idle-flows" => {
                self.idle_flows = value.parse().map_err(|e| instead(e, self.idle_flows))?;
            }
            "quiet" => {
                self.quiet = duration(value, QUIET).map_err(|e| instead(e, show(self.quiet)))?
            }
            "idle-after" => {
                self.idle_after =
                    duration(value, IDLE_AFTER).map_err(|e| instead(e, show(self.idle_after)))?;
            }
            "reserve" => {
                self.reserve =
                    duration(value, RESERVE).map_err(|e| instead(e, show(self.reserve)))?;
            }
            "max-hold" => {
                self.max_hold = Some(duration(value, MAX_HOLD).map_err(|e| {
                    let kept = self
                        .max_hold
                        .map_or_else(|| "the grace period".to_owned(), show);
                    instead(e, kept)
                })?);
            }
            "ports" => {
                self.ports =
                    ports(value).map_err(|e| instead(e, show_ports(&self.ports, "all ports")))?
            }
            "ignore-ports" => {
                self.ignore_ports = ports(value)
                    .map_err(|e| instead(e, show_ports(&self.ignore_ports, "no ports")))?;
            }
            "wait-port" => {
                self.wait_port = match value.parse() {
                    Ok(0) | Err(_) => {
                        let why = format!("{value:?} is not a port from 1 to 65535");
                        return Err(instead(why, "no port"));
                    }
                    Ok(port) => Some(port),
                }
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }
}

fn instead(why: impl Display, kept: impl Display) -> String {
    format!("{why}; using {kept} instead")
}

fn duration(value: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!(
            "{value:?} has no unit: write {value}s for seconds or {value}m for minutes"
        ));
    }
    let given = humantime::parse_duration(value)
        .map_err(|e| format!("{value:?} is not a duration such as 30s or 1m 30s ({e})"))?;
    if range.contains(&given) {
        Ok(given)
    } else {
        Err(format!(
            "{value:?} is not between {} and {}",
            show(*range.start()),
            show(*range.end())
        ))
    }
}

fn ports(value: &str) -> Result<Vec<u16>, String> {
    value
        .split(',')
        .map(str::trim)
        .map(|port| match port.parse() {
            Ok(0) | Err(_) => Err(format!(
                "{port:?} in {value:?} is not a port: write numbers from 1 to 65535 with commas between them"
            )),
            Ok(port) => Ok(port),
        })
        .collect()
}

fn unknown(key: &str) -> String {
    let nearest = KEYS
        .iter()
        .min_by_key(|known| strsim::damerau_levenshtein(key, known))
        .unwrap_or(&KEYS[0]);
    format!("ebb knows no such annotation; the nearest is {PREFIX}{nearest}. It is ignored")
}

fn show(d: Duration) -> String {
    humantime::format_duration(d).to_string()
}

pub(super) fn show_ports(ports: &[u16], none: &str) -> String {
    if ports.is_empty() {
        return none.to_owned();
    }
    ports
        .iter()
        .map(u16::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain::policy::{IdleFlows, Until};

    fn read(pairs: &[(&str, &str)]) -> (Policy, Vec<String>) {
        let annotations = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect::<BTreeMap<_, _>>();
        Policy::default().from_annotations(&annotations)
    }

    /// The one warning that `value` under `key` gives; the policy must be the default.
    fn refused(key: &str, value: &str) -> String {
        let (policy, mut warnings) = read(&[(key, value)]);
        assert_eq!(
            policy,
            Policy::default(),
            "{key}={value} changed the policy"
        );
        assert_eq!(warnings.len(), 1, "{key}={value}: {warnings:?}");
        warnings.remove(0)
    }

    #[test]
    fn every_annotation_is_read() {
        let (policy, warnings) = read(&[
            ("ebb.dev/drain", "off"),
            ("ebb.dev/until", "idle"),
            ("ebb.dev/quiet", "10s"),
            ("ebb.dev/idle-after", "500ms"),
            ("ebb.dev/idle-flows", "keep"),
            ("ebb.dev/reserve", " 1m 30s "),
            ("ebb.dev/max-hold", "2h"),
            ("ebb.dev/ports", "80, 443"),
            ("ebb.dev/ignore-ports", "9090"),
            ("ebb.dev/wait-port", "9690"),
        ]);
        assert_eq!(warnings, Vec::<String>::new());
        let expected = Policy {
            enabled: false,
            until: Until::Idle,
            quiet: Duration::from_secs(10),
            idle_after: Duration::from_millis(500),
            reserve: Duration::from_secs(90),
            max_hold: Some(Duration::from_secs(7200)),
            ports: vec![80, 443],
            ignore_ports: vec![9090],
            wait_port: Some(9690),
            ..Policy::default()
        };
        assert_eq!(policy, expected);
    }

    #[test]
    fn what_the_pod_does_not_say_stays_as_the_node_says() {
        let node = Policy {
            until: Until::Idle,
            reserve: Duration::from_secs(9),
            ..Policy::default()
        };
        let pod = BTreeMap::from([
            ("ebb.dev/quiet".to_owned(), "1s".to_owned()),
            ("ebb.dev/reserve".to_owned(), "never".to_owned()),
            ("prometheus.io/scrape".to_owned(), "true".to_owned()),
        ]);
        let (policy, warnings) = node.from_annotations(&pod);
        assert_eq!(
            policy,
            Policy {
                quiet: Duration::from_secs(1),
                ..node
            }
        );
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].ends_with("using 9s instead"), "{warnings:?}");
    }

    #[test]
    fn a_bare_number_is_refused_with_the_unit_it_lacks() {
        assert_eq!(
            refused("ebb.dev/quiet", "30"),
            "annotation ebb.dev/quiet: \"30\" has no unit: write 30s for seconds or 30m for minutes; \
             using 3s instead"
        );
    }

    #[test]
    fn durations_out_of_range_are_refused_with_the_range() {
        for (key, value, range) in [
            ("quiet", "11m", "between 0s and 10m"),
            ("idle-after", "99ms", "between 100ms and 1h"),
            ("idle-after", "2h", "between 100ms and 1h"),
            ("reserve", "61m", "between 0s and 1h"),
            ("max-hold", "25h", "between 1s and 1day"),
            ("max-hold", "0s", "between 1s and 1day"),
        ] {
            let warning = refused(&format!("ebb.dev/{key}"), value);
            assert!(warning.contains(range), "{warning}");
        }
        assert!(refused("ebb.dev/max-hold", "").contains("using the grace period instead"));
    }

    #[test]
    fn a_bad_port_drops_the_whole_list() {
        assert!(refused("ebb.dev/ports", "80,http").contains("\"http\" in \"80,http\""));
        assert!(refused("ebb.dev/ports", "80,http").ends_with("using all ports instead"));
        assert!(refused("ebb.dev/ignore-ports", "0").ends_with("using no ports instead"));
        assert!(refused("ebb.dev/ignore-ports", "65536").contains("65535"));
        for port in ["0", "65536", "http", ""] {
            assert!(refused("ebb.dev/wait-port", port).ends_with("using no port instead"));
        }
    }

    #[test]
    fn an_unknown_annotation_is_answered_with_the_nearest_known() {
        assert!(refused("ebb.dev/ignored-port", "80").contains("ebb.dev/ignore-ports"));
        assert!(refused("ebb.dev/untill", "idle").contains("ebb.dev/until"));
        assert!(refused("ebb.dev/drian", "off").contains("ebb.dev/drain"));
    }

    #[test]
    fn bad_words_are_answered_with_the_good_ones() {
        assert!(
            refused("ebb.dev/until", "empty").contains("zero, idle, settled; using zero instead")
        );
        assert!(refused("ebb.dev/idle-flows", "cut").contains("keep, close; using keep instead"));
        assert!(refused("ebb.dev/drain", "false").contains("on, off; using on instead"));
    }

    #[test]
    fn idle_flows_are_closed_only_where_the_pod_asks_for_it() {
        let (policy, warnings) = read(&[("ebb.dev/idle-flows", "close")]);
        assert_eq!(policy.idle_flows, IdleFlows::Close);
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(read(&[]).0.idle_flows, IdleFlows::Keep);
    }

    #[test]
    fn a_quiet_time_beyond_the_settle_phase_is_pointed_out() {
        let (policy, warnings) = read(&[("ebb.dev/quiet", "1m")]);
        assert_eq!(policy.quiet, Duration::from_secs(60));
        assert!(warnings[0].contains("it ends after 15s"), "{warnings:?}");
    }
}
