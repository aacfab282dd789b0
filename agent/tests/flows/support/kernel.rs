//! The tracker that trials share, and the runtime it lives on.

use std::sync::{LazyLock, OnceLock};

use anyhow::{Result, ensure};
use ebb::kernel::{KernelEvent, Options, Tracker};
use libtest_mimic::Failed;
use tokio::{runtime::Runtime, sync::mpsc};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
static SHARED: OnceLock<Tracker> = OnceLock::new();

/// Waits for a future of ebb's.
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    RUNTIME.block_on(future)
}

/// Starts a tracker of the trial's own.
pub(crate) fn start() -> Result<(Tracker, mpsc::Receiver<KernelEvent>)> {
    let _inside = RUNTIME.enter();
    Ok(Tracker::start(Options::default())?)
}

/// The tracker of all trials that do not start one.
pub(crate) fn shared() -> Tracker {
    // Nobody watches anything through this one, so its events are not missed.
    SHARED.get_or_init(|| start().unwrap().0).clone()
}

/// What must hold of the shared tracker at the end: nothing lost, nothing below zero.
pub(crate) fn nothing_lost() -> Result<()> {
    let Some(tracker) = SHARED.get() else {
        return Ok(());
    };
    let losses = tracker.losses()?;
    ensure!(losses.iter().all(|n| *n == 0), "lost: {losses:?}");
    for count in tracker.counts() {
        ensure!(
            count.inbound >= 0 && count.outbound >= 0,
            "below zero: {count:?}"
        );
    }
    Ok(())
}

/// A trial's result with the whole chain of causes.
pub(crate) fn failed(result: Result<()>) -> Result<(), Failed> {
    result.map_err(|error| format!("{error:#}").into())
}
