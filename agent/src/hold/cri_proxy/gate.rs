//! Holding one stop call: asking the agent, waiting for it, and never depending on it.
//!
//! ```text
//!  ask ── no agent, pass, nonsense, silent for 2.5 s ───────────────────► forward untouched
//!   │
//!   └─ holding ── release, agent gone or talking nonsense,
//!                 own limit reached, proxy shutting down ───────────────► forward with what is left
//! ```
//!
//! There is no way out that is an error: to the kubelet a failed StopContainer is the reason to call
//! StopPodSandbox, which kills.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{allowance::Allowance, stop::StopCall};
use crate::{
    api::client::{AgentClient, AgentError, JsonLines},
    clock::millis,
    hold::wire::{FIRST_MESSAGE, HOLDS_PATH, HoldMessage, HoldRequest, ReleaseReason},
    ids::PodUid,
};

/// How a call leaves the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was not held: nothing about it changes.
    Untouched,
    /// It was held.
    Held {
        /// From its arrival.
        held: Duration,
        /// What the agent wanted to be left of the timeout.
        reserve: Duration,
    },
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The agent said so.
    Released(ReleaseReason),
    /// The agent took the hold back.
    Passed,
    /// The agent's connection ended.
    AgentGone,
    /// The agent said something that makes no sense.
    Nonsense,
    /// The call allows no more, whatever the agent says.
    Limit,
    /// This proxy is being stopped.
    ProxyShutdown,
    /// The caller did not want to wait any longer.
    CallerGone,
}

impl End {
    const fn name(self) -> &'static str {
        match self {
            Self::Released(reason) => reason.name(),
            Self::Passed => "passed",
            Self::AgentGone => "agent-gone",
            Self::Nonsense => "agent-nonsense",
            Self::Limit => "limit",
            Self::ProxyShutdown => "proxy-shutdown",
            Self::CallerGone => "caller-gone",
        }
    }
}

/// Holds `call`, which arrived at `arrived`, as long as the agent wants and the allowance allows.
/// Dropping the future gives the hold up.
pub(super) async fn hold(
    agent: &AgentClient,
    call: &StopCall,
    allowance: Allowance,
    arrived: Instant,
    shutdown: &CancellationToken,
) -> Outcome {
    if !allowance.may_hold() || shutdown.is_cancelled() {
        debug!(%call, "not to be held");
        return Outcome::Untouched;
    }
    let request = HoldRequest {
        call: call.to_wire(),
        caller_patience_ms: allowance.patience.map(millis),
    };
    let first = tokio::select! {
        first = timeout(FIRST_MESSAGE, ask(agent, &request)) => first,
        () = shutdown.cancelled() => return Outcome::Untouched,
    };
    match first {
        Err(_) => warn!(%call, after = ?FIRST_MESSAGE, "passed: the agent says nothing"),
        Ok(Err(error)) => {
            let error: &dyn std::error::Error = &error;
            warn!(%call, error, "passed: the agent can't be asked");
        }
        Ok(Ok((None, _))) => warn!(%call, "passed: the agent ended without an answer"),
        Ok(Ok((Some(HoldMessage::Pass { why }), _))) => debug!(%call, why, "passed"),
        Ok(Ok((Some(HoldMessage::Release { reason, .. }), _))) => debug!(%call, %reason, "passed"),
        Ok(Ok((
            Some(HoldMessage::Holding {
                pod,
                deadline_ms,
                reserve_ms,
            }),
            lines,
        ))) => {
            let reserve = Duration::from_millis(reserve_ms);
            let longest = arrived.checked_add(allowance.longest(reserve));
            let deadline = Instant::now().checked_add(Duration::from_millis(deadline_ms));
            let mut log = HoldLog {
                call,
                pod,
                arrived,
                end: End::CallerGone,
            };
            log.end = tokio::select! {
                end = released(lines, call) => end,
                () = until(longest) => End::Limit,
                // The agent should have said so itself.
                () = until(deadline) => End::Released(ReleaseReason::Deadline),
                () = shutdown.cancelled() => End::ProxyShutdown,
            };
            return Outcome::Held {
                held: arrived.elapsed(),
                reserve,
            };
        }
    }
    Outcome::Untouched
}

async fn ask(
    agent: &AgentClient,
    request: &HoldRequest,
) -> Result<(Option<HoldMessage>, JsonLines<HoldMessage>), AgentError> {
    let mut lines = agent.post_lines(HOLDS_PATH, request).await?;
    Ok((lines.next().await?, lines))
}

/// Waits for whatever the agent says after `holding`.
async fn released(mut lines: JsonLines<HoldMessage>, call: &StopCall) -> End {
    match lines.next().await {
        Ok(Some(HoldMessage::Release { reason, .. })) => End::Released(reason),
        Ok(Some(HoldMessage::Pass { .. })) => End::Passed,
        Ok(Some(HoldMessage::Holding { .. })) => End::Nonsense,
        Ok(None) | Err(AgentError::Lost { .. }) => End::AgentGone,
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            warn!(%call, error, "the agent makes no sense");
            End::Nonsense
        }
    }
}

/// Sleeps until `moment`; for ever if it is beyond the end of the clock.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Writes the one line about a hold, also about one that is dropped because its caller went away.
struct HoldLog<'a> {
    call: &'a StopCall,
    pod: PodUid,
    arrived: Instant,
    end: End,
}

impl Drop for HoldLog<'_> {
    fn drop(&mut self) {
        let Self {
            call,
            pod,
            arrived,
            end,
        } = self;
        info!(%call, %pod, held = ?arrived.elapsed(), reason = end.name(), "held");
    }
}
