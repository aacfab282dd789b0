//! Stops of pods that are only observed (`ebb.dev/drain: observe`): each is forwarded at once, while a drain without holds
//! shows how long it would have been held.

use std::{sync::Arc, time::Duration};

use ebb_protocol::{
    hold::{HeldCall, HoldRequest},
    views::StopView,
};
use tokio::time::timeout;

use super::{Bypass, EXITED, HoldRefusal, Holds, runs};
use crate::{drains::driver::HoldOrder, linux::sync::lock};

/// How long an observed stop or wait may take for the first dump. Without it, ebb would not see the connections of an
/// application that exits as soon as it gets the signal.
pub(in crate::server) const FIRST_DUMP_WITHIN: Duration = Duration::from_millis(100);

impl Holds {
    /// Begins a drain that is only observed, or joins it. Returns the reason to forward the stop.
    pub(super) async fn observe(
        self: &Arc<Self>,
        order: HoldOrder,
        request: &HoldRequest,
        record: StopView,
    ) -> HoldRefusal {
        let forwarded = |why, record| HoldRefusal {
            why: Bypass::because(why),
            record,
        };
        let HeldCall::StopContainer {
            container,
            timeout_ms,
        } = &request.call
        else {
            // The stops of its containers have come before.
            return forwarded("observe", Some(record));
        };
        if !runs(&order.pod, container) {
            return forwarded(EXITED, Some(record));
        }
        let order = HoldOrder {
            grace: Some(Duration::from_millis(*timeout_ms)),
            // Until it is known to be part of a termination.
            is_stop: false,
            ..order
        };
        let uid = order.pod.name.uid.clone();
        let is_known = self.is_draining(&order.pod);
        let waits = is_known && !lock(&self.unclassified).contains(&uid);
        if !is_known {
            lock(&self.unclassified).insert(uid);
        }
        let hold = self.drains.hold(order.clone()).await;
        let _ = timeout(FIRST_DUMP_WITHIN, hold.first_dump()).await;
        let (holds, request) = (Arc::clone(self), request.clone());
        tokio::spawn(async move {
            let uid = order.pod.name.uid.clone();
            tokio::select! {
                () = holds.classify_observed(order, &request, waits, record) => {}
                () = holds.drains.stopping() => {}
            }
            lock(&holds.unclassified).remove(&uid);
            // Until then, the drain goes on without a deletion that is known.
            drop(hold);
        });
        forwarded("observe", None)
    }

    /// Finds out whether a stop that has been forwarded is part of a termination. If not, its drain ends without a report.
    async fn classify_observed(
        &self,
        order: HoldOrder,
        request: &HoldRequest,
        waits: bool,
        record: StopView,
    ) {
        let HeldCall::StopContainer { container, .. } = &request.call else {
            return;
        };
        let pod = Arc::clone(&order.pod);
        let verdict = self.classify_stop(&pod, container, request, || waits).await;
        let record = match verdict {
            Ok(evidence) => {
                let order = HoldOrder {
                    is_stop: true,
                    ..order
                };
                drop(self.drains.hold(order).await);
                StopView {
                    ending: Some(true),
                    evidence: Some(evidence.into()),
                    reason: Some("observe".into()),
                    ..record
                }
            }
            Err(no) => {
                self.drains.not_terminating(&pod.name.uid);
                let why = Bypass::not_terminating(no.why);
                StopView {
                    ending: no.deleting,
                    evidence: why.evidence.map(Into::into),
                    reason: Some(why.reason.into()),
                    ..record
                }
            }
        };
        self.stops.remember(record);
    }
}
