//! The notifications of a drain: when to send which. Each is sent once, one after the other.

use crate::{
    drain_report::Phase,
    notification::{Notification, NotificationOutcome, Notified, RequestReport},
    policy::Policy,
};

/// The notifications of a drain.
#[derive(Debug, Default)]
pub(super) struct Notifying {
    /// The pod is known to end, and its stop is held. Without that, nothing is sent, because a hook also runs for the
    /// restart of a container.
    pub(super) is_stopping: bool,
    /// One was sent, and its outcome is not known yet.
    under_way: bool,
    /// What was sent, also by an earlier agent.
    pub(super) notified: Notified,
}

impl Notifying {
    /// The next notification, which counts as sent from now on. The request comes before the signal.
    pub(super) fn next(&mut self, policy: &Policy, phase: Phase) -> Option<Notification> {
        if !self.is_stopping || self.under_way {
            return None;
        }
        let is_settled = phase == Phase::Drain;
        if let Some(request) = &policy.on_drain
            && (is_settled || !request.after_settle)
            && self.notified.request.is_none()
        {
            self.under_way = true;
            self.notified.request = Some(RequestReport {
                request: request.to_string(),
                status: None,
                error: None,
            });
            return Some(Notification::Request(request.clone()));
        }
        if is_settled && !policy.stop_signals.is_empty() && self.notified.signals.is_none() {
            self.under_way = true;
            self.notified.signals = Some(vec![]);
            let signals = policy.stop_signals.clone();
            return Some(Notification::Signal(signals, policy.stop_signal_to));
        }
        None
    }

    /// The outcome of the last one.
    pub(super) fn ended(&mut self, outcome: NotificationOutcome) {
        self.under_way = false;
        match outcome {
            NotificationOutcome::Signaled(reports) => self.notified.signals = Some(reports),
            NotificationOutcome::Requested(outcome) => {
                if let Some(request) = &mut self.notified.request {
                    request.status = outcome.as_ref().ok().copied();
                    request.error = outcome.err();
                }
            }
        }
    }

    /// Whether a notification is under way. A drain that could end waits for its outcome, so that the report has it,
    /// and so that the stop comes after the signal.
    pub(super) const fn is_under_way(&self) -> bool {
        self.under_way
    }
}
