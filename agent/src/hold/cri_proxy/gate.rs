//! Holding one stop call: asking the agent, waiting for it, and never depending on it.
//!
//! ```text
//!  ask ── no agent, pass, nonsense, silent for 2.5 s ───────────────────► forward untouched, or, if that
//!   │                                                                      took a second, with what is left
//!   └─ holding ── release, agent gone or talking nonsense,
//!       │  ▲      own limit reached, proxy shutting down ───────────────► forward with what is left
//!       │  │
//!       │  └───── holding ────┐
//!       └─ release: shutdown ─┴─ ask again ── pass, no agent in time ───► forward with what is left
//! ```
//!
//! An agent that is stopped says so, and most often has a successor within seconds: the call is kept for it. One
//! that is gone without a word has crashed, and nobody knows when there will be another.
//!
//! There is no way out that is an error: to the kubelet a failed StopContainer is the reason to call
//! StopPodSandbox, which kills.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{allowance::Allowance, notices, stop::StopCall};
use crate::{
    api::client::{AgentClient, AgentError, JsonLines},
    clock::{BootTime, millis},
    drain::report::ReleaseReason,
    hold::wire::{FIRST_MESSAGE, HOLDS_PATH, HoldMessage, HoldRequest},
    ids::PodUid,
};

/// A call that is not held and was kept for less is forwarded as it came: for the whole to take no longer than its
/// timeout, a second of that would be lost for every moment.
const NOT_WORTH_A_SECOND: Duration = Duration::from_secs(1);

/// How often the successor of an agent that has stopped is asked for.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// How a call leaves the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing about it changes.
    Untouched,
    /// It was held, or the question whether to hold it took long.
    Kept {
        /// From its arrival.
        waited: Duration,
        /// What is to be left of the timeout.
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

/// Who decides about stop calls, and how much this proxy waits for that.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    /// The agent.
    pub(super) agent: AgentClient,
    /// How long a call that was held waits for the successor of an agent that has stopped.
    pub(super) restart_within: Duration,
    /// Cancelled when this proxy is to stop.
    pub(super) shutdown: CancellationToken,
}

impl Gate {
    /// Holds `call`, which arrived at `arrived`, as long as the agent wants and the allowance allows.
    /// Dropping the future gives the hold up.
    pub(super) async fn hold(
        &self,
        call: &StopCall,
        allowance: Allowance,
        arrived: Instant,
    ) -> Outcome {
        if self.shutdown.is_cancelled() {
            return Outcome::Untouched;
        }
        if !allowance.may_hold() {
            debug!(%call, "not to be held");
            notices::passed(&self.agent, call, "no-time");
            return Outcome::Untouched;
        }
        let request = HoldRequest {
            call: call.to_wire(),
            caller_patience_ms: allowance.patience.map(millis),
            arrived: Some(BootTime::now()),
            resumed: false,
        };
        let Some((terms, lines)) = self.first(call, &request, allowance).await else {
            return passed(allowance, arrived.elapsed());
        };
        let Terms {
            pod,
            deadline,
            reserve,
            extended,
        } = terms;
        let longest = arrived.checked_add(allowance.longest(reserve, extended));
        let deadline = Instant::now().checked_add(deadline);
        let mut log = HoldLog {
            call,
            pod,
            arrived,
            end: End::CallerGone,
        };
        log.end = tokio::select! {
            end = self.released(call, &request, lines) => end,
            () = until(longest) => End::Limit,
            // The agent should have said so itself.
            () = until(deadline) => End::Released(ReleaseReason::Deadline),
            () = self.shutdown.cancelled() => End::ProxyShutdown,
        };
        Outcome::Kept {
            waited: arrived.elapsed(),
            reserve,
        }
    }

