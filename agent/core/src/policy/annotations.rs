//! A pod's annotations, applied to the node's policy.
//!
//! A bad value never stops a pod from terminating: ebb warns of it and uses the node's value.

use std::{collections::BTreeMap, fmt::Display, ops::RangeInclusive, time::Duration};

use super::{DEFAULT_MAX_HOLD, Policy, Until};
use crate::notification::DrainRequest;

/// The prefix of ebb's annotations.
pub const PREFIX: &str = "ebb.dev/";

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// The accepted range of `quiet`.
pub const QUIET: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(10 * 60);
/// The accepted range of `settle-min` and `settle-max`. No grace period is longer than a day.
pub const SETTLE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(24 * 60 * 60);
/// The accepted range of `idle-after`. The kernel's times have jiffy resolution, so less than 100 ms means nothing.
pub const IDLE_AFTER: RangeInclusive<Duration> = Duration::from_millis(100)..=HOUR;
/// The accepted range of `peer-timeout`. The kernel doubles the time between retransmissions up to 2 minutes, so that a
/// longer silence can't be measured.
pub const PEER_TIMEOUT: RangeInclusive<Duration> = SECOND..=Duration::from_secs(2 * 60);
/// The accepted range of `reserve`.
pub const RESERVE: RangeInclusive<Duration> = Duration::ZERO..=HOUR;
/// The accepted range of `max-hold`.
pub const MAX_HOLD: RangeInclusive<Duration> = SECOND..=Duration::from_secs(24 * 60 * 60);

/// The annotations that ebb reads, without their prefix.
pub const KEYS: [&str; 17] = [
    "drain",
    "until",
    "quiet",
    "settle-min",
    "settle-max",
    "idle-after",
    "idle-flows",
    "peer-timeout",
    "reserve",
    "max-hold",
    "ports",
    "ignore-ports",
    "outbound",
    "wait-port",
    "stop-signal",
    "stop-signal-to",
    "on-drain",
];

