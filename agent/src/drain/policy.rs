//! What a drain waits for and for how long.

pub mod annotations;
mod limit;

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

pub use annotations::{IDLE_AFTER, MAX_HOLD, QUIET, RESERVE};
pub use limit::{CallLimits, PATIENCE_MARGIN};

/// The grace period of a pod that names none: `DefaultTerminationGracePeriodSeconds` in Kubernetes'
/// `pkg/apis/core/v1/defaults.go` (`SetDefaults_PodSpec`).
pub const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// A word that is not one of those a setting knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{got:?} is not one of {}", .known.join(", "))]
pub struct UnknownWord {
    /// What was given.
    pub got: String,
    /// What may be given.
    pub known: &'static [&'static str],
}

/// When a pod is drained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// No tracked inbound flow is left, live or idle.
    #[default]
    Zero,
    /// No live flow is left.
    Idle,
    /// The settle phase is over.
    Settled,
}

impl Until {
    /// The word for it in annotations, flags and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Idle => "idle",
            Self::Settled => "settled",
        }
    }
}

impl fmt::Display for Until {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Until {
    type Err = UnknownWord;

    fn from_str(s: &str) -> Result<Self, UnknownWord> {
        match s {
            "zero" => Ok(Self::Zero),
            "idle" => Ok(Self::Idle),
            "settled" => Ok(Self::Settled),
            _ => Err(UnknownWord {
                got: s.to_owned(),
                known: &["zero", "idle", "settled"],
            }),
        }
    }
}

/// What to do with idle flows during the drain phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdleFlows {
    /// Wait until their clients end them.
    #[default]
    Keep,
    /// Close them gracefully.
    Close,
}

impl IdleFlows {
    /// The word for it in annotations, flags and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Close => "close",
        }
    }
}

impl fmt::Display for IdleFlows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for IdleFlows {
    type Err = UnknownWord;

    fn from_str(s: &str) -> Result<Self, UnknownWord> {
        match s {
            "keep" => Ok(Self::Keep),
            "close" => Ok(Self::Close),
            _ => Err(UnknownWord {
                got: s.to_owned(),
                known: &["keep", "close"],
            }),
        }
    }
}

/// A pod's drain policy, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `ebb.dev/drain` is not "off".
    pub enabled: bool,
    /// What to wait for.
    pub until: Until,
    /// The settle phase ends when no new inbound flow has arrived for this long …
    pub quiet: Duration,
    /// … or after this long in any case.
    pub settle_max: Duration,
    /// A flow without bytes for this long may be idle.
    pub idle_after: Duration,
    /// What to do with idle flows while waiting.
    pub idle_flows: IdleFlows,
    /// What to leave of the grace period for the application's own shutdown; never more than a third of it.
    pub reserve: Duration,
    /// The longest hold; `None`: as long as the grace period allows.
    pub max_hold: Option<Duration>,
    /// A `max_hold` longer than the grace period is obeyed, as far as the caller's patience allows.
    pub extend: bool,
    /// Only flows to these local ports hold; empty: all.
    pub ports: Vec<u16>,
    /// Flows to these local ports do not hold.
    pub ignore_ports: Vec<u16>,
    /// Where ebb is to listen inside the pod for its preStop hook.
    pub wait_port: Option<u16>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            enabled: true,
            until: Until::Zero,
            quiet: Duration::from_secs(3),
            settle_max: Duration::from_secs(15),
            idle_after: Duration::from_secs(5),
            idle_flows: IdleFlows::Keep,
            reserve: Duration::from_secs(5),
            max_hold: None,
            extend: false,
            ports: Vec::new(),
            ignore_ports: Vec::new(),
            wait_port: None,
        }
    }
}

impl Policy {
    /// Do flows to this local port hold a drain?
    pub fn holds_port(&self, port: u16) -> bool {
        (self.ports.is_empty() || self.ports.contains(&port)) && !self.ignore_ports.contains(&port)
    }

