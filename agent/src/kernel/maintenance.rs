//! Periodic work: searching for the kubelet's cgroup again, and removing the counters of workloads that are gone.

use std::{sync::Weak, time::Duration};

use ebb_core::clock::BootTime;

use super::tracker::TrackerState;

/// How often. A restarted kubelet has another cgroup; each new watch searches for it as well.
const EVERY: Duration = Duration::from_secs(600);

/// Runs until the tracker is dropped.
pub(super) async fn run(state: Weak<TrackerState>) {
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(state) = state.upgrade() else {
            return;
        };
        // It fails only if it panics, which is logged. The next round may succeed.
        let _ = tokio::task::spawn_blocking(move || {
            state.find_kubelet();
            if let Err(e) = state.remove_gone_workloads(BootTime::now()) {
                tracing::warn!("can't remove the counters of workloads that are gone: {e}");
            }
        })
        .await;
    }
}
