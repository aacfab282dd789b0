//! What a drain waits for and for how long.

pub mod annotations;
mod call_limits;
mod outbound;
mod port_rule;

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

pub use annotations::{IDLE_AFTER, MAX_HOLD, PEER_TIMEOUT, QUIET, RESERVE, SETTLE};
pub use call_limits::{CallLimits, HoldLimit, RPC_MARGIN};
pub use outbound::{Outbound, OutboundTarget};
pub use port_rule::PortsInUse;

use crate::{
    flow::ClassifyOptions,
    notification::{DrainRequest, SignalTarget, StopSignals},
    release::DeadlineCause,
    setting::setting_names,
};

/// The grace period of a pod whose spec has none: `DefaultTerminationGracePeriodSeconds` in Kubernetes'
/// `pkg/apis/core/v1/defaults.go` (`SetDefaults_PodSpec`).
pub const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// The longest hold without `max-hold`: a grace period of a week, which operators do set, must not block the drain of a
/// node for a week behind one idle client.
pub const DEFAULT_MAX_HOLD: Duration = Duration::from_secs(60 * 60);

/// When a pod is drained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// No flow that holds is left, live or idle.
    #[default]
    Zero,
    /// No flow that holds is live.
    Idle,
    /// The settle phase is over.
    Settled,
}

setting_names!(Until { Zero = "zero", Idle = "idle", Settled = "settled" });

/// What to do with idle flows during the drain phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum IdleFlows {
    /// Wait until their clients end them.
    #[default]
    Keep,
    /// Close them gracefully.
    Close,
}

setting_names!(IdleFlows { Keep = "keep", Close = "close" });

/// Whether the stops of a pod are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum DrainMode {
    /// They are held.
    #[default]
    On,
    /// They are forwarded at once, and ebb reports how long it would have held them and what the stop cut.
    Observe,
    /// They are forwarded at once.
    Off,
}

setting_names!(DrainMode { On = "on", Observe = "observe", Off = "off" });

/// A pod's complete drain policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether its stops are held.
    pub drain: DrainMode,
    /// What to wait for.
    pub until: Until,
    /// The settle phase ends when no new inbound flow has arrived for this long.
    pub quiet: Duration,
    /// The settle phase lasts at least this long.
    pub settle_min: Duration,
    /// The settle phase lasts at most this long.
    pub settle_max: Duration,
    /// `quiet` was set. Otherwise it applies only where ebb does not know how often clients connect to the pod.
    pub quiet_is_set: bool,
    /// A flow can be idle when no byte has moved for this long.
    pub idle_after: Duration,
    /// What to do with idle flows during the drain phase.
    pub idle_flows: IdleFlows,
    /// A flow whose peer has not answered retransmissions for this long is lost, and does not hold.
    pub peer_timeout: Duration,
    /// The part of the grace period for the application's own shutdown; never more than a third of it.
    pub reserve: Duration,
    /// The longest hold; `None`: [`DEFAULT_MAX_HOLD`].
    pub max_hold: Option<Duration>,
    /// `max_hold` may exceed the grace period, as far as the caller's RPC deadline allows.
    pub extend: bool,
    /// Only flows to these local ports hold; if empty, all do.
    pub ports: Vec<u16>,
    /// Flows to these local ports do not hold.
    pub ignore_ports: Vec<u16>,
    /// Which connections that the pod has dialled hold as well, while they are live.
    pub outbound: Outbound,
    /// The port on which ebb listens inside the pod, for the pod's preStop hook.
    pub wait_port: Option<u16>,
    /// The signals that ebb sends when the settle phase is over.
    pub stop_signals: StopSignals,
    /// The processes that get them.
    pub stop_signal_to: SignalTarget,
    /// The request that ebb makes to the pod.
    pub on_drain: Option<DrainRequest>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            drain: DrainMode::On,
            until: Until::Zero,
            quiet: Duration::from_secs(3),
            settle_min: Duration::ZERO,
            settle_max: Duration::from_secs(15),
            quiet_is_set: false,
            idle_after: Duration::from_secs(5),
            idle_flows: IdleFlows::Keep,
            peer_timeout: Duration::from_secs(20),
            reserve: Duration::from_secs(5),
            max_hold: None,
            extend: false,
            ports: Vec::new(),
            ignore_ports: Vec::new(),
            outbound: Outbound::Ignore,
            wait_port: None,
            stop_signals: StopSignals::default(),
            stop_signal_to: SignalTarget::Main,
            on_drain: None,
        }
    }
}

