//! One tracker and one driver of drains for all trials.

use std::{
    path::PathBuf,
    sync::{Arc, LazyLock, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drains::driver::{DrainHandle, Drains, Hold, HoldOrder},
    kernel::{KubeletCgroup, Tracker, TrackerOptions},
};
use ebb_common::LOSSES;
use ebb_core::{
    drain_report::{ReleaseReason, Report},
    policy::{IdleFlows, Policy, Until},
};
use ebb_testkit::trial::step;
use tokio::{runtime::Runtime, sync::mpsc, time::timeout};

/// Short, so that trials are short. The results hold for any value.
pub(crate) const IDLE_AFTER: Duration = Duration::from_millis(500);
/// The limit for what must happen.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// Where the tracker and the driver run.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
static SHARED: OnceLock<(Tracker, DrainHandle)> = OnceLock::new();

/// The tracker and the driver.
pub(crate) fn shared() -> &'static (Tracker, DrainHandle) {
    SHARED.get_or_init(|| {
        step("starting the tracker");
        let _inside = RUNTIME.enter();
        let root = PathBuf::from("/sys/fs/cgroup");
        let options = TrackerOptions {
            kubelet: Some(KubeletCgroup {
                root: root.clone(),
                named: None,
            }),
            cgroup_root: Some(root),
            ..TrackerOptions::default()
        };
        let (tracker, events) = Tracker::start(options).unwrap();
        let (notices, _) = mpsc::unbounded_channel();
        let drains = Drains::spawn(Arc::new(tracker.clone()), events, None, notices);
        (tracker, drains)
    })
}

/// Demands that the tracker has lost nothing.
pub(crate) fn lost_nothing() -> Result<()> {
    if let Some((tracker, _)) = SHARED.get() {
        let losses = tracker.losses()?;
        ensure!(losses == [0; LOSSES], "lost: {losses:?}");
    }
    Ok(())
}

/// The usual policy of trials: `until: idle` after a short settle phase.
pub(crate) fn until_idle() -> Policy {
    Policy {
        until: Until::Idle,
        quiet: Duration::from_millis(50),
        settle_max: Duration::from_millis(500),
        idle_after: IDLE_AFTER,
        ..Policy::default()
    }
}

/// As [`until_idle`], but the drain closes idle flows and waits for their end.
pub(crate) fn closing() -> Policy {
    Policy {
        until: Until::Zero,
        idle_flows: IdleFlows::Close,
        ..until_idle()
    }
}

pub(crate) async fn drain(pod: ebb::pods::Pod, policy: Policy) -> Drain {
    let order = HoldOrder {
        pod: Arc::new(pod),
        policy,
        warnings: vec![],
        grace: Some(Duration::from_secs(60)),
        rpc_timeout: None,
        deletion: None,
        is_stop: true,
        is_not_deleted: false,
        is_unanswered: false,
        traceparent: None,
        is_listed: true,
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

    /// Demands that the pod stays held for as long as `lasting`.
    pub(crate) async fn stays_held(&self, lasting: Duration) -> Result<()> {
        step("checking that the hold stays");
        let over = timeout(lasting, self.0.released()).await;
        ensure!(over.is_err(), "released: {:?}", over.ok());
        Ok(())
    }

    /// Waits for the release, whatever its reason.
    pub(crate) async fn released(&self) -> Result<Arc<Report>> {
        step("waiting for a release");
        timeout(TIMEOUT, self.0.released())
            .await
            .context("still held")
    }

    /// Waits for a release as drained, with this number of flows still open.
    pub(crate) async fn drained(&self, open: u32) -> Result<Arc<Report>> {
        let report = self.released().await?;
        ensure!(
            report.reason == Some(ReleaseReason::Drained) && report.cut_total == Some(open),
            "{report:#?}"
        );
        Ok(report)
    }
}
