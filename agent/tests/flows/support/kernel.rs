//! The tracker that trials share, and the runtime it lives on.

use std::{
    panic::Location,
    path::{Path, PathBuf},
    sync::{LazyLock, OnceLock},
};

use anyhow::{Result, ensure};
use ebb::kernel::{KernelEvent, KubeletCgroup, Tracker, TrackerOptions};
use ebb_common::LOSSES;
use ebb_testkit::trial::step;
use tokio::{runtime::Runtime, sync::mpsc};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
static SHARED: OnceLock<Tracker> = OnceLock::new();

/// Waits for a future of ebb's.
#[track_caller]
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    step(Location::caller());
    RUNTIME.block_on(future)
}

/// Starts a tracker for one trial.
pub(crate) fn start() -> Result<(Tracker, mpsc::Receiver<KernelEvent>)> {
    start_with_kubelet(None)
}

/// Starts a tracker for one trial. The kubelet's cgroup is this one, else the one that the tracker finds.
pub(crate) fn start_with_kubelet(
    kubelet: Option<&Path>,
) -> Result<(Tracker, mpsc::Receiver<KernelEvent>)> {
    let root = PathBuf::from("/sys/fs/cgroup");
    let named = kubelet
        .map(|path| path.strip_prefix(&root).map(Into::into))
        .transpose()?;
    let _inside = RUNTIME.enter();
    Ok(Tracker::start(TrackerOptions {
        kubelet: Some(KubeletCgroup {
            root: root.clone(),
            named,
        }),
        cgroup_root: Some(root),
        ..TrackerOptions::default()
    })?)
}

/// The tracker of all trials that do not start one.
pub(crate) fn shared() -> Tracker {
    // The tracker looks for it by name when it starts.
    std::fs::create_dir_all(super::cgroup::kubelet().unwrap()).unwrap();
    // No trial watches a pod through this one, so its events are not needed.
    SHARED
        .get_or_init(|| start().unwrap_or_else(|e| panic!("{e:#}")).0)
        .clone()
}

/// Demands that the shared tracker has lost nothing.
pub(crate) fn shared_lost_nothing() -> Result<()> {
    let Some(tracker) = SHARED.get() else {
        return Ok(());
    };
    eprintln!("{} state changes missed", tracker.missed_changes()?);
    lost_nothing(tracker)
}

/// Demands that this tracker has lost nothing.
pub(crate) fn lost_nothing(tracker: &Tracker) -> Result<()> {
    let losses = tracker.losses()?;
    ensure!(losses == [0; LOSSES], "lost: {losses:?}");
    Ok(())
}
