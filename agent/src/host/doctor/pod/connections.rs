//! The checks of a pod's connections against its policy. Pure.

use ebb_common::LIFETIMES_MS;
use ebb_core::format::duration;
use ebb_protocol::{
    table::age,
    views::{Explanation, LifetimeBucket, PodView},
};

use super::super::{
    Check,
    CheckStatus::{Ok as Fine, Unknown, Warn},
};

/// How long the cluster autoscaler waits for the pods of a node that it removes, in milliseconds: the default of its
/// `--max-graceful-termination-sec`.
const AUTOSCALER_WAITS: u64 = 600_000;

/// Checks the pod's connections against its policy.
pub(super) fn checks(pod: &PodView, explanation: &Explanation) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Some(why) = &pod.untracked {
        checks.push(Check::new(
            "connections",
            Warn,
            format!("not visible: {why}; a stop is held for the settle time alone"),
        ));
    }
    for warning in &pod.warnings {
        checks.push(Check::new("policy", Warn, warning));
    }
    let Some(now) = &explanation.now else {
        return checks;
    };
    let setting = |name: &str| {
        let setting = now.settings.iter().find(|s| s.name == name);
        setting.map_or("", |s| s.value.as_str())
    };
    if let Some(why) = &now.never_held {
        checks.push(Check::new(
            "policy",
            Warn,
            format!("no stop of it is held: {why}"),
        ));
        return checks;
    }
    let oldest = oldest(pod, explanation);
    let deadline = duration(now.deadline_ms);
    let outlasting = outlasting(&explanation.lifetimes, now.deadline_ms);
    let too_short = |what: String| {
        Check::new("grace period", Warn, format!("{what}, and a hold ends after {deadline}"))
            .because("connections that last longer are cut at the end of the hold")
            .change(
                "set terminationGracePeriodSeconds to more than they need, or ebb.dev/idle-flows: close if they are \
                 only kept alive",
            )
    };
    checks.push(match oldest {
        Some(oldest) if oldest.ms > now.deadline_ms => {
            too_short(format!("a connection has lasted {}", oldest.text()))
        }
        _ if let Some((longer, all)) = outlasting => too_short(format!(
            "{longer} of its last {all} connections lasted longer than {deadline}"
        )),
        Some(oldest) => {
            let detail = format!(
                "the oldest connection has lasted {}, and a hold {deadline} at most",
                oldest.text()
            );
            let status = if oldest.is_at_least { Unknown } else { Fine };
            let check = Check::new("grace period", status, detail);
            match oldest.is_at_least {
                true => check.because(
                    "ebb did not see its opening, so it may have lasted longer than a hold",
                ),
                false => check,
            }
        }
        None => Check::new(
            "grace period",
            Fine,
            format!("a hold lasts {deadline} at most; no connection is open"),
        ),
    });
    if let Some(grace) = now.grace_ms.filter(|grace| *grace > AUTOSCALER_WAITS) {
        checks.push(Check::new(
            "grace period",
            Warn,
            format!(
                "it may take {}, and the cluster autoscaler removes a node after {} even if pods still run",
                duration(grace),
                duration(AUTOSCALER_WAITS)
            ),
        )
        .change("raise its --max-graceful-termination-sec, or keep such pods off the nodes that it removes"));
    }
    if let Some(flows) = pod.flows
        && flows.idle > 0
        && setting("until") == "zero"
        && setting("idle-flows") == "keep"
    {
        checks.push(
            Check::new(
                "keep-alive",
                Warn,
                format!(
                    "{} idle connections would hold it until their clients close them",
                    flows.idle
                ),
            )
            .change("consider ebb.dev/idle-flows: close, or ebb.dev/until: idle"),
        );
    }
    if let Some(peer) = explanation
        .drain
        .as_ref()
        .and_then(|d| d.late_peers.first())
    {
        checks.push(
            Check::new(
                "readiness",
                Warn,
                format!(
                    "{} still connected {} times during the drain",
                    peer.peer_text(),
                    peer.flows
                ),
            )
            .because("balancers or clients notice the pod's end late (readiness, endpoints, DNS)")
            .change(
                "let them notice it, or name a port that only probes use in ebb.dev/ignore-ports",
            ),
        );
    }
    checks
}

/// The age of a connection.
#[derive(Clone, Copy)]
struct OldestAge {
    ms: u64,
    /// It is a lower bound.
    is_at_least: bool,
}

impl OldestAge {
    /// `5.0s`, or `>5.0s` for a lower bound.
    fn text(self) -> String {
        match self.is_at_least {
            true => age(None, Some(self.ms)),
            false => age(Some(self.ms), None),
        }
    }
}

/// The age of the oldest connection, of those that are open and those that the last drain cut. If the age of any is a
/// lower bound, that of the oldest is.
fn oldest(pod: &PodView, explanation: &Explanation) -> Option<OldestAge> {
    let open = pod.oldest_ms.map(|ms| OldestAge {
        ms,
        is_at_least: pod.oldest_is_at_least,
    });
    let cut = explanation.drain.iter().flat_map(|d| &d.cut);
    let cut = cut.filter_map(|c| {
        Some(OldestAge {
            ms: c.age_ms.or(c.age_at_least_ms)?,
            is_at_least: c.age_ms.is_none(),
        })
    });
    cut.chain(open).reduce(|a, b| OldestAge {
        ms: a.ms.max(b.ms),
        is_at_least: a.is_at_least || b.is_at_least,
    })
}

