//! How long a call may be held, and what is left of it afterwards: arithmetic only. The limit itself is the one
//! that the agent goes by, too ([`CallLimits`]).

use std::time::Duration;

use crate::drain::policy::{CallLimits, PATIENCE_MARGIN};

/// Timeouts up to this are forced kills and hard evictions: the kubelet's own floor
/// (`minimumGracePeriodInSeconds`), never held.
const NEVER_HELD: Duration = Duration::from_secs(2);

/// Assumed of a caller that doesn't say how long it waits for a call without a timeout of its own: the
/// kubelet's `runtimeRequestTimeout`. Without it, such a call could be held for ever.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(120);

/// The most that is left to an application that nobody has named a reserve for.
const LEAST: Duration = Duration::from_secs(5);

/// The shortest patience that is passed on.
const MIN_PATIENCE: Duration = Duration::from_secs(1);

/// What a call allows, all of it counted from its arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowance {
    /// The timeout of a StopContainer; StopPodSandbox has none.
    pub(super) timeout: Option<Duration>,
    /// How long the caller waits (`grpc-timeout`), if it says.
    pub(super) patience: Option<Duration>,
}

impl Allowance {
    /// Whether it is worth asking the agent.
    pub(super) fn may_hold(&self) -> bool {
        self.timeout.is_none_or(|t| t > NEVER_HELD)
            && self.longest(Duration::ZERO, false) > Duration::ZERO
    }

    /// The longest hold that leaves `reserve` to the application, whatever the agent thinks; with `extended`
    /// also beyond the timeout.
    pub(super) fn longest(&self, reserve: Duration, extended: bool) -> Duration {
        let limits = CallLimits {
            grace: self.timeout,
            patience: self.patience,
        };
        limits
            .longest(reserve, extended)
            .unwrap_or(DEFAULT_PATIENCE - PATIENCE_MARGIN)
    }

    /// What is left to the application in any case of a call that nobody has named a reserve for: a third of the
    /// timeout, as agents have it where that is short.
    pub(super) fn least(&self) -> Duration {
        self.timeout.map_or(Duration::ZERO, |t| (t / 3).min(LEAST))
    }

    /// The timeout to forward, in seconds, after a hold of `held`; `None` if the call has none.
    ///
    /// Held time counts in begun seconds, so that hold and timeout together are never longer than
    /// the timeout given, nor than the caller waits; only the reserve, and one second, are kept in any case
    /// (a timeout of 0 would be SIGKILL at once).
    pub(super) fn timeout_after(&self, held: Duration, reserve: Duration) -> Option<u64> {
        let timeout = self.timeout?.as_secs();
        let mut left = timeout.saturating_sub(ceil_seconds(held));
        if let Some(patience) = self.patience {
            left = left.min(
                patience
                    .saturating_sub(held.saturating_add(PATIENCE_MARGIN))
                    .as_secs(),
            );
        }
        Some(left.max(ceil_seconds(reserve).min(timeout)).max(1))
    }

    /// The patience to forward after a hold of `held`; `None` if the caller didn't say.
    pub(super) fn patience_after(&self, held: Duration) -> Option<Duration> {
        // Not longer than it was, even where that is below the least.
        self.patience
            .map(|p| p.saturating_sub(held).max(MIN_PATIENCE.min(p)))
    }
}

