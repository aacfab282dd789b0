//! Holds one stop call until the agent releases it, and forwards it if the agent fails.
//!
//! ```text
//!  request_hold ── no agent, forward, bad message, no answer in 2.5 s ──► forward untouched, or, if that
//!   │    │                                                                 took a second, with reduced timeouts
//!   │    └─ release: shutdown, or no agent after one that stopped: ask again, as below
//!   └─ holding ── release, agent gone, bad message,
//!       │  ▲      own limit reached, proxy shutting down ───────────────► forward with reduced timeouts
//!       │  │
//!       │  └───── holding ────┐
//!       └─ release: shutdown ─┴─ ask again ── forward, no agent in time ► forward with reduced timeouts
//! ```
//!
//! An agent that stops sends `release: shutdown`, and leaves a note for the calls that arrive when it is gone
//! (`agent_stops`). Usually another agent starts within seconds, so the proxy keeps the call. If the agent closes the
//! connection without a message and leaves no note, it has crashed, and may not come back: the proxy forwards the call.
//!
//! A StopPodSandbox that finds no agent is forwarded even then. The kubelet calls it when the pod's containers have
//! stopped, and the next agent may start only when the sandbox of the last one is gone.
//!
//! No path returns an error: when StopContainer fails, the kubelet calls StopPodSandbox, which kills the containers.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ebb_core::{
    clock::{BootTime, millis},
    format::one_line,
    release::ReleaseReason,
    time_budget::TimeBudget,
};
use ebb_protocol::{
    client::{AgentClient, AgentError, JsonLines},
    hold::{BypassReason, FIRST_MESSAGE_WITHIN, HOLDS_PATH, HoldMessage, HoldRequest},
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    agent_stops::AgentStops,
    bypass_report,
    metrics::ProxyCounters,
    stop::{self, StopCall},
};

/// A call that is not held and was delayed for less than this is forwarded untouched: only whole seconds are
/// subtracted from its timeout.
const NOT_WORTH_A_SECOND: Duration = Duration::from_secs(1);

/// How long after the deadline the proxy forwards the call by itself. Both have the same deadline, but the agent
/// should release first: otherwise it counts the flows that the stop cuts as ended.
const AGENT_LATE: Duration = Duration::from_millis(50);

/// The pause between hold requests to the next agent after one has stopped.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// How to forward a stop call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HoldOutcome {
    /// Unchanged.
    Untouched,
    /// With reduced timeouts, because it was held or the hold request took long.
    Delayed {
        /// The delay, from the call's arrival.
        waited: Duration,
        /// The part of the timeout to leave for the application.
        reserve: Duration,
        /// Whether the agent held it.
        was_held: bool,
    },
}

impl HoldOutcome {
    /// Whether the agent held the call.
    pub(crate) const fn was_held(self) -> bool {
        matches!(self, Self::Delayed { was_held: true, .. })
    }
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HoldEnd {
    /// The agent released it.
    Released(ReleaseReason),
    /// The agent withdrew the hold.
    Forwarded,
    /// The agent's connection ended.
    AgentGone,
    /// The agent's message is not valid.
    BadMessage,
    /// The call's own timeouts allow no longer hold, even if the agent does.
    Limit,
    /// This proxy stops.
    ProxyShutdown,
    /// The caller cancelled the call.
    CallerGone,
}

impl HoldEnd {
    const fn name(self) -> &'static str {
        match self {
            Self::Released(reason) => reason.name(),
            Self::Forwarded => "forwarded",
            Self::AgentGone => "agent-gone",
            Self::BadMessage => "agent-bad-message",
            Self::Limit => "limit",
            Self::ProxyShutdown => "proxy-shutdown",
            Self::CallerGone => "caller-gone",
        }
    }
}

/// Requests holds of stop calls from the agent.
#[derive(Clone, Debug)]
pub(crate) struct HoldClient {
    agent: AgentClient,
    stops: AgentStops,
    /// How long a call waits for the next agent after one has stopped.
    restart_within: Duration,
    /// Cancelled when this proxy must stop.
    pub(crate) shutdown: CancellationToken,
    unreadable: Arc<AtomicU64>,
    counters: ProxyCounters,
}

