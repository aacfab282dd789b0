//! What a drain waits for and for how long.

pub mod annotations;

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

pub use annotations::{IDLE_AFTER, MAX_HOLD, QUIET, RESERVE};

/// The grace period of a pod that names none: `DefaultTerminationGracePeriodSeconds` in Kubernetes'
/// `pkg/apis/core/v1/defaults.go` (`SetDefaults_PodSpec`).
pub const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// What is left of a caller's own deadline for the answer to reach it and for the call to go on.
pub const PATIENCE_MARGIN: Duration = Duration::from_secs(2);

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
    /// Only flows to these local ports hold; empty: all.
    pub ports: Vec<u16>,
    /// Flows to these local ports do not hold.
    pub ignore_ports: Vec<u16>,
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
            ports: Vec::new(),
            ignore_ports: Vec::new(),
        }
    }
}

impl Policy {
    /// Do flows to this local port hold a drain?
    pub fn holds_port(&self, port: u16) -> bool {
        (self.ports.is_empty() || self.ports.contains(&port)) && !self.ignore_ports.contains(&port)
    }

    /// What is left of a grace period of this length for the application: `reserve`, but no more than a
    /// third, so that a short grace period still leaves most of itself to the flows.
    pub fn effective_reserve(&self, grace: Duration) -> Duration {
        self.reserve.min(grace / 3)
    }

    /// How long a hold may last, counted from its beginning.
    ///
    /// `grace` is what is left of the pod's grace period, where it is known; `patience` is how long the
    /// caller itself waits for its answer, if it says. Without a grace period, `max_hold` alone decides,
    /// and without that a pod is taken to have [`DEFAULT_GRACE`].
    pub fn deadline(&self, grace: Option<Duration>, patience: Option<Duration>) -> Duration {
        let by_grace = match (grace, self.max_hold) {
            (Some(grace), max) => {
                let left = grace - self.effective_reserve(grace);
                max.map_or(left, |max| left.min(max))
            }
            (None, Some(max)) => max,
            (None, None) => DEFAULT_GRACE - self.effective_reserve(DEFAULT_GRACE),
        };
        patience.map_or(by_grace, |p| {
            by_grace.min(p.saturating_sub(PATIENCE_MARGIN))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_hold_leaves_the_reserve_of_the_grace_period() {
        assert_eq!(Policy::default().deadline(Some(secs(60)), None), secs(55));
    }

    #[test]
    fn the_reserve_is_never_more_than_a_third_of_the_grace_period() {
        let policy = Policy {
            reserve: secs(60),
            ..Policy::default()
        };
        assert_eq!(policy.effective_reserve(secs(30)), secs(10));
        assert_eq!(policy.deadline(Some(secs(30)), None), secs(20));
        assert_eq!(policy.deadline(Some(Duration::ZERO), None), Duration::ZERO);
    }

    #[test]
    fn a_hold_answers_before_its_caller_gives_up() {
        let policy = Policy::default();
        assert_eq!(policy.deadline(Some(secs(300)), Some(secs(120))), secs(118));
        assert_eq!(
            policy.deadline(Some(secs(300)), Some(secs(1))),
            Duration::ZERO
        );
    }

    #[test]
    fn max_hold_shortens_and_never_lengthens() {
        let policy = Policy {
            max_hold: Some(secs(20)),
            ..Policy::default()
        };
        assert_eq!(policy.deadline(Some(secs(60)), None), secs(20));
        assert_eq!(policy.deadline(Some(secs(15)), None), secs(10));
    }

    #[test]
    fn an_unknown_grace_period_is_taken_from_max_hold_or_the_default_of_kubernetes() {
        assert_eq!(Policy::default().deadline(None, None), secs(25));
        let policy = Policy {
            max_hold: Some(secs(90)),
            ..Policy::default()
        };
        assert_eq!(policy.deadline(None, None), secs(90));
        assert_eq!(policy.deadline(None, Some(secs(60))), secs(58));
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
