//! One tracker and one driver of drains for all trials.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::{
        driver::{DrainHandle, Drains, Hold, HoldOrder},
        policy::{IdleFlows, Policy, Until},
        report::{ReleaseReason, Report},
    },
    kernel::Tracker,
};
use tokio::{sync::mpsc, time::timeout};

use super::{kernel, steps::step};

/// Short, so that trials are; what is said of it holds for any.
pub(crate) const IDLE_AFTER: Duration = Duration::from_millis(500);
/// How long anything may take that has to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

static SHARED: OnceLock<(Tracker, DrainHandle)> = OnceLock::new();

/// The tracker and the driver.
pub(crate) fn shared() -> &'static (Tracker, DrainHandle) {
    SHARED.get_or_init(|| {
        let (tracker, events) = kernel::start().unwrap();
        // Nobody listens for notices.
        let (notices, _) = mpsc::unbounded_channel();
        let kernel = Arc::new(tracker.clone());
        let drains = kernel::wait(async { Drains::spawn(kernel, events, None, notices) });
        (tracker, drains)
    })
}

/// What must hold of the tracker at the end: its counters are right and always were, and it has lost nothing.
pub(crate) fn nothing_lost() -> Result<()> {
    SHARED
        .get()
        .map_or(Ok(()), |(tracker, _)| kernel::exact(tracker, None))
}

/// What trials drain with, unless they say otherwise: little settling, and idle is enough.
pub(crate) fn until_idle() -> Policy {
    Policy {
        until: Until::Idle,
        quiet: Duration::from_millis(50),
        settle_max: Duration::from_millis(500),
        idle_after: IDLE_AFTER,
        ..Policy::default()
    }
}

/// As [`until_idle`], but closes idle flows and waits for their end.
pub(crate) fn closing() -> Policy {
    Policy {
        until: Until::Zero,
        idle_flows: IdleFlows::Close,
        ..until_idle()
    }
}

/// Begins a drain of a pod.
pub(crate) async fn drain(pod: ebb::pods::Pod, policy: Policy) -> Drain {
    let order = HoldOrder {
        pod: Arc::new(pod),
        policy,
        warnings: vec![],
        grace: Some(Duration::from_secs(60)),
        patience: None,
        deleted: None,
    };
    step("beginning a drain");
    Drain(shared().1.hold(order).await)
}

/// A drain under way.
pub(crate) struct Drain(Hold);

impl Drain {
    /// Demands that the pod is still held.
    pub(crate) async fn is_held(&self) -> Result<()> {
        let over = timeout(Duration::from_millis(1), self.0.released()).await;
        ensure!(over.is_err(), "released: {:?}", over.ok());
        Ok(())
    }

    /// Demands that it stays held for so long.
    pub(crate) async fn stays_held(&self, lasting: Duration) -> Result<()> {
        step("waiting for nothing to be released");
        let over = timeout(lasting, self.0.released()).await;
        ensure!(over.is_err(), "released: {:?}", over.ok());
        Ok(())
    }

    /// Waits for its end, whatever it is.
    pub(crate) async fn over(&self) -> Result<Arc<Report>> {
        step("waiting for a release");
        timeout(PATIENCE, self.0.released())
            .await
            .context("still held")
    }

    /// Waits until ebb takes the pod for drained, with so many flows still open.
    pub(crate) async fn drained(&self, open: u32) -> Result<Arc<Report>> {
        let report = self.over().await?;
        ensure!(
            report.reason == Some(ReleaseReason::Drained) && report.cut_total == Some(open),
            "{report:#?}"
        );
        Ok(report)
    }
}
