//! How long a call may be held at all, whatever a policy wants: the one formula that the agent's deadline and
//! the proxy's own limit share.
//!
//! ```text
//!  arrived                                    arrived + timeout
//!     |------------- held -------------|--- reserve ---|
//!     |---------------------- patience (grpc-timeout) ------------------- margin -|
//!     |------------- held, if extended ---------------------|--- reserve ---|
//! ```

use std::time::Duration;

/// Kept free before the caller's own deadline, for the runtime to end the call and for the answer to get back.
pub const PATIENCE_MARGIN: Duration = Duration::from_secs(2);

/// What a call allows, counted from its arrival.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallLimits {
    /// What is left of the grace period: the timeout of a StopContainer. `None` if there is none or it is
    /// not known.
    pub grace: Option<Duration>,
    /// How long the caller waits for its answer (`grpc-timeout`), if it says.
    pub patience: Option<Duration>,
}

impl CallLimits {
    /// The longest hold that leaves `reserve` to the application; `None` if nothing limits it.
    ///
    /// With `extended` the grace period may be exceeded, and then the caller's patience is the limit: the
    /// kubelet waits `runtimeRequestTimeout` longer than the timeout it gives
    /// (`StopContainer` in `pkg/kubelet/cri/remote/remote_runtime.go`). A caller that does not say how long
    /// it waits is never kept for longer than the grace period.
    ///
    /// The reserve has to fit into the patience, too: when that ends, the runtime drops the call, and what
    /// the application got until then is all it got. Only a call that leaves the application no time (no
    /// grace) needs none.
    pub fn longest(self, reserve: Duration, extended: bool) -> Option<Duration> {
        let by_patience = self.patience.map(|p| p.saturating_sub(PATIENCE_MARGIN));
        match (self.grace, by_patience) {
            (Some(_), Some(patience)) if extended => Some(patience.saturating_sub(reserve)),
            (Some(grace), Some(patience)) => Some(grace.min(patience).saturating_sub(reserve)),
            (Some(grace), None) => Some(grace.saturating_sub(reserve)),
            (None, patience) => patience,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    const fn limits(grace: u64, patience: u64) -> CallLimits {
        CallLimits {
            grace: Some(secs(grace)),
            patience: Some(secs(patience)),
        }
    }

    #[test]
    fn the_shortest_of_the_limits_counts() {
        assert_eq!(limits(30, 150).longest(secs(5), false), Some(secs(25)));
        assert_eq!(limits(30, 12).longest(secs(5), false), Some(secs(5)));
        assert_eq!(limits(30, 150).longest(secs(60), false), Some(secs(0)));
    }

    #[test]
    fn an_extended_hold_is_limited_by_the_patience_and_by_the_grace_period_where_there_is_none() {
        assert_eq!(limits(5, 125).longest(secs(1), true), Some(secs(122)));
        assert_eq!(limits(5, 4).longest(secs(1), true), Some(secs(1)));
        let silent = CallLimits {
            grace: Some(secs(30)),
            patience: None,
        };
        assert_eq!(silent.longest(secs(5), true), Some(secs(25)));
    }

    #[test]
    fn a_call_without_a_grace_period_has_its_patience() {
        let sandbox = CallLimits {
            grace: None,
            patience: Some(secs(120)),
        };
        assert_eq!(sandbox.longest(secs(5), false), Some(secs(118)));
        assert_eq!(CallLimits::default().longest(secs(5), true), None);
    }

    proptest! {
        #[test]
        fn a_hold_and_the_reserve_end_before_the_callers_patience(
            grace in proptest::option::of(0u64..10_000_000), patience: u32, reserve in 0u64..4_000_000,
            extended: bool,
        ) {
            let patience = Duration::from_millis(patience.into());
            let limits = CallLimits {
                grace: grace.map(Duration::from_millis),
                patience: Some(patience),
            };
            let reserve = Duration::from_millis(reserve);
            let longest = limits.longest(reserve, extended).unwrap();
            let after = if grace.is_some() { reserve } else { Duration::ZERO };
            prop_assert!(longest.is_zero() || longest + after + PATIENCE_MARGIN <= patience);
            prop_assert!(longest <= limits.longest(reserve, true).unwrap());
        }
    }
}
