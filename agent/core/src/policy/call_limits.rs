//! The longest hold that a call's own timeouts allow. The agent's deadline and the proxy's own limit use the same
//! formula.
//!
//! ```text
//!  arrived                                    arrived + timeout
//!     |------------- held -------------|--- reserve ---|
//!     |-------------------- RPC deadline (grpc-timeout) ----------------- margin -|
//!     |------------- held, if extended ---------------------|--- reserve ---|
//! ```

use std::time::Duration;

use crate::release::DeadlineCause;

/// The time before the caller's RPC deadline that is left for the runtime's answer to reach the caller.
pub const RPC_MARGIN: Duration = Duration::from_secs(2);

/// The longest hold, counted from its beginning, and what limits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimit {
    /// The longest hold.
    pub after: Duration,
    /// What limits it.
    pub cause: DeadlineCause,
}

/// What limits a hold: the timeouts of a CRI call, or the grace period of a wait, counted from its arrival.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallLimits {
    /// What is left of the grace period: the timeout of a StopContainer. `None` if the call has none or it is not
    /// known.
    pub grace: Option<Duration>,
    /// The caller's RPC deadline (`grpc-timeout`), if it sent one.
    pub rpc_timeout: Option<Duration>,
}

impl CallLimits {
    /// The longest hold that leaves `reserve` to the application; `None` if nothing limits it.
    ///
    /// With `extended` the hold may exceed the grace period, and the caller's RPC deadline is the limit: the
    /// kubelet waits `runtimeRequestTimeout` longer than the timeout it gives
    /// (`StopContainer` in `pkg/kubelet/cri/remote/remote_runtime.go`). A call without an RPC deadline is never held
    /// longer than the grace period.
    ///
    /// The reserve must also fit before the RPC deadline, because at the deadline the call is cancelled and the
    /// application gets no more time. Only a call without a grace period needs no reserve.
    pub fn longest(self, reserve: Duration, extended: bool) -> Option<HoldLimit> {
        let by_rpc = self.rpc_timeout.map(|timeout| {
            let reserve = self.grace.map_or(Duration::ZERO, |_| reserve);
            HoldLimit {
                after: timeout.saturating_sub(RPC_MARGIN + reserve),
                cause: DeadlineCause::RpcTimeout,
            }
        });
        let grace = self.grace.filter(|_| !extended || by_rpc.is_none());
        let by_grace = grace.map(|grace| HoldLimit {
            after: grace.saturating_sub(reserve),
            cause: DeadlineCause::Grace,
        });
        by_grace
            .into_iter()
            .chain(by_rpc)
            .min_by_key(|limit| limit.after)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    const fn limits(grace: u64, rpc_timeout: u64) -> CallLimits {
        CallLimits {
            grace: Some(secs(grace)),
            rpc_timeout: Some(secs(rpc_timeout)),
        }
    }

    #[test]
    fn the_shortest_of_the_limits_counts() {
        assert_eq!(
            limits(30, 150).longest(secs(5), false).map(|l| l.after),
            Some(secs(25))
        );
        assert_eq!(
            limits(30, 12).longest(secs(5), false).map(|l| l.after),
            Some(secs(5))
        );
        assert_eq!(
            limits(30, 150).longest(secs(60), false).map(|l| l.after),
            Some(secs(0))
        );
    }

    #[test]
    fn an_extended_hold_is_limited_by_the_rpc_deadline_or_without_one_by_the_grace_period() {
        assert_eq!(
            limits(5, 125).longest(secs(1), true).map(|l| l.after),
            Some(secs(122))
        );
        assert_eq!(
            limits(5, 4).longest(secs(1), true).map(|l| l.after),
            Some(secs(1))
        );
        let no_rpc_deadline = CallLimits {
            grace: Some(secs(30)),
            rpc_timeout: None,
        };
        assert_eq!(
            no_rpc_deadline.longest(secs(5), true).map(|l| l.after),
            Some(secs(25))
        );
    }

    #[test]
    fn a_call_without_a_grace_period_is_limited_by_its_rpc_deadline() {
        let sandbox = CallLimits {
            grace: None,
            rpc_timeout: Some(secs(120)),
        };
        assert_eq!(
            sandbox.longest(secs(5), false).map(|l| l.after),
            Some(secs(118))
        );
        assert_eq!(
            CallLimits::default()
                .longest(secs(5), true)
                .map(|l| l.after),
            None
        );
    }

    proptest! {
        #[test]
        fn a_hold_and_the_reserve_end_before_the_callers_rpc_deadline(
            grace in proptest::option::of(0u64..10_000_000), rpc_timeout: u32, reserve in 0u64..4_000_000,
            extended: bool,
        ) {
            let rpc_timeout = Duration::from_millis(rpc_timeout.into());
            let limits = CallLimits {
                grace: grace.map(Duration::from_millis),
                rpc_timeout: Some(rpc_timeout),
            };
            let reserve = Duration::from_millis(reserve);
            let longest = limits.longest(reserve, extended).unwrap().after;
            let after = if grace.is_some() { reserve } else { Duration::ZERO };
            prop_assert!(longest.is_zero() || longest + after + RPC_MARGIN <= rpc_timeout);
            prop_assert!(longest <= limits.longest(reserve, true).unwrap().after);
        }
    }
}