    /// Asks the agent whether to hold. `None`: no, or nobody can tell.
    async fn first(
        &self,
        call: &StopCall,
        request: &HoldRequest,
        allowance: Allowance,
    ) -> Option<(Terms, JsonLines<HoldMessage>)> {
        // A caller that leaves sooner than an agent may need must have its answer all the same.
        let within = FIRST_MESSAGE.min(allowance.longest(Duration::ZERO, false));
        let first = tokio::select! {
            first = timeout(within, ask(&self.agent, request)) => first,
            () = self.shutdown.cancelled() => return None,
        };
        match first {
            Err(_) => {
                warn!(%call, after = ?within, "passed: the agent says nothing");
                notices::passed(&self.agent, call, "agent-silent");
            }
            Ok(Err(error)) => {
                let error: &dyn std::error::Error = &error;
                warn!(%call, error, "passed: the agent can't be asked");
                notices::passed(&self.agent, call, "agent-away");
            }
            Ok(Ok((None, _))) => {
                warn!(%call, "passed: the agent ended without an answer");
                notices::passed(&self.agent, call, "agent-away");
            }
            Ok(Ok((Some(HoldMessage::Pass { why }), _))) => debug!(%call, why, "passed"),
            Ok(Ok((Some(HoldMessage::Release { reason, .. }), _))) => {
                debug!(%call, %reason, "passed");
            }
            Ok(Ok((
                Some(HoldMessage::Holding {
                    pod,
                    deadline_ms,
                    reserve_ms,
                    extended,
                }),
                lines,
            ))) => {
                let terms = Terms {
                    pod,
                    deadline: Duration::from_millis(deadline_ms),
                    reserve: Duration::from_millis(reserve_ms),
                    extended,
                };
                return Some((terms, lines));
            }
        }
        None
    }

    /// Waits for the end of a hold, whichever agent says so. The terms stay those of the first one.
    async fn released(
        &self,
        call: &StopCall,
        request: &HoldRequest,
        mut lines: JsonLines<HoldMessage>,
    ) -> End {
        loop {
            let end = said(lines, call).await;
            if end != End::Released(ReleaseReason::Shutdown) || self.restart_within.is_zero() {
                return end;
            }
            debug!(%call, within = ?self.restart_within, "the agent stops: waiting for its successor");
            match timeout(self.restart_within, self.ask_again(request)).await {
                Ok(Ok(again)) => lines = again,
                Ok(Err(end)) => return end,
                Err(_) => return end,
            }
        }
    }

    /// Asks until there is an agent that holds the call on, or another end of the hold.
    async fn ask_again(&self, request: &HoldRequest) -> Result<JsonLines<HoldMessage>, End> {
        let request = HoldRequest {
            resumed: true,
            ..request.clone()
        };
        loop {
            sleep(ASK_AGAIN).await;
            match timeout(FIRST_MESSAGE, ask(&self.agent, &request)).await {
                Ok(Ok((Some(HoldMessage::Holding { .. }), lines))) => return Ok(lines),
                Ok(Ok((Some(HoldMessage::Pass { .. }), _))) => return Err(End::Passed),
                Ok(Ok((Some(HoldMessage::Release { reason, .. }), _)))
                    if reason != ReleaseReason::Shutdown =>
                {
                    return Err(End::Released(reason));
                }
                // It still is the one that stops, or is not ready yet.
                _ => {}
            }
        }
    }
}

/// What the agent wants of a hold.
struct Terms {
    pod: PodUid,
    /// The latest moment of release, from now.
    deadline: Duration,
    /// What is to be left of the timeout.
    reserve: Duration,
    /// Whether the hold may be longer than the timeout.
    extended: bool,
}

/// What becomes of a call that is not held and was kept for `waited` by the question: the whole is to take no longer
/// than the timeout it came with.
fn passed(allowance: Allowance, waited: Duration) -> Outcome {
    if waited < NOT_WORTH_A_SECOND {
        return Outcome::Untouched;
    }
    Outcome::Kept {
        waited,
        reserve: allowance.least(),
    }
}

async fn ask(
    agent: &AgentClient,
    request: &HoldRequest,
) -> Result<(Option<HoldMessage>, JsonLines<HoldMessage>), AgentError> {
    let mut lines = agent.post_lines(HOLDS_PATH, request).await?;
    Ok((lines.next().await?, lines))
}

/// Waits for whatever the agent says after `holding`.
async fn said(mut lines: JsonLines<HoldMessage>, call: &StopCall) -> End {
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
