//! Runs code in a pod's network namespace.

use std::{fs::File, os::fd::AsFd as _, thread};

use anyhow::{Context as _, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Runs `f` on a thread in the network namespace of a process. Sockets and processes that `f` makes stay in it.
pub(crate) fn inside<T: Send>(pid: u32, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = format!("/proc/{pid}/ns/net");
    let file = File::open(&path).with_context(|| format!("can't open {path}"))?;
    let run = || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("can't enter {path}"))?;
        f()
    };
    match thread::scope(|s| s.spawn(run).join()) {
        Ok(result) => result,
        Err(_) => bail!("the thread in {path} panicked"),
    }
}
