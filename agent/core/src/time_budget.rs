//! How long a CRI call may be held, and which timeout and RPC deadline are forwarded afterwards. The agent uses the
//! same limit ([`CallLimits`]).

use std::time::Duration;

use crate::policy::{CallLimits, RPC_MARGIN};

/// Calls with a timeout up to this are never held, because they are forced kills and hard evictions: the kubelet's
/// minimum (`minimumGracePeriodInSeconds`).
const NEVER_HELD: Duration = Duration::from_secs(2);

/// The RPC deadline assumed for a call that has neither an RPC deadline nor a timeout, because nothing else limits
/// its hold: the kubelet's default `runtimeRequestTimeout`.
const DEFAULT_RPC_TIMEOUT: Duration = Duration::from_secs(120);

/// The longest reserve when no agent has named one.
const DEFAULT_RESERVE: Duration = Duration::from_secs(5);

/// The shortest RPC deadline that the proxy forwards.
const MIN_RPC_TIMEOUT: Duration = Duration::from_secs(1);

/// The timeouts of a CRI call, as the proxy reads them, counted from its arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeBudget {
    /// The timeout of a StopContainer; StopPodSandbox has none.
    pub timeout: Option<Duration>,
    /// The caller's RPC deadline (`grpc-timeout`), if it sent one.
    pub rpc_timeout: Option<Duration>,
}

impl TimeBudget {
    /// Whether the call may be held at all.
    pub fn allows_hold(&self) -> bool {
        self.timeout.is_none_or(|t| t > NEVER_HELD)
            && self.longest_hold(Duration::ZERO, false) > Duration::ZERO
    }

    /// The longest hold that leaves `reserve` to the application, whatever the agent decides. With `extended` the
    /// hold may exceed the timeout.
    pub fn longest_hold(&self, reserve: Duration, extended: bool) -> Duration {
        let limits = CallLimits {
            grace: self.timeout,
            rpc_timeout: self.rpc_timeout,
        };
        limits
            .longest(reserve, extended)
            .map_or(DEFAULT_RPC_TIMEOUT - RPC_MARGIN, |limit| limit.after)
    }

    /// The reserve when no agent has named one: a third of the timeout and at most 5 s, as in the agent's default
    /// policy.
    pub fn default_reserve(&self) -> Duration {
        self.timeout
            .map_or(Duration::ZERO, |t| (t / 3).min(DEFAULT_RESERVE))
    }

    /// The timeout to forward, in seconds, after a hold of `held`; `None` if the call has none.
    ///
    /// Only the whole seconds of the hold are subtracted, as the kubelet does with the time of a preStop hook
    /// (`executePreStopHook`, `pkg/kubelet/kuberuntime/kuberuntime_container.go`), so a hold of milliseconds costs the
    /// application nothing. Hold and forwarded timeout together exceed the original timeout by less than a second, and
    /// never reach the caller's RPC deadline. But the forwarded timeout is never less than the reserve or one second:
    /// with a timeout of 0 the runtime sends SIGKILL at once.
    pub fn remaining_timeout(&self, held: Duration, reserve: Duration) -> Option<u64> {
        let timeout = self.timeout?.as_secs();
        let mut left = timeout.saturating_sub(held.as_secs());
        if let Some(rpc_timeout) = self.rpc_timeout {
            left = left.min(
                rpc_timeout
                    .saturating_sub(held.saturating_add(RPC_MARGIN))
                    .as_secs(),
            );
        }
        Some(left.max(ceil_seconds(reserve).min(timeout)).max(1))
    }