impl HoldClient {
    /// Requests holds from the agent at the socket `agent`, until `shutdown`. After an agent has stopped, a call waits
    /// for the next one for `restart_within`.
    pub(crate) fn new(
        agent: &Path,
        restart_within: Duration,
        shutdown: CancellationToken,
        counters: ProxyCounters,
    ) -> Self {
        Self {
            agent: AgentClient::new(agent),
            stops: AgentStops::new(agent),
            restart_within,
            shutdown,
            unreadable: Arc::default(),
            counters,
        }
    }

    /// Logs a stop call that the proxy can't read and so forwards, and reports it to the agent, which counts it.
    pub(crate) fn forward_unreadable(&self, path: &str, why: &'static str) {
        let so_far = self.unreadable.fetch_add(1, Ordering::Relaxed) + 1;
        warn!(
            path,
            so_far, "forwarded a stop call that can't be read: {why}"
        );
        bypass_report::send(
            &self.agent,
            stop::unreadable_call(path),
            BypassReason::Unreadable,
        );
    }

    /// Holds `call`, which arrived at `arrived` as part of the trace `traceparent`, until the agent releases it or the
    /// time budget ends. Dropping the future cancels the hold.
    pub(crate) async fn hold(
        &self,
        call: &StopCall,
        budget: TimeBudget,
        arrived: BootTime,
        traceparent: Option<String>,
    ) -> HoldOutcome {
        if self.shutdown.is_cancelled() {
            return HoldOutcome::Untouched;
        }
        if !budget.allows_hold() {
            debug!(%call, "forwarded: no time to hold it");
            self.report(call, BypassReason::NoTime);
            return HoldOutcome::Untouched;
        }
        let request = HoldRequest {
            call: call.to_wire(),
            rpc_timeout_ms: budget.rpc_timeout.map(millis),
            arrived: Some(arrived),
            resumed: false,
            traceparent,
        };
        let held = match self.request_hold(call, &request, budget).await {
            FirstAnswer::Held(terms, lines) => Some((terms, lines)),
            FirstAnswer::NotHeld => None,
            FirstAnswer::AgentStops { until } => {
                let latest = arrived + budget.longest_hold(budget.default_reserve(), false);
                self.wait_for_successor(call, &request, until.min(latest))
                    .await
            }
        };
        let Some((terms, lines)) = held else {
            return not_held(budget, BootTime::now().since(arrived));
        };
        let HoldTerms {
            pod,
            deadline,
            reserve,
            extended,
            container,
        } = terms;
        let limit = arrived + budget.longest_hold(reserve, extended);
        let (latest, late) = match limit < deadline {
            true => (limit, HoldEnd::Limit),
            false => (deadline, HoldEnd::Released(ReleaseReason::Deadline)),
        };
        let longest = latest.since(BootTime::now());
        info!(%call, %pod, container, ?longest, "holding");
        self.counters.hold_began();
        let mut log = HoldLog {
            call,
            pod,
            container,
            arrived,
            end: HoldEnd::CallerGone,
            counters: &self.counters,
        };
        log.end = tokio::select! {
            end = self.until_released(call, &request, lines) => end,
            () = sleep((latest + AGENT_LATE).since(BootTime::now())) => late,
            () = self.shutdown.cancelled() => HoldEnd::ProxyShutdown,
        };
        HoldOutcome::Delayed {
            waited: BootTime::now().since(arrived),
            reserve,
            was_held: true,
        }
    }