/// The settings for all pods, for the log of the agent's start.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use humantime::format_duration as text;
        write!(
            f,
            "drain {}, until {}, quiet {}, settle {} to {}, idle-after {}, idle-flows {}, peer-timeout {}, reserve {}, \
             max-hold {}{}",
            self.drain,
            self.until,
            self.show_quiet(),
            text(self.settle_min),
            text(self.settle_max),
            text(self.idle_after),
            self.idle_flows,
            text(self.peer_timeout),
            text(self.reserve),
            text(self.max_hold.unwrap_or(DEFAULT_MAX_HOLD)),
            if self.extend { ", extend" } else { "" },
        )
    }
}

impl Policy {
    /// Whether flows to this local port hold a drain.
    pub fn holds_port(&self, port: u16) -> bool {
        (self.ports.is_empty() || self.ports.contains(&port)) && !self.ignore_ports.contains(&port)
    }

    /// How to classify the pod's flows.
    pub fn classify_options(&self) -> ClassifyOptions {
        ClassifyOptions {
            idle_after: self.idle_after,
            peer_timeout: self.peer_timeout,
            outbound: self.outbound.clone(),
            // Otherwise "idle" would only be another name for a flow that holds.
            silent_is_idle: self.until == Until::Idle || self.idle_flows == IdleFlows::Close,
        }
    }

    /// The longest settle phase.
    pub fn longest_settle(&self) -> Duration {
        self.settle_max.max(self.settle_min)
    }

