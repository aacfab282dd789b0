//! The cgroups that trials run in.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};
use ebb_core::ids::CgroupId;
use ebb_testkit::{cgroup::Cgroup, sandbox};
use rustix::thread::gettid;

/// The cgroup in which the shared tracker finds a kubelet. It stays until the sandbox ends.
pub(crate) fn kubelet() -> Result<PathBuf> {
    Ok(sandbox::paths()?.cgroup("kubelet.service"))
}

const TRIALS: &str = "trials";

/// Moves this process to a cgroup below which its threads can have cgroups of their own.
pub(crate) fn enter_trials() -> Result<()> {
    let trials = sandbox::paths()?.cgroup(TRIALS);
    fs::create_dir_all(&trials)?;
    fs::write(trials.join("cgroup.procs"), "0").context("moving this process")
}

/// A cgroup of the calling thread and what it starts. It is a threaded one (cgroup-v2.rst), because the process stays in
/// that of [`enter_trials`].
pub(crate) fn of_this_thread() -> Result<Cgroup> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let cgroup = Cgroup::new(&format!("{TRIALS}/{n}"))?;
    fs::write(cgroup.path().join("cgroup.type"), "threaded").context("a threaded cgroup")?;
    let thread = gettid().as_raw_nonzero().to_string();
    fs::write(cgroup.path().join("cgroup.threads"), thread).context("moving a thread")?;
    Ok(cgroup)
}

pub(crate) fn id_of(cgroup: &Cgroup) -> Result<CgroupId> {
    Ok(CgroupId(fs::metadata(cgroup.path())?.ino()))
}
