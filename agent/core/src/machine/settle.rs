//! The settle phase: wait until no new flow has arrived for long enough.
//!
//! How long that is depends on the pod. A silence means that clients have stopped connecting only if it is long for that
//! pod ([docs/decisions/settle.md](../../../../docs/decisions/settle.md)):
//!
//! | the pod | silence | rule |
//! | --- | --- | --- |
//! | its policy sets `quiet` | `quiet` | `set` |
//! | clients connect, usually with a gap below [`RARE_GAP`] | [`QUIET_IN_GAPS`] times the gap, from [`MIN_QUIET`] to [`MAX_QUIET`] | `gap` |
//! | clients connect less often, or none ever has | [`MIN_QUIET`] | `rare` |
//! | it is not known how often they connect, or that has changed | `quiet`, which is the default of 3 s | `unknown` |
//! | nothing listens in it, and no flow holds | none | `no-listener` |

use std::time::Duration;

#[cfg(test)]
mod simulation;

use crate::{
    arrivals::Arrivals,
    clock::{BootTime, millis},
    drain_report::{SettleReport, SettleRule},
    policy::Policy,
};

/// A silence of so many usual gaps means that clients have stopped connecting.
const QUIET_IN_GAPS: u32 = 5;
/// The shortest silence that means so: load balancers and kube-proxies stop one after another.
pub(super) const MIN_QUIET: Duration = Duration::from_millis(500);
/// The longest silence that is waited for: twice the default. Most endpoints are gone by then. A longer wait costs each pod
/// many seconds and saves few a connection.
const MAX_QUIET: Duration = Duration::from_secs(6);
/// If the usual gap is at least this long, hardly any connection comes within the settle phase, so that waiting for it is
/// not worth while.
const RARE_GAP: Duration = Duration::from_secs(2 * 60);
/// How long connections must have been counted before the counters say how often they come.
const MIN_OBSERVED: Duration = Duration::from_secs(60);

/// When flows arrived, and what that says of the settle phase.
#[derive(Debug)]
pub(super) struct Settle {
    started: BootTime,
    /// The policy's `quiet`.
    given: Duration,
    /// The silence that ends the phase, and the rule that it follows from.
    quiet: Duration,
    rule: SettleRule,
    /// The usual gap, where the rule goes by it.
    gap: Option<Duration>,
    /// The counters say how often the flows arrive that hold this drain.
    can_learn: bool,
    shortest: Duration,
    longest: Duration,
    /// The last new inbound flow, or the beginning.
    last_arrival: BootTime,
    /// The phase is over, and flows still arrive.
    still_arriving: bool,
}

impl Settle {
    /// Of a drain that began at `started`. Nothing is assumed of the time between that and `now`.
    pub(super) fn new(policy: &Policy, started: BootTime, now: BootTime) -> Self {
        Self {
            started,
            given: policy.quiet,
            quiet: policy.quiet,
            rule: if policy.quiet_is_set {
                SettleRule::Set
            } else {
                SettleRule::Unknown
            },
            gap: None,
            // The counters do not tell ports apart.
            can_learn: !policy.quiet_is_set
                && policy.ports.is_empty()
                && policy.ignore_ports.is_empty(),
            shortest: policy.settle_min,
            longest: policy.longest_settle(),
            last_arrival: now.max(started),
            still_arriving: false,
        }
    }

    /// Takes in how often clients connected before the drain.
    pub(super) fn learn(&mut self, arrivals: Arrivals) {
        let has_listener = self.rule != SettleRule::NoListener;
        if !self.can_learn || !has_listener || arrivals.observed < MIN_OBSERVED {
            return;
        }
        match arrivals.gap {
            Some(gap) if gap < RARE_GAP => self.go_by(gap),
            // One has just arrived.
            _ if self.last_arrival > self.started => {}
            rare => {
                self.rule = SettleRule::Rare;
                self.gap = rare;
                self.quiet = MIN_QUIET;
            }
        }
    }

    /// Waits for a silence that is long for a pod whose connections come with this gap.
    fn go_by(&mut self, gap: Duration) {
        self.rule = SettleRule::Gap;
        self.gap = Some(gap);
        self.quiet = (gap * QUIET_IN_GAPS).clamp(MIN_QUIET, MAX_QUIET);
    }

    /// Nothing listens in the pod, so that no flow can arrive.
    pub(super) fn nothing_listens(&mut self) {
        self.rule = SettleRule::NoListener;
        self.gap = None;
        self.quiet = Duration::ZERO;
        self.last_arrival = self.started;
    }

    /// A flow arrived, or may have. `is_over`: the phase had ended by then.
    pub(super) fn arrival(&mut self, at: BootTime, is_over: bool) {
        self.still_arriving |= is_over && at >= self.end();
        if !is_over {
            let silence = at.since(self.last_arrival);
            match (self.rule, self.gap) {
                // A connection came after this silence, so it is one of the pod's gaps: clients that stop one after
                // another leave longer and longer ones.
                (SettleRule::Gap, Some(gap)) if silence > gap => self.go_by(silence),
                // None was expected.
                (SettleRule::Rare | SettleRule::NoListener, _) => {
                    self.rule = SettleRule::Unknown;
                    self.gap = None;
                    self.quiet = self.given;
                    self.can_learn = false;
                }
                _ => {}
            }
        }
        self.last_arrival = self.last_arrival.max(at);
    }

    /// Events were lost: a flow may have arrived.
    pub(super) fn may_have_arrived(&mut self, now: BootTime) {
        self.last_arrival = now;
    }