    /// Name and value, as text, of each setting that an annotation can change, except `wait-port`, which does not change
    /// a drain.
    pub fn settings(&self) -> [(&'static str, String); 16] {
        let show = |d: Duration| humantime::format_duration(d).to_string();
        [
            ("drain", self.drain.to_string()),
            ("until", self.until.to_string()),
            ("quiet", self.show_quiet()),
            ("settle-min", show(self.settle_min)),
            ("settle-max", show(self.settle_max)),
            ("idle-after", show(self.idle_after)),
            ("idle-flows", self.idle_flows.to_string()),
            ("peer-timeout", show(self.peer_timeout)),
            ("reserve", show(self.reserve)),
            ("max-hold", show(self.max_hold.unwrap_or(DEFAULT_MAX_HOLD))),
            ("ports", annotations::show_ports(&self.ports, "all")),
            (
                "ignore-ports",
                annotations::show_ports(&self.ignore_ports, "none"),
            ),
            ("outbound", self.outbound.to_string()),
            ("stop-signal", self.stop_signals.to_string()),
            ("stop-signal-to", self.stop_signal_to.to_string()),
            (
                "on-drain",
                annotations::show_request(self.on_drain.as_ref()),
            ),
        ]
    }

    /// `quiet` as text. If it is not set, the settle phase depends on how often clients connect to the pod.
    fn show_quiet(&self) -> String {
        match self.quiet_is_set {
            true => humantime::format_duration(self.quiet).to_string(),
            false => "as usual for the pod".into(),
        }
    }

    /// This policy for a drain that ebb only observes: ebb closes no connection and sends no notification. Idle
    /// connections that ebb would have closed do not hold.
    pub(crate) fn for_observation(self) -> Self {
        let closes = self.idle_flows == IdleFlows::Close && self.until == Until::Zero;
        Self {
            until: if closes { Until::Idle } else { self.until },
            idle_flows: IdleFlows::Keep,
            stop_signals: StopSignals::default(),
            on_drain: None,
            ..self
        }
    }

    /// Whether ebb sends notifications to the application.
    pub fn notifies(&self) -> bool {
        !self.stop_signals.is_empty() || self.on_drain.is_some()
    }

    /// The reserve for this grace period: `reserve`, but no more than a third of it, so that most of a short grace
    /// period remains for the flows.
    pub fn effective_reserve(&self, grace: Duration) -> Duration {
        self.reserve.min(grace / 3)
    }

    /// Whether a hold may last longer than `grace`, the grace period that is left.
    pub fn extends(&self, grace: Option<Duration>) -> bool {
        self.extend && grace.is_some_and(|grace| self.max_hold.is_some_and(|max| max > grace))
    }

    /// The longest hold, counted from its beginning.
    ///
    /// If the grace period is not known, `max_hold` alone limits it, and without `max_hold` [`DEFAULT_GRACE`]. If it is,
    /// [`DEFAULT_MAX_HOLD`] applies without `max_hold`.
    pub fn deadline(&self, limits: CallLimits) -> HoldLimit {
        let reserve = self.effective_reserve(limits.grace.unwrap_or(DEFAULT_GRACE));
        let by_policy = match (self.max_hold, limits.grace) {
            (Some(max), _) => HoldLimit {
                after: max,
                cause: DeadlineCause::MaxHold,
            },
            (None, Some(_)) => HoldLimit {
                after: DEFAULT_MAX_HOLD,
                cause: DeadlineCause::MaxHold,
            },
            (None, None) => HoldLimit {
                after: DEFAULT_GRACE - reserve,
                cause: DeadlineCause::Grace,
            },
        };
        limits
            .longest(reserve, self.extends(limits.grace))
            .filter(|by_call| by_call.after <= by_policy.after)
            .unwrap_or(by_policy)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn limits(grace: Option<Duration>, rpc_timeout: Option<Duration>) -> CallLimits {
        CallLimits { grace, rpc_timeout }
    }

    #[test]
    fn a_hold_leaves_the_reserve_of_the_grace_period() {
        assert_eq!(
            Policy::default()
                .deadline(limits(Some(secs(60)), None))
                .after,
            secs(55)
        );
    }

    #[test]
    fn the_reserve_is_never_more_than_a_third_of_the_grace_period() {
        let policy = Policy {
            reserve: secs(60),
            ..Policy::default()
        };
        assert_eq!(policy.effective_reserve(secs(30)), secs(10));
        assert_eq!(
            policy.deadline(limits(Some(secs(30)), None)).after,
            secs(20)
        );
        assert_eq!(
            policy.deadline(limits(Some(Duration::ZERO), None)).after,
            Duration::ZERO
        );
    }

    #[test]
    fn a_hold_ends_before_the_callers_rpc_deadline() {
        let policy = Policy::default();
        assert_eq!(
            policy
                .deadline(limits(Some(secs(300)), Some(secs(120))))
                .after,
            secs(113)
        );
        assert_eq!(
            policy
                .deadline(limits(Some(secs(300)), Some(secs(1))))
                .after,
            Duration::ZERO
        );
    }

    #[test]
    fn max_hold_shortens_and_never_lengthens() {
        let policy = Policy {
            max_hold: Some(secs(20)),
            ..Policy::default()
        };
        assert_eq!(
            policy.deadline(limits(Some(secs(60)), None)).after,
            secs(20)
        );
        assert_eq!(
            policy.deadline(limits(Some(secs(15)), None)).after,
            secs(10)
        );
    }

    #[test]
    fn only_with_extend_does_max_hold_exceed_the_grace_period() {
        let policy = |extend| Policy {
            max_hold: Some(secs(20)),
            extend,
            ..Policy::default()
        };
        let stop = limits(Some(secs(6)), Some(secs(126)));
        assert_eq!(policy(false).deadline(stop).after, secs(4));
        assert_eq!(policy(true).deadline(stop).after, secs(20));
        // The reserve, a third of the grace period, also fits before the caller's RPC deadline.
        let short_rpc = limits(Some(secs(6)), Some(secs(16)));
        assert_eq!(policy(true).deadline(short_rpc).after, secs(12));
        // A preStop hook has no RPC deadline: the kubelet waits no longer than the grace period.
        assert_eq!(
            policy(true).deadline(limits(Some(secs(6)), None)).after,
            secs(4)
        );
        // Nothing to extend.
        let long = limits(Some(secs(60)), Some(secs(180)));
        assert_eq!(policy(true).deadline(long).after, secs(20));
        assert!(!policy(true).extends(Some(secs(60))));
    }

    proptest! {
        #[test]
        fn the_deadline_leaves_the_reserve_before_the_callers_rpc_deadline(
            grace in proptest::option::of(0u64..10_000), rpc_timeout in 0u64..10_000,
            max_hold in proptest::option::of(1u64..10_000), reserve in 0u64..4_000, extend: bool,
        ) {
            let policy = Policy {
                reserve: secs(reserve),
                max_hold: max_hold.map(secs),
                extend,
                ..Policy::default()
            };
            let rpc_timeout = secs(rpc_timeout);
            let deadline = policy.deadline(limits(grace.map(secs), Some(rpc_timeout))).after;
            let left = grace.map_or(Duration::ZERO, |g| policy.effective_reserve(secs(g)));
            prop_assert!(deadline.is_zero() || deadline + left + RPC_MARGIN <= rpc_timeout);
            prop_assert!(max_hold.is_none_or(|max| deadline <= secs(max)));
            if let Some(grace) = grace && !policy.extends(Some(secs(grace))) {
                prop_assert!(deadline + left <= secs(grace));
            }
        }
    }

    #[test]
    fn without_a_grace_period_max_hold_or_the_default_of_kubernetes_is_the_limit() {
        assert_eq!(
            Policy::default().deadline(limits(None, None)).after,
            secs(25)
        );
        let policy = Policy {
            max_hold: Some(secs(90)),
            ..Policy::default()
        };
        assert_eq!(policy.deadline(limits(None, None)).after, secs(90));
        assert_eq!(
            policy.deadline(limits(None, Some(secs(60)))).after,
            secs(58)
        );
    }

    #[test]
    fn ports_that_are_ignored_do_not_hold_even_when_listed() {
        let all = Policy::default();
        assert!(all.holds_port(80));
        let some = Policy {
            ports: vec![80, 443],
            ignore_ports: vec![443],
            ..Policy::default()
        };
        assert!(some.holds_port(80));
        assert!(!some.holds_port(443));
        assert!(!some.holds_port(9090));
    }

    #[test]
    fn values_parse_as_they_print_and_errors_list_the_accepted_ones() {
        for until in [Until::Zero, Until::Idle, Until::Settled] {
            assert_eq!(until.name().parse(), Ok(until));
        }
        for idle in [IdleFlows::Keep, IdleFlows::Close] {
            assert_eq!(idle.name().parse(), Ok(idle));
        }
        let error = "none".parse::<Until>().expect_err("not accepted");
        assert_eq!(
            error.to_string(),
            r#""none" is not one of zero, idle, settled"#
        );
    }

    #[test]
    fn the_default_of_quiet_is_not_shown_as_if_it_were_set() {
        let shown = |quiet_is_set| {
            let policy = Policy {
                quiet_is_set,
                ..Policy::default()
            };
            let quiet = policy.settings().into_iter().find(|s| s.0 == "quiet");
            quiet.map(|(_, value)| value)
        };
        assert_eq!(shown(true).as_deref(), Some("3s"));
        assert_eq!(shown(false).as_deref(), Some("as usual for the pod"));
    }

    #[test]
    fn without_max_hold_a_grace_period_of_a_week_holds_for_an_hour() {
        let week = Some(secs(7 * 24 * 3600));
        let limit = Policy::default().deadline(limits(week, None));
        assert_eq!(limit.after, DEFAULT_MAX_HOLD);
        assert_eq!(limit.cause, DeadlineCause::MaxHold);
        let limit = Policy::default().deadline(limits(Some(secs(60)), None));
        assert_eq!(limit.cause, DeadlineCause::Grace);
        let limit = Policy::default().deadline(limits(Some(secs(300)), Some(secs(120))));
        assert_eq!(limit.cause, DeadlineCause::RpcTimeout);
        let longer = Policy {
            max_hold: week,
            ..Policy::default()
        };
        let two_weeks = limits(week.map(|week| week * 2), None);
        assert_eq!(Some(longer.deadline(two_weeks).after), week);
    }
}