impl Policy {
    /// The policy of a pod with these annotations on a node whose policy is `self`, and one warning per bad
    /// annotation. Ignores annotations outside `ebb.dev/`.
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
        let longest = policy.longest_settle();
        if policy.quiet > longest && policy.quiet != self.quiet {
            warnings.push(format!(
                "annotation {PREFIX}quiet: {} is longer than the settle phase can last; it ends after {}: set \
                 {PREFIX}settle-max",
                show(policy.quiet),
                show(longest),
            ));
        }
        // A minimum above the node's maximum is what the pod asks for.
        if policy.settle_min > policy.settle_max && policy.settle_max != self.settle_max {
            warnings.push(format!(
                "annotation {PREFIX}settle-max: {} is shorter than settle-min; settling lasts for {}",
                show(policy.settle_max),
                show(policy.settle_min),
            ));
        }
        warnings.extend(policy.without_effect(annotations));
        (policy, warnings)
    }

    /// The policy of pods without annotations in a namespace with these annotations, and one warning per bad annotation.
    /// Of a namespace, ebb reads only `ebb.dev/drain`.
    pub fn from_namespace(
        &self,
        name: &str,
        annotations: &BTreeMap<String, String>,
    ) -> (Self, Vec<String>) {
        let mut policy = self.clone();
        let mut warnings = Vec::new();
        for (annotation, value) in annotations {
            let Some(key) = annotation.strip_prefix(PREFIX) else {
                continue;
            };
            let set = match key {
                "drain" => policy.set(key, value.trim()),
                _ => Err(format!(
                    "of a namespace, ebb reads only {PREFIX}drain. It is ignored"
                )),
            };
            if let Err(why) = set {
                warnings.push(format!(
                    "annotation {annotation} of namespace {name}: {why}"
                ));
            }
        }
        (policy, warnings)
    }

    /// Warnings of annotations about the stop signal that have no effect.
    fn without_effect(&self, annotations: &BTreeMap<String, String>) -> Vec<String> {
        let is_set = |key| annotations.contains_key(&format!("{PREFIX}{key}"));
        let mut warnings = Vec::new();
        if self.stop_signals.is_empty() && is_set("stop-signal-to") {
            warnings.push(format!(
                "annotation {PREFIX}stop-signal-to: it has no effect without a valid {PREFIX}stop-signal"
            ));
        }
        if !self.stop_signals.is_empty() && self.until == Until::Settled {
            warnings.push(format!(
                "annotation {PREFIX}stop-signal: with until settled the pod is stopped as soon as it has settled, so ebb sends no signal"
            ));
        }
        warnings
    }

    /// Applies one annotation. On failure the policy stays as it was.
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "drain" => self.drain = value.parse().map_err(|e| instead(e, self.drain))?,
            "until" => self.until = value.parse().map_err(|e| instead(e, self.until))?,
            "idle-flows" => {
                self.idle_flows = value.parse().map_err(|e| instead(e, self.idle_flows))?;
            }
            "quiet" => {
                self.quiet = duration(value, QUIET).map_err(|e| instead(e, show(self.quiet)))?;
                self.quiet_is_set = true;
            }
            "settle-min" => {
                self.settle_min =
                    duration(value, SETTLE).map_err(|e| instead(e, show(self.settle_min)))?;
            }
            "settle-max" => {
                self.settle_max =
                    duration(value, SETTLE).map_err(|e| instead(e, show(self.settle_max)))?;
            }
            "idle-after" => {
                self.idle_after =
                    duration(value, IDLE_AFTER).map_err(|e| instead(e, show(self.idle_after)))?;
            }
            "peer-timeout" => {
                self.peer_timeout = duration(value, PEER_TIMEOUT)
                    .map_err(|e| instead(e, show(self.peer_timeout)))?;
            }
            "reserve" => {
                self.reserve =
                    duration(value, RESERVE).map_err(|e| instead(e, show(self.reserve)))?;
            }
            "max-hold" => {
                self.max_hold = Some(duration(value, MAX_HOLD).map_err(|e| {
                    let kept = self.max_hold.map_or_else(
                        || format!("the grace period, {} at most,", show(DEFAULT_MAX_HOLD)),
                        show,
                    );
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
            "outbound" => {
                self.outbound = value.parse().map_err(|e| instead(e, &self.outbound))?;
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
            "stop-signal" => {
                self.stop_signals = value.parse().map_err(|e| instead(e, &self.stop_signals))?;
            }
            "stop-signal-to" => {
                self.stop_signal_to = value.parse().map_err(|e| instead(e, self.stop_signal_to))?;
            }
            "on-drain" => {
                self.on_drain = Some(
                    value
                        .parse()
                        .map_err(|e| instead(e, show_request(self.on_drain.as_ref())))?,
                );
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

pub(super) fn show_request(request: Option<&DrainRequest>) -> String {
    request.map_or_else(
        || "none".to_owned(),
        |request| {
            let when = if request.after_settle {
                "after-settle "
            } else {
                ""
            };
            format!("{when}{request}")
        },
    )
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
    use crate::{
        notification::SignalTarget,
        policy::{DrainMode, IdleFlows},
    };

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
            ("ebb.dev/settle-min", "5s"),
            ("ebb.dev/settle-max", "3m"),
            ("ebb.dev/idle-after", "500ms"),
            ("ebb.dev/idle-flows", "keep"),
            ("ebb.dev/peer-timeout", "45s"),
            ("ebb.dev/reserve", " 1m 30s "),
            ("ebb.dev/max-hold", "2h"),
            ("ebb.dev/ports", "80, 443"),
            ("ebb.dev/ignore-ports", "9090"),
            ("ebb.dev/outbound", "hold"),
            ("ebb.dev/wait-port", "9690"),
            ("ebb.dev/stop-signal-to", "children"),
            ("ebb.dev/stop-signal", "SIGQUIT"),
            ("ebb.dev/on-drain", "after-settle GET :8080/drain"),
        ]);
        assert_eq!(warnings, Vec::<String>::new());
        let expected = Policy {
            drain: DrainMode::Off,
            until: Until::Idle,
            quiet: Duration::from_secs(10),
            quiet_is_set: true,
            settle_min: Duration::from_secs(5),
            settle_max: Duration::from_secs(180),
            idle_after: Duration::from_millis(500),
            peer_timeout: Duration::from_secs(45),
            reserve: Duration::from_secs(90),
            max_hold: Some(Duration::from_secs(7200)),
            ports: vec![80, 443],
            ignore_ports: vec![9090],
            outbound: crate::policy::Outbound::Hold,
            wait_port: Some(9690),
            stop_signals: "SIGQUIT".parse().unwrap(),
            stop_signal_to: SignalTarget::Children,
            on_drain: Some("after-settle GET :8080/drain".parse().unwrap()),
            ..Policy::default()
        };
        assert_eq!(policy, expected);
    }

    #[test]
    fn settings_without_a_valid_annotation_stay_as_on_the_node() {
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
                quiet_is_set: true,
                ..node
            }
        );
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].ends_with("using 9s instead"), "{warnings:?}");
    }

    #[test]
    fn a_number_without_a_unit_is_refused_and_the_warning_names_units() {
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
            ("settle-min", "25h", "between 0s and 1day"),
            ("settle-max", "25h", "between 0s and 1day"),
            ("idle-after", "99ms", "between 100ms and 1h"),
            ("idle-after", "2h", "between 100ms and 1h"),
            ("peer-timeout", "999ms", "between 1s and 2m"),
            ("peer-timeout", "3m", "between 1s and 2m"),
            ("reserve", "61m", "between 0s and 1h"),
            ("max-hold", "25h", "between 1s and 1day"),
            ("max-hold", "0s", "between 1s and 1day"),
        ] {
            let warning = refused(&format!("ebb.dev/{key}"), value);
            assert!(warning.contains(range), "{warning}");
        }
        let no_hold = refused("ebb.dev/max-hold", "");
        assert!(no_hold.contains("using the grace period, 1h at most, instead"));
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
    fn the_warning_about_an_unknown_annotation_names_the_nearest_known_one() {
        assert!(refused("ebb.dev/ignored-port", "80").contains("ebb.dev/ignore-ports"));
        assert!(refused("ebb.dev/untill", "idle").contains("ebb.dev/until"));
        assert!(refused("ebb.dev/drian", "off").contains("ebb.dev/drain"));
    }

    #[test]
    fn the_warning_about_a_bad_value_lists_the_accepted_ones() {
        assert!(
            refused("ebb.dev/until", "empty").contains("zero, idle, settled; using zero instead")
        );
        assert!(refused("ebb.dev/idle-flows", "cut").contains("keep, close; using keep instead"));
        assert!(refused("ebb.dev/drain", "false").contains("on, observe, off; using on instead"));
    }

    #[test]
    fn idle_flows_are_closed_only_if_the_annotation_says_so() {
        let (policy, warnings) = read(&[("ebb.dev/idle-flows", "close")]);
        assert_eq!(policy.idle_flows, IdleFlows::Close);
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(read(&[]).0.idle_flows, IdleFlows::Keep);
    }

    #[test]
    fn a_signal_that_no_application_can_act_on_is_refused() {
        for bad in ["SIGKILL", "STOP", "9", "nonsense", "web=KILL"] {
            let warning = refused("ebb.dev/stop-signal", bad);
            assert!(warning.contains("SIGQUIT"), "{warning}");
            assert!(warning.ends_with("using none instead"), "{warning}");
        }
        let warning = refused("ebb.dev/on-drain", "GET 8080/drain");
        assert!(warning.contains("using none instead"), "{warning}");
    }

    #[test]
    fn a_stop_signal_that_can_not_be_sent_gives_a_warning() {
        let (_, warnings) = read(&[("ebb.dev/stop-signal-to", "children")]);
        assert!(warnings[0].contains("no effect"), "{warnings:?}");
        let (_, warnings) = read(&[
            ("ebb.dev/stop-signal", "QUIT"),
            ("ebb.dev/until", "settled"),
        ]);
        assert!(warnings[0].contains("sends no signal"), "{warnings:?}");
    }

    #[test]
    fn settling_may_last_longer_than_on_the_node() {
        for settle in [
            &[("ebb.dev/quiet", "1m"), ("ebb.dev/settle-max", "2m")][..],
            &[("ebb.dev/quiet", "1m"), ("ebb.dev/settle-min", "2m")],
        ] {
            let (policy, warnings) = read(settle);
            assert_eq!(policy.longest_settle(), Duration::from_secs(120));
            assert_eq!(warnings, Vec::<String>::new());
        }
        let (policy, warnings) =
            read(&[("ebb.dev/settle-min", "9s"), ("ebb.dev/settle-max", "2s")]);
        assert_eq!(policy.longest_settle(), Duration::from_secs(9));
        assert!(
            warnings[0].contains("settling lasts for 9s"),
            "{warnings:?}"
        );
    }

    #[test]
    fn a_quiet_time_longer_than_the_settle_phase_gives_a_warning() {
        let (policy, warnings) = read(&[("ebb.dev/quiet", "1m")]);
        assert_eq!(policy.quiet, Duration::from_secs(60));
        assert!(warnings[0].contains("it ends after 15s"), "{warnings:?}");
    }

    #[test]
    fn a_namespace_sets_only_drain_and_a_pod_overrides_it() {
        let of_namespace = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
            Policy::default().from_namespace("shop", &pairs.collect())
        };
        let (policy, warnings) = of_namespace(&[("ebb.dev/drain", "observe"), ("other", "x")]);
        assert_eq!((policy.drain, warnings.len()), (DrainMode::Observe, 0));
        let pod = |value: &str| BTreeMap::from([("ebb.dev/drain".into(), value.into())]);
        assert_eq!(policy.from_annotations(&pod("on")).0.drain, DrainMode::On);
        let (kept, warnings) = policy.from_annotations(&pod("maybe"));
        assert_eq!(kept.drain, DrainMode::Observe);
        assert!(
            warnings[0].contains("on, observe, off; using observe instead"),
            "{warnings:?}"
        );
        let (policy, warnings) =
            of_namespace(&[("ebb.dev/drain", "no"), ("ebb.dev/until", "idle")]);
        assert_eq!(policy, Policy::default());
        assert!(
            warnings[0].contains("of namespace shop: \"no\" is not one of"),
            "{warnings:?}"
        );
        assert!(warnings[1].contains("only ebb.dev/drain"), "{warnings:?}");
    }
}
