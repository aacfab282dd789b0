//! Cgroups for trials.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::sandbox;

/// A cgroup below the sandbox's. Dropping it removes it.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes a cgroup of this name, which may be a path.
    ///
    /// # Errors
    /// If this is not [`sandbox::inside`], or the directory can't be made.
    pub fn new(name: &str) -> Result<Self> {
        let path = sandbox::paths()?.cgroup(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
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
