//! The tracker that trials share, and the runtime it lives on.

use std::{
    panic::Location,
    path::PathBuf,
    sync::{
        LazyLock, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Result, ensure};
use ebb::{
    kernel::{KernelEvent, KubeletCgroup, Options, Tracker},
    pods::Scope,
};
use ebb_common::{LOSSES, LOST_STORAGE};
use tokio::{runtime::Runtime, sync::mpsc};

use super::steps::step;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
static SHARED: OnceLock<Tracker> = OnceLock::new();

/// Sockets whose record found no memory, on purpose: a loss to all trackers.
pub(crate) static STARVED: AtomicU64 = AtomicU64::new(0);

/// Waits for a future of ebb's.
#[track_caller]
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    step(Location::caller());
    RUNTIME.block_on(future)
}

/// Starts a tracker of the trial's own.
pub(crate) fn start() -> Result<(Tracker, mpsc::Receiver<KernelEvent>)> {
    start_knowing(None)
}

/// Likewise, with a kubelet in this cgroup of the sandbox, or wherever one is found.
pub(crate) fn start_knowing(
    kubelet: Option<PathBuf>,
) -> Result<(Tracker, mpsc::Receiver<KernelEvent>)> {
    let root = "/sys/fs/cgroup";
    let named = kubelet
        .map(|path| path.strip_prefix(root).map(Into::into))
        .transpose()?;
    start_with(Options {
        kubelet: Some(KubeletCgroup {
            root: root.into(),
            named,
        }),
        cgroup_root: Some(root.into()),
        ..Options::default()
    })
}

/// Likewise, not as usual.
pub(crate) fn start_with(options: Options) -> Result<(Tracker, mpsc::Receiver<KernelEvent>)> {
    let _inside = RUNTIME.enter();
    Ok(Tracker::start(options)?)
}

/// The tracker of all trials that do not start one.
pub(crate) fn shared() -> Tracker {
    // What it finds by its name when it starts.
    std::fs::create_dir_all(super::cgroup::kubelet().unwrap()).unwrap();
    // Nobody watches anything through this one, so its events are not missed.
    SHARED.get_or_init(|| start().unwrap().0).clone()
}

/// What must hold of the shared tracker at the end: nothing lost, nothing below zero.
pub(crate) fn nothing_lost() -> Result<()> {
    let Some(tracker) = SHARED.get() else {
        return Ok(());
    };
    let mut wanted = [0; LOSSES];
    wanted[LOST_STORAGE as usize] = STARVED.load(Ordering::Relaxed);
    let losses = tracker.losses()?;
    ensure!(losses == wanted, "lost: {losses:?}, wanted: {wanted:?}");
    right(tracker, None)
}

/// What must hold of a trial's own tracker in the end: the counters of `scope` are right and none were ever found
/// wrong, and nothing is lost but what a trial beside it may have starved.
pub(crate) fn exact(tracker: &Tracker, scope: Option<&Scope>) -> Result<()> {
    let losses = tracker.losses()?;
    let mut wanted = [0; LOSSES];
    wanted[LOST_STORAGE as usize] =
        losses[LOST_STORAGE as usize].min(STARVED.load(Ordering::Relaxed));
    ensure!(losses == wanted, "lost: {losses:?}");
    right(tracker, scope)
}

fn right(tracker: &Tracker, scope: Option<&Scope>) -> Result<()> {
    let found = wait(tracker.audit(scope))?;
    ensure!(
        found.drift == 0 && tracker.drift() == 0,
        "drift: {found:?}, {} in all",
        tracker.drift()
    );
    for count in tracker.counts() {
        ensure!(count.inbound >= 0, "below zero: {count:?}");
    }
    Ok(())
}