fn ceil_seconds(d: Duration) -> u64 {
    d.as_secs().saturating_add(u64::from(d.subsec_nanos() > 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    const fn stop(timeout: u64) -> Allowance {
        Allowance {
            timeout: Some(s(timeout)),
            patience: Some(s(timeout + 120)),
        }
    }

    const fn sandbox(patience: Option<Duration>) -> Allowance {
        Allowance {
            timeout: None,
            patience,
        }
    }

    #[test]
    fn short_timeouts_are_never_held() {
        assert!(!stop(0).may_hold());
        assert!(!stop(1).may_hold());
        assert!(!stop(2).may_hold());
        assert!(stop(3).may_hold());
    }

    #[test]
    fn a_caller_about_to_leave_is_never_held() {
        assert!(
            !Allowance {
                timeout: Some(s(30)),
                patience: Some(s(2))
            }
            .may_hold()
        );
        assert!(!sandbox(Some(s(2))).may_hold());
        assert!(sandbox(Some(ms(2001))).may_hold());
        assert!(sandbox(None).may_hold());
    }

    #[test]
    fn the_shortest_of_the_limits_counts() {
        assert_eq!(stop(30).longest(s(5), false), s(25));
        assert_eq!(stop(30).longest(s(60), false), s(0));
        assert_eq!(
            Allowance {
                timeout: Some(s(30)),
                patience: Some(s(12))
            }
            .longest(s(5), false),
            s(5)
        );
        assert_eq!(sandbox(Some(s(120))).longest(s(5), false), s(118));
        assert_eq!(sandbox(None).longest(s(5), false), s(118));
    }

    #[test]
    fn held_time_is_taken_off_in_begun_seconds_down_to_the_reserve() {
        assert_eq!(stop(30).timeout_after(s(10), s(5)), Some(20));
        assert_eq!(stop(30).timeout_after(ms(10_001), s(5)), Some(19));
        assert_eq!(stop(30).timeout_after(ms(25_003), s(5)), Some(5));
        assert_eq!(stop(30).timeout_after(s(300), ms(1)), Some(1));
        assert_eq!(stop(30).timeout_after(s(300), s(0)), Some(1));
        assert_eq!(stop(30).timeout_after(s(3), s(600)), Some(30));
        assert_eq!(sandbox(None).timeout_after(s(3), s(5)), None);
    }

    #[test]
    fn patience_is_reduced_to_no_less_than_a_second() {
        assert_eq!(stop(30).patience_after(s(10)), Some(s(140)));
        assert_eq!(stop(30).patience_after(s(1000)), Some(s(1)));
        assert_eq!(sandbox(Some(ms(300))).patience_after(s(1)), Some(ms(300)));
        assert_eq!(sandbox(None).patience_after(s(1)), None);
    }

    #[test]
    fn without_a_named_reserve_a_third_of_a_short_timeout_is_kept() {
        assert_eq!(stop(30).least(), s(5));
        assert_eq!(stop(3).least(), s(1));
        assert_eq!(sandbox(None).least(), s(0));
        assert_eq!(stop(3).timeout_after(ms(2500), stop(3).least()), Some(1));
        assert_eq!(stop(30).timeout_after(ms(2500), stop(30).least()), Some(27));
    }

    proptest! {
        #[test]
        fn the_whole_is_never_longer_than_the_timeout_given(
            timeout in 3u64..100_000, reserve in 0u64..50_000, part in 0.0..1.0f64,
        ) {
            let allowance = stop(timeout);
            let reserve = ms(reserve);
            let held = allowance.longest(reserve, false).mul_f64(part);
            let forwarded = allowance.timeout_after(held, reserve).unwrap();
            prop_assert!(forwarded >= 1 && forwarded <= timeout);
            prop_assert!(s(forwarded) >= reserve.min(s(timeout)));
            let floor = s(ceil_seconds(reserve).max(1));
            prop_assert!(held + s(forwarded) <= s(timeout) || s(forwarded) == floor);
        }

        #[test]
        fn what_was_held_and_what_is_forwarded_end_before_the_caller_gives_up(
            timeout in 3u64..100_000, patience in 2_001u64..200_000_000, reserve in 0u64..50_000,
            part in 0.0..1.0f64, extended: bool,
        ) {
            let allowance = Allowance { timeout: Some(s(timeout)), patience: Some(ms(patience)) };
            let reserve = ms(reserve).min(s(timeout) / 3);
            let longest = allowance.longest(reserve, extended);
            let held = longest.mul_f64(part);
            let forwarded = s(allowance.timeout_after(held, reserve).unwrap());
            prop_assert!(forwarded >= reserve && forwarded <= s(timeout));
            // One second of the margin at most is lost to whole seconds. Where there is no room for the
            // reserve, nothing is held.
            prop_assert!(longest.is_zero() || held + forwarded + s(1) <= ms(patience));
            if !extended {
                prop_assert!(held + forwarded <= s(timeout) || forwarded < reserve + s(1));
            }
        }

        #[test]
        fn no_number_overflows(
            timeout: u64, patience: Option<u64>, reserve: u64, held: u64,
        ) {
            let allowance = Allowance { timeout: Some(s(timeout)), patience: patience.map(ms) };
            let _ = allowance.may_hold();
            let _ = allowance.longest(ms(reserve), true);
            prop_assert!(allowance.timeout_after(ms(held), ms(reserve)).unwrap() >= 1);
            let _ = allowance.patience_after(ms(held));
        }
    }
}