    /// The phase has ended: notes whether flows still arrive.
    pub(super) fn finish(&mut self) {
        self.still_arriving =
            self.last_arrival > self.started && self.last_arrival + self.quiet > self.limit();
    }

    /// Whether the phase is over and flows still arrive.
    pub(super) const fn still_arriving(&self) -> bool {
        self.still_arriving
    }

    /// When the phase ends at the latest.
    pub(super) fn limit(&self) -> BootTime {
        self.started + self.longest
    }

    /// When the phase ends if no flow arrives any more.
    pub(super) fn end(&self) -> BootTime {
        (self.last_arrival + self.quiet)
            .max(self.started + self.shortest)
            .min(self.limit())
    }

    /// Flows that arrived from this moment on did not let the phase end, or came after it.
    pub(super) fn late_since(&self) -> BootTime {
        let limit = self.limit().since(BootTime::default());
        let before_limit = BootTime::default() + limit.saturating_sub(self.quiet);
        // Where the phase ended before its limit, no flow had arrived for `quiet` since the last arrival.
        before_limit.min(self.last_arrival)
    }

    /// What it waits for, and why.
    pub(super) fn report(&self) -> SettleReport {
        SettleReport {
            quiet_ms: millis(self.quiet),
            rule: self.rule,
            gap_ms: self.gap.map(millis),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: BootTime = BootTime::from_nanos(1_000_000_000_000);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn learned(policy: &Policy, observed: Duration, gap: Option<Duration>) -> Settle {
        let mut settle = Settle::new(policy, START, START);
        settle.learn(Arrivals { observed, gap });
        settle
    }

    /// The rule, and the silence in milliseconds, of a pod that was observed for an hour.
    fn rule(policy: &Policy, gap_ms: Option<u64>) -> (SettleRule, u64) {
        let report = learned(policy, ms(3_600_000), gap_ms.map(ms)).report();
        (report.rule, report.quiet_ms)
    }

    #[test]
    fn the_silence_is_a_multiple_of_the_usual_gap() {
        let policy = Policy::default();
        for (gap, quiet) in [
            (0, 500),
            (20, 500),
            (200, 1000),
            (1000, 5000),
            (20_000, 6000),
        ] {
            assert_eq!(rule(&policy, Some(gap)), (SettleRule::Gap, quiet), "{gap}");
        }
        assert_eq!(rule(&policy, Some(120_000)), (SettleRule::Rare, 500));
        assert_eq!(rule(&policy, None), (SettleRule::Rare, 500));
    }

    #[test]
    fn a_given_quiet_stays_and_what_is_not_known_is_not_guessed() {
        let given = Policy {
            quiet_is_set: true,
            ..Policy::default()
        };
        assert_eq!(rule(&given, Some(20)), (SettleRule::Set, 3000));
        for policy in [
            Policy {
                ports: vec![80],
                ..Policy::default()
            },
            Policy {
                ignore_ports: vec![80],
                ..Policy::default()
            },
        ] {
            assert_eq!(rule(&policy, None), (SettleRule::Unknown, 3000));
        }
        for gap in [None, Some(ms(20))] {
            let young = learned(&Policy::default(), ms(59_000), gap).report();
            assert_eq!((young.rule, young.quiet_ms), (SettleRule::Unknown, 3000));
        }
    }

    #[test]
    fn the_gap_grows_with_the_silences_that_connections_end() {
        let mut settle = learned(&Policy::default(), ms(60_000), Some(ms(10)));
        settle.arrival(START + ms(100), false);
        assert_eq!(settle.end(), START + ms(600));
        settle.arrival(START + ms(500), false);
        assert_eq!(settle.end(), START + ms(500 + 2000));
        // A late event of an earlier moment changes nothing.
        settle.arrival(START + ms(300), false);
        assert_eq!(settle.end(), START + ms(500 + 2000));
    }

    #[test]
    fn a_connection_that_none_expected_brings_back_the_default() {
        for rare in [None, Some(ms(1_000_000))] {
            let mut settle = learned(&Policy::default(), ms(3_600_000), rare);
            settle.arrival(START + ms(400), false);
            assert_eq!(settle.end(), START + ms(3400));
            settle.learn(Arrivals {
                observed: ms(3_600_000),
                gap: None,
            });
            assert_eq!(settle.report().rule, SettleRule::Unknown);
        }
    }

    #[test]
    fn the_phase_lasts_at_least_settle_min_and_at_most_settle_max() {
        let policy = |min, max| Policy {
            settle_min: ms(min),
            settle_max: ms(max),
            ..Policy::default()
        };
        let mut settle = learned(&policy(120_000, 180_000), ms(60_000), Some(ms(10)));
        assert_eq!(settle.end(), START + ms(120_000));
        settle.arrival(START + ms(150_000), false);
        assert!(settle.end() > START + ms(150_000));
        settle.arrival(START + ms(179_999), false);
        assert_eq!(settle.end(), START + ms(180_000));
        // The minimum is above the node's maximum.
        let mut settle = learned(&policy(20_000, 15_000), ms(60_000), None);
        assert_eq!(settle.end(), START + ms(20_000));
        settle.nothing_listens();
        assert_eq!(settle.end(), START + ms(20_000));
        let mut settle = learned(&Policy::default(), ms(60_000), None);
        settle.nothing_listens();
        assert_eq!(settle.end(), START);
        // Clients of earlier times can't come back.
        settle.learn(Arrivals {
            observed: ms(60_000),
            gap: Some(ms(1000)),
        });
        assert_eq!(settle.end(), START);
    }
}
