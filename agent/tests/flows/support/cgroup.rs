//! A cgroup of a trial's own.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result};
use ebb::ids::CgroupId;

/// A directory below the sandbox's cgroup, removed when dropped.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let path = ebb_node::sandbox::place()?.cgroup(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
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