/// How many connections certainly lasted longer than a hold, and of how many, if that is 1 % or more.
fn outlasting(lifetimes: &[LifetimeBucket], deadline_ms: u64) -> Option<(u64, u64)> {
    let shorter_bounds = LIFETIMES_MS.iter().filter(|bound| **bound >= deadline_ms);
    // Buckets above this bound have no connection that lasted less than a hold.
    let first = *shorter_bounds.min()?;
    let all: u64 = lifetimes.iter().map(|b| b.connections).sum();
    let longer = lifetimes
        .iter()
        .filter(|b| b.at_most_ms.is_none_or(|bound| bound > first));
    let longer: u64 = longer.map(|b| b.connections).sum();
    (longer > 0 && longer * 100 >= all).then_some((longer, all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::doctor::CheckStatus;
    use ebb_core::{
        flow::FlowCounts,
        ids::{PodName, PodUid},
    };
    use ebb_protocol::views::{
        LifetimeBucket, Network, PolicyView, SCHEMA, Setting, SettingSource,
    };

    fn checks_of(change: impl FnOnce(&mut PodView, &mut PolicyView)) -> Vec<Check> {
        let name = PodName {
            uid: PodUid::new("u"),
            namespace: "shop".into(),
            name: "web".into(),
        };
        let mut pod = PodView {
            pod: name.clone(),
            network: Network::Pod,
            ips: vec![],
            labels: std::collections::BTreeMap::new(),
            containers: vec![],
            flows: Some(FlowCounts::default()),
            peers: Some(0),
            exempt: Some(0),
            new_per_second: Some(0.4),
            oldest_ms: None,
            oldest_is_at_least: false,
            untracked: None,
            warnings: vec![],
        };
        let setting = |name: &str, value: &str| Setting {
            name: name.into(),
            value: value.into(),
            from: SettingSource::Default,
        };
        let mut now = PolicyView {
            settings: vec![
                setting("drain", "on"),
                setting("until", "zero"),
                setting("idle-flows", "keep"),
            ],
            warnings: vec![],
            grace_ms: Some(30_000),
            pre_stop_sleep_ms: None,
            reserve_ms: 5_000,
            deadline_ms: 25_000,
            never_held: None,
        };
        change(&mut pod, &mut now);
        let explanation = Explanation {
            schema: SCHEMA.into(),
            pod: name,
            agent_since: String::new(),
            deleting: None,
            now: Some(now),
            drain: None,
            lifetimes: vec![],
            stops: vec![],
        };
        super::checks(&pod, &explanation)
    }

    fn statuses(change: impl FnOnce(&mut PodView, &mut PolicyView)) -> Vec<(String, CheckStatus)> {
        let checks = checks_of(change).into_iter();
        checks.map(|c| (c.name, c.status)).collect()
    }

    #[test]
    fn an_age_that_is_a_lower_bound_proves_nothing_below_the_deadline() {
        let of = |ms, is_at_least| {
            let mut checks = checks_of(|pod, _| {
                pod.oldest_ms = Some(ms);
                pod.oldest_is_at_least = is_at_least;
            });
            assert_eq!(checks.len(), 1, "{checks:?}");
            checks.remove(0)
        };
        let check = of(5_000, true);
        assert_eq!(check.status, CheckStatus::Unknown);
        assert!(check.detail.contains("has lasted >5.0s"), "{check:?}");
        let check = of(26_000, true);
        assert_eq!(check.status, Warn);
        assert!(check.detail.contains("has lasted >26.0s"), "{check:?}");
        let check = of(5_000, false);
        assert_eq!(check.status, Fine);
        assert!(check.detail.contains("has lasted 5.0s"), "{check:?}");
    }

    #[test]
    fn connections_that_outlast_the_hold_and_idle_ones_are_pointed_out() {
        let check = |name: &str, status| (name.to_owned(), status);
        assert_eq!(statuses(|_, _| ()), [check("grace period", Fine)]);
        let young = statuses(|pod, _| pod.oldest_ms = Some(24_000));
        assert_eq!(young, [check("grace period", Fine)]);
        let old = statuses(|pod, _| pod.oldest_ms = Some(26_000));
        assert_eq!(old, [check("grace period", Warn)]);
        let idle = FlowCounts {
            idle: 3,
            ..FlowCounts::default()
        };
        let kept = statuses(|pod, _| pod.flows = Some(idle));
        assert_eq!(
            kept,
            [check("grace period", Fine), check("keep-alive", Warn)]
        );
        let closed = statuses(|pod, now| {
            pod.flows = Some(idle);
            now.settings[2].value = "close".into();
        });
        assert_eq!(closed, [check("grace period", Fine)]);
        let graces = [check("grace period", Fine), check("grace period", Warn)];
        assert_eq!(statuses(|_, now| now.grace_ms = Some(600_001)), graces);
        assert_eq!(statuses(|_, now| now.grace_ms = Some(600_000)), graces[..1]);
        let off = statuses(|_, now| now.never_held = Some("ebb.dev/drain is off".into()));
        assert_eq!(off, [check("policy", Warn)]);
    }

    #[test]
    fn a_history_of_connections_that_outlast_the_hold_is_pointed_out() {
        let bucket = |at_most_ms, connections| LifetimeBucket {
            at_most_ms,
            connections,
        };
        // A hold of 25 s: those of 15 to 30 s may have been shorter.
        let short = [bucket(Some(100), 900), bucket(Some(30_000), 100)];
        assert_eq!(outlasting(&short, 25_000), None);
        let long = [
            bucket(Some(100), 98),
            bucket(Some(60_000), 1),
            bucket(None, 1),
        ];
        assert_eq!(outlasting(&long, 25_000), Some((2, 100)));
        assert_eq!(outlasting(&long, 60_000), Some((1, 100)));
        assert_eq!(
            outlasting(&[bucket(Some(100), 999), bucket(None, 1)], 25_000),
            None
        );
        assert_eq!(outlasting(&[], 25_000), None);
    }
}