    /// Asks the agent whether to hold the call.
    async fn request_hold(
        &self,
        call: &StopCall,
        request: &HoldRequest,
        budget: TimeBudget,
    ) -> FirstAnswer {
        // The call's own deadline may be earlier.
        let within = FIRST_MESSAGE_WITHIN.min(budget.longest_hold(Duration::ZERO, false));
        let first = tokio::select! {
            first = timeout(within, ask(&self.agent, request)) => first,
            () = self.shutdown.cancelled() => return FirstAnswer::NotHeld,
        };
        let (why, reason) = match first {
            Ok(Ok((Some(message), lines))) => return self.first_message(call, message, lines),
            Ok(Ok((None, _))) => (
                "the agent ended without an answer".to_owned(),
                BypassReason::AgentAway,
            ),
            Ok(Err(error)) => (
                format!("can't ask the agent: {}", one_line(&error)),
                BypassReason::AgentAway,
            ),
            Err(_) => (
                format!("the agent does not answer within {within:?}"),
                BypassReason::AgentSilent,
            ),
        };
        if matches!(call, StopCall::Container { .. })
            && let Some(until) = self.stops.wait_until(self.restart_within).await
        {
            debug!(%call, "{why}: it has stopped, waiting for the next agent");
            return FirstAnswer::AgentStops { until };
        }
        warn!(%call, "forwarded: {why}");
        self.report(call, reason);
        FirstAnswer::NotHeld
    }

    fn first_message(
        &self,
        call: &StopCall,
        message: HoldMessage,
        lines: JsonLines<HoldMessage>,
    ) -> FirstAnswer {
        match HoldTerms::of(message) {
            Ok(terms) => FirstAnswer::Held(terms, lines),
            Err(HoldEnd::Released(ReleaseReason::Shutdown)) => {
                let now = BootTime::now();
                self.stops.record(now);
                debug!(%call, "the agent stops: waiting for the next agent");
                FirstAnswer::AgentStops {
                    until: now + self.restart_within,
                }
            }
            Err(end) => {
                debug!(%call, reason = end.name(), "forwarded");
                FirstAnswer::NotHeld
            }
        }
    }

    /// Asks the next agent about a call that none has held yet. `None` if it does not hold the call or does not come
    /// before `latest`.
    async fn wait_for_successor(
        &self,
        call: &StopCall,
        request: &HoldRequest,
        latest: BootTime,
    ) -> Option<(HoldTerms, JsonLines<HoldMessage>)> {
        let asked = tokio::select! {
            asked = timeout(latest.since(BootTime::now()), self.ask_successor(request)) => asked,
            () = self.shutdown.cancelled() => return None,
        };
        match asked {
            Ok(Ok(held)) => return Some(held),
            Ok(Err(end)) => debug!(%call, reason = end.name(), "forwarded"),
            Err(_) => {
                warn!(%call, "forwarded: the agent has stopped, and no other one has started in time");
                self.report(call, BypassReason::AgentAway);
            }
        }
        None
    }

    fn report(&self, call: &StopCall, why: BypassReason) {
        bypass_report::send(&self.agent, call.to_wire(), why);
    }

    /// Waits for the end of a hold, also across agents. The terms of the first agent stay in force.
    async fn until_released(
        &self,
        call: &StopCall,
        request: &HoldRequest,
        mut lines: JsonLines<HoldMessage>,
    ) -> HoldEnd {
        let resumed = HoldRequest {
            resumed: true,
            ..request.clone()
        };
        loop {
            let end = next_message(lines, call).await;
            if end != HoldEnd::Released(ReleaseReason::Shutdown) {
                return end;
            }
            self.stops.record(BootTime::now());
            if self.restart_within.is_zero() {
                return end;
            }
            debug!(%call, within = ?self.restart_within, "the agent stops: waiting for the next agent");
            match timeout(self.restart_within, self.ask_successor(&resumed)).await {
                Ok(Ok((_, again))) => lines = again,
                Ok(Err(end)) => return end,
                Err(_) => return end,
            }
        }
    }

