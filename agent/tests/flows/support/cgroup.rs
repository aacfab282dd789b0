//! A cgroup of a trial's own.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result};
use ebb::ids::CgroupId;
use rustix::thread::gettid;

/// The cgroup in which the tracker that trials share finds a kubelet. It stays until the sandbox goes.
pub(crate) fn kubelet() -> Result<PathBuf> {
    Ok(ebb_node::sandbox::place()?.cgroup("kubelet.service"))
}

const TRIALS: &str = "trials";

/// Moves this process to where its threads can have cgroups of their own.
pub(crate) fn of_trials() -> Result<()> {
    let trials = ebb_node::sandbox::place()?.cgroup(TRIALS);
    fs::create_dir_all(&trials)?;
    fs::write(trials.join("cgroup.procs"), "0").context("moving this process")
}

/// A directory below the sandbox's cgroup, removed when dropped.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let path = ebb_node::sandbox::place()?.cgroup(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    /// One that has only the calling thread, and what that starts: the threads of a process in
    /// [`of_trials`] may be in different ones of this type (threaded ones, cgroup-v2.rst).
    pub(crate) fn of_this_thread() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup = Self::new(&format!("{TRIALS}/{n}"))?;
        fs::write(cgroup.0.join("cgroup.type"), "threaded").context("a cgroup of threads")?;
        let thread = gettid().as_raw_nonzero().to_string();
        fs::write(cgroup.0.join("cgroup.threads"), thread).context("moving a thread")?;
        Ok(cgroup)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn id(&self) -> Result<CgroupId> {
        Ok(CgroupId(fs::metadata(&self.0)?.ino()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Busy for a moment after its last process was reaped; the sandbox removes what is left.
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            sleep(Duration::from_millis(10));
        }
    }
}