    /// Each setting that an annotation can change: its name and its value, in words.
    pub fn settings(&self) -> [(&'static str, String); 9] {
        let show = |d: Duration| humantime::format_duration(d).to_string();
        [
            ("drain", if self.enabled { "on" } else { "off" }.into()),
            ("until", self.until.to_string()),
            ("quiet", show(self.quiet)),
            ("idle-after", show(self.idle_after)),
            ("idle-flows", self.idle_flows.to_string()),
            ("reserve", show(self.reserve)),
            ("max-hold", self.max_hold.map_or("none".into(), show)),
            ("ports", annotations::show_ports(&self.ports, "all")),
            (
                "ignore-ports",
                annotations::show_ports(&self.ignore_ports, "none"),
            ),
        ]
    }

    /// What is left of a grace period of this length for the application: `reserve`, but no more than a
    /// third, so that a short grace period still leaves most of itself to the flows.
    pub fn effective_reserve(&self, grace: Duration) -> Duration {
        self.reserve.min(grace / 3)
    }

    /// Whether a hold of a pod with this much grace left may last longer than that.
    pub fn extends(&self, grace: Option<Duration>) -> bool {
        self.extend && grace.is_some_and(|grace| self.max_hold.is_some_and(|max| max > grace))
    }

    /// How long a hold may last, counted from its beginning.
    ///
    /// Without a grace period, `max_hold` alone decides, and without that a pod is taken to have
    /// [`DEFAULT_GRACE`].
    pub fn deadline(&self, limits: CallLimits) -> Duration {
        let reserve = self.effective_reserve(limits.grace.unwrap_or(DEFAULT_GRACE));
        let wanted = match (self.max_hold, limits.grace) {
            (Some(max), _) => max,
            // The limit is the grace period's.
            (None, Some(_)) => Duration::MAX,
            (None, None) => DEFAULT_GRACE - reserve,
        };
        limits
            .longest(reserve, self.extends(limits.grace))
            .map_or(wanted, |longest| longest.min(wanted))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn limits(grace: Option<Duration>, patience: Option<Duration>) -> CallLimits {
        CallLimits { grace, patience }
    }

    #[test]
    fn a_hold_leaves_the_reserve_of_the_grace_period() {
        assert_eq!(
            Policy::default().deadline(limits(Some(secs(60)), None)),
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
        assert_eq!(policy.deadline(limits(Some(secs(30)), None)), secs(20));
        assert_eq!(
            policy.deadline(limits(Some(Duration::ZERO), None)),
            Duration::ZERO
        );
    }

    #[test]
    fn a_hold_answers_before_its_caller_gives_up() {
        let policy = Policy::default();
        assert_eq!(
            policy.deadline(limits(Some(secs(300)), Some(secs(120)))),
            secs(113)
        );
        assert_eq!(
            policy.deadline(limits(Some(secs(300)), Some(secs(1)))),
            Duration::ZERO
        );
    }

    #[test]
    fn max_hold_shortens_and_never_lengthens() {
        let policy = Policy {
            max_hold: Some(secs(20)),
            ..Policy::default()
        };
        assert_eq!(policy.deadline(limits(Some(secs(60)), None)), secs(20));
        assert_eq!(policy.deadline(limits(Some(secs(15)), None)), secs(10));
    }

    #[test]
    fn only_with_extend_does_max_hold_exceed_the_grace_period() {
        let policy = |extend| Policy {
            max_hold: Some(secs(20)),
            extend,
            ..Policy::default()
        };
        let stop = limits(Some(secs(6)), Some(secs(126)));
        assert_eq!(policy(false).deadline(stop), secs(4));
        assert_eq!(policy(true).deadline(stop), secs(20));
        // A third of the grace period stays the application's own, within the caller's patience.
        let impatient = limits(Some(secs(6)), Some(secs(16)));
        assert_eq!(policy(true).deadline(impatient), secs(12));
        // A preStop hook: the kubelet waits no longer than the grace period.
        assert_eq!(policy(true).deadline(limits(Some(secs(6)), None)), secs(4));
        // Nothing to extend.
        let long = limits(Some(secs(60)), Some(secs(180)));
        assert_eq!(policy(true).deadline(long), secs(20));
        assert!(!policy(true).extends(Some(secs(60))));
    }

    proptest! {
        #[test]
        fn a_deadline_always_comes_before_the_caller_gives_up(
            grace in proptest::option::of(0u64..10_000), patience in 0u64..10_000,
            max_hold in proptest::option::of(1u64..10_000), reserve in 0u64..4_000, extend: bool,
        ) {
            let policy = Policy {
                reserve: secs(reserve),
                max_hold: max_hold.map(secs),
                extend,
                ..Policy::default()
            };
            let patience = secs(patience);
            let deadline = policy.deadline(limits(grace.map(secs), Some(patience)));
            let left = grace.map_or(Duration::ZERO, |g| policy.effective_reserve(secs(g)));
            prop_assert!(deadline.is_zero() || deadline + left + PATIENCE_MARGIN <= patience);
            prop_assert!(max_hold.is_none_or(|max| deadline <= secs(max)));
            if let Some(grace) = grace && !policy.extends(Some(secs(grace))) {
                prop_assert!(deadline + left <= secs(grace));
            }
        }
    }

    #[test]
    fn an_unknown_grace_period_is_taken_from_max_hold_or_the_default_of_kubernetes() {
        assert_eq!(Policy::default().deadline(limits(None, None)), secs(25));
        let policy = Policy {
            max_hold: Some(secs(90)),
            ..Policy::default()
        };
        assert_eq!(policy.deadline(limits(None, None)), secs(90));
        assert_eq!(policy.deadline(limits(None, Some(secs(60)))), secs(58));
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
    fn words_are_spelled_the_same_in_and_out_and_errors_name_the_choices() {
        for until in [Until::Zero, Until::Idle, Until::Settled] {
            assert_eq!(until.name().parse(), Ok(until));
        }
        for idle in [IdleFlows::Keep, IdleFlows::Close] {
            assert_eq!(idle.name().parse(), Ok(idle));
        }
        let error = "none".parse::<Until>().expect_err("no such word");
        assert_eq!(
            error.to_string(),
            r#""none" is not one of zero, idle, settled"#
        );
    }
}