    /// Sends hold requests until an agent holds the call, or the reason not to hold it (any longer).
    async fn ask_successor(
        &self,
        request: &HoldRequest,
    ) -> Result<(HoldTerms, JsonLines<HoldMessage>), HoldEnd> {
        loop {
            sleep(ASK_AGAIN).await;
            let first = timeout(FIRST_MESSAGE_WITHIN, ask(&self.agent, request)).await;
            // Else the old agent is still stopping, or the next one is not ready yet.
            if let Ok(Ok((Some(message), lines))) = first {
                match HoldTerms::of(message) {
                    Ok(terms) => return Ok((terms, lines)),
                    Err(HoldEnd::Released(ReleaseReason::Shutdown)) => {}
                    Err(end) => return Err(end),
                }
            }
        }
    }
}

/// The agent's first answer to a hold request.
enum FirstAnswer {
    /// It holds the call.
    Held(HoldTerms, JsonLines<HoldMessage>),
    /// It does not, or there is none that answers.
    NotHeld,
    /// It stops or has stopped. The next agent may come until this time.
    AgentStops { until: BootTime },
}

/// The agent's terms for a hold.
struct HoldTerms {
    /// For the log: namespace and name if the agent has sent them, else the UID.
    pod: String,
    /// The name of the container that the call stops, if it stops one.
    container: Option<String>,
    /// The latest time of the release.
    deadline: BootTime,
    /// The part of the timeout to leave for the application.
    reserve: Duration,
    /// Whether the hold may exceed the timeout.
    extended: bool,
}

impl HoldTerms {
    /// The terms in an agent's first message, or why the call is not held.
    fn of(message: HoldMessage) -> Result<Self, HoldEnd> {
        match message {
            HoldMessage::Holding {
                pod,
                deadline,
                reserve_ms,
                extended,
                names,
            } => Ok(Self {
                pod: match &names {
                    Some(names) => format!("{}/{}", names.namespace, names.pod),
                    None => pod.to_string(),
                },
                container: names.and_then(|names| names.container),
                deadline,
                reserve: Duration::from_millis(reserve_ms),
                extended,
            }),
            HoldMessage::Release { reason, .. } => Err(HoldEnd::Released(reason)),
            HoldMessage::Forward { .. } => Err(HoldEnd::Forwarded),
        }
    }
}

/// How to forward a call that is not held after `waited`: delay and forwarded timeout together must not exceed the
/// original timeout.
fn not_held(budget: TimeBudget, waited: Duration) -> HoldOutcome {
    if waited < NOT_WORTH_A_SECOND {
        return HoldOutcome::Untouched;
    }
    HoldOutcome::Delayed {
        waited,
        reserve: budget.default_reserve(),
        was_held: false,
    }
}

async fn ask(
    agent: &AgentClient,
    request: &HoldRequest,
) -> Result<(Option<HoldMessage>, JsonLines<HoldMessage>), AgentError> {
    let mut lines = agent.post_lines(HOLDS_PATH, request).await?;
    Ok((lines.next().await?, lines))
}

/// Waits for the message after `holding`.
async fn next_message(mut lines: JsonLines<HoldMessage>, call: &StopCall) -> HoldEnd {
    match lines.next().await {
        Ok(Some(HoldMessage::Release { reason, .. })) => HoldEnd::Released(reason),
        Ok(Some(HoldMessage::Forward { .. })) => HoldEnd::Forwarded,
        Ok(Some(HoldMessage::Holding { .. })) => HoldEnd::BadMessage,
        Ok(None) | Err(AgentError::Lost { .. }) => HoldEnd::AgentGone,
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            warn!(%call, error, "the agent's message is not valid");
            HoldEnd::BadMessage
        }
    }
}

/// Logs and counts the end of the hold on drop, because a caller that cancels its call drops the hold's future.
struct HoldLog<'a> {
    call: &'a StopCall,
    pod: String,
    container: Option<String>,
    arrived: BootTime,
    end: HoldEnd,
    counters: &'a ProxyCounters,
}

impl Drop for HoldLog<'_> {
    fn drop(&mut self) {
        let Self {
            call,
            pod,
            container,
            arrived,
            end,
            counters,
        } = self;
        let held = BootTime::now().since(*arrived);
        counters.hold_ended(end.name(), held);
        info!(%call, %pod, container, ?held, reason = end.name(), "hold ended");
    }
}