    /// The RPC deadline to forward after a hold of `held`; `None` if the caller gave none.
    pub fn remaining_rpc_timeout(&self, held: Duration) -> Option<Duration> {
        // Never longer than the original, even if that is shorter than the minimum.
        self.rpc_timeout
            .map(|t| t.saturating_sub(held).max(MIN_RPC_TIMEOUT.min(t)))
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

    const fn stop(timeout: u64) -> TimeBudget {
        TimeBudget {
            timeout: Some(s(timeout)),
            rpc_timeout: Some(s(timeout + 120)),
        }
    }

    const fn sandbox(rpc_timeout: Option<Duration>) -> TimeBudget {
        TimeBudget {
            timeout: None,
            rpc_timeout,
        }
    }

    #[test]
    fn short_timeouts_are_never_held() {
        assert!(!stop(0).allows_hold());
        assert!(!stop(1).allows_hold());
        assert!(!stop(2).allows_hold());
        assert!(stop(3).allows_hold());
    }

    #[test]
    fn a_call_whose_rpc_deadline_is_near_is_never_held() {
        assert!(
            !TimeBudget {
                timeout: Some(s(30)),
                rpc_timeout: Some(s(2))
            }
            .allows_hold()
        );
        assert!(!sandbox(Some(s(2))).allows_hold());
        assert!(sandbox(Some(ms(2001))).allows_hold());
        assert!(sandbox(None).allows_hold());
    }

    #[test]
    fn the_shortest_of_the_limits_counts() {
        assert_eq!(stop(30).longest_hold(s(5), false), s(25));
        assert_eq!(stop(30).longest_hold(s(60), false), s(0));
        assert_eq!(
            TimeBudget {
                timeout: Some(s(30)),
                rpc_timeout: Some(s(12))
            }
            .longest_hold(s(5), false),
            s(5)
        );
        assert_eq!(sandbox(Some(s(120))).longest_hold(s(5), false), s(118));
        assert_eq!(sandbox(None).longest_hold(s(5), false), s(118));
    }

    #[test]
    fn whole_seconds_of_the_hold_are_subtracted_down_to_the_reserve() {
        assert_eq!(stop(30).remaining_timeout(ms(80), s(5)), Some(30));
        assert_eq!(stop(30).remaining_timeout(ms(999), s(5)), Some(30));
        assert_eq!(stop(30).remaining_timeout(s(10), s(5)), Some(20));
        assert_eq!(stop(30).remaining_timeout(ms(10_001), s(5)), Some(20));
        assert_eq!(stop(30).remaining_timeout(ms(25_003), s(5)), Some(5));
        assert_eq!(stop(30).remaining_timeout(s(300), ms(1)), Some(1));
        assert_eq!(stop(30).remaining_timeout(s(300), s(0)), Some(1));
        assert_eq!(stop(30).remaining_timeout(s(3), s(600)), Some(30));
        assert_eq!(sandbox(None).remaining_timeout(s(3), s(5)), None);
    }

    #[test]
    fn a_call_near_its_rpc_deadline_is_forwarded_with_what_fits_before_it() {
        let near = TimeBudget {
            timeout: Some(s(30)),
            rpc_timeout: Some(ms(20_500)),
        };
        // 20.5 s less a margin of 2 s and the hold.
        assert_eq!(near.remaining_timeout(ms(80), s(5)), Some(18));
        assert_eq!(near.remaining_timeout(ms(600), s(5)), Some(17));
    }

    #[test]
    fn the_rpc_deadline_is_reduced_to_no_less_than_a_second() {
        assert_eq!(stop(30).remaining_rpc_timeout(s(10)), Some(s(140)));
        assert_eq!(stop(30).remaining_rpc_timeout(s(1000)), Some(s(1)));
        assert_eq!(
            sandbox(Some(ms(300))).remaining_rpc_timeout(s(1)),
            Some(ms(300))
        );
        assert_eq!(sandbox(None).remaining_rpc_timeout(s(1)), None);
    }

    #[test]
    fn without_a_named_reserve_a_third_of_a_short_timeout_is_kept() {
        assert_eq!(stop(30).default_reserve(), s(5));
        assert_eq!(stop(3).default_reserve(), s(1));
        assert_eq!(sandbox(None).default_reserve(), s(0));
        assert_eq!(
            stop(3).remaining_timeout(ms(2500), stop(3).default_reserve()),
            Some(1)
        );
        assert_eq!(
            stop(30).remaining_timeout(ms(2500), stop(30).default_reserve()),
            Some(28)
        );
    }

    proptest! {
        #[test]
        fn hold_and_forwarded_timeout_exceed_the_timeout_given_by_less_than_a_second(
            timeout in 3u64..100_000, reserve in 0u64..50_000, part in 0.0..1.0f64,
        ) {
            let budget = stop(timeout);
            let reserve = ms(reserve);
            let held = budget.longest_hold(reserve, false).mul_f64(part);
            let forwarded = budget.remaining_timeout(held, reserve).unwrap();
            prop_assert!(forwarded >= 1 && forwarded <= timeout);
            prop_assert!(s(forwarded) >= reserve.min(s(timeout)));
            let floor = s(ceil_seconds(reserve).max(1));
            prop_assert!(held + s(forwarded) < s(timeout + 1) || s(forwarded) == floor);
            // Nor does the application lose more than the hold took.
            prop_assert!(held + s(forwarded) >= s(timeout));
        }

        #[test]
        fn a_hold_of_less_than_a_second_costs_no_timeout_unless_the_rpc_deadline_is_near(
            timeout in 3u64..100_000, reserve in 0u64..50_000, held in 0u64..1000, rpc_timeout: Option<u32>,
        ) {
            let rpc_timeout = rpc_timeout.map(|t| ms(t.into()));
            let budget = TimeBudget { timeout: Some(s(timeout)), rpc_timeout };
            let forwarded = s(budget.remaining_timeout(ms(held), ms(reserve)).unwrap());
            let fits = rpc_timeout.is_none_or(|t| ms(held) + s(timeout) + RPC_MARGIN <= t);
            prop_assert!(forwarded == s(timeout) || !fits);
        }

        #[test]
        fn hold_and_forwarded_timeout_end_before_the_callers_rpc_deadline(
            timeout in 3u64..100_000, rpc_timeout in 2_001u64..200_000_000, reserve in 0u64..50_000,
            part in 0.0..1.0f64, extended: bool,
        ) {
            let budget = TimeBudget { timeout: Some(s(timeout)), rpc_timeout: Some(ms(rpc_timeout)) };
            let reserve = ms(reserve).min(s(timeout) / 3);
            let longest = budget.longest_hold(reserve, extended);
            let held = longest.mul_f64(part);
            let forwarded = s(budget.remaining_timeout(held, reserve).unwrap());
            prop_assert!(forwarded >= reserve && forwarded <= s(timeout));
            // Rounding to seconds takes at most one second of the margin. If the reserve does not fit, the call is
            // not held.
            prop_assert!(longest.is_zero() || held + forwarded + s(1) <= ms(rpc_timeout));
            if !extended {
                prop_assert!(held + forwarded < s(timeout + 1) || forwarded < reserve + s(1));
            }
        }

        #[test]
        fn no_number_overflows(
            timeout: u64, rpc_timeout: Option<u64>, reserve: u64, held: u64,
        ) {
            let budget = TimeBudget { timeout: Some(s(timeout)), rpc_timeout: rpc_timeout.map(ms) };
            let _ = budget.allows_hold();
            let _ = budget.longest_hold(ms(reserve), true);
            prop_assert!(budget.remaining_timeout(ms(held), ms(reserve)).unwrap() >= 1);
            let _ = budget.remaining_rpc_timeout(ms(held));
        }
    }
}
