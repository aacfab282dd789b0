//! Network namespaces for trials.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::{sandbox, trial};

/// A network namespace with loopback up. It ends with its last handle, process and socket.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Makes one, on a thread that ends at once.
    ///
    /// # Errors
    /// If the process is not root, or the kernel refuses.
    pub fn new() -> Result<Self> {
        on_a_thread(|| {
            unshare_network()?;
            sandbox::loopback_up()?;
            let file = File::open("/proc/thread-self/ns/net")?;
            Ok(Self { file })
        })
        .context("making a network namespace")
    }

    /// Runs `f` inside, on a thread of its own. The sockets and processes that `f` makes stay inside.
    ///
    /// # Errors
    /// Those of `f`, and its panic.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
            f()
        })
    }
}

#[expect(
    unsafe_code,
    reason = "the safe call is deprecated, for flags that are not used here"
)]
fn unshare_network() -> Result<()> {
    // SAFETY: unsafe for file descriptor tables, which NEWNET leaves alone.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

fn on_a_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|s| {
        trial::thread_builder()
            .spawn_scoped(s, f)?
            .join()
            .unwrap_or_else(|panic| match panic.downcast_ref::<String>() {
                Some(text) => Err(anyhow!("panicked: {text}")),
                None => Err(anyhow!("panicked")),
            })
    })
}

/// Sets a sysctl of the calling thread's namespace.
///
/// # Errors
/// If this kernel has no such sysctl. The error names it.
pub fn sysctl(name: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/net/{name}"), value)
        .with_context(|| format!("this kernel can't do the case: setting net/{name}={value}"))
}

/// Runs iproute2's `ip` in the calling thread's namespace.
///
/// # Errors
/// If it fails, with what it printed.
pub fn ip(arguments: &str) -> Result<()> {
    let out = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("starting ip")?;
    let error = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "ip {arguments}: {}", error.trim());
    Ok(())
}
