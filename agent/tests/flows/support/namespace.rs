//! A network namespace that goes with its last handle, process and socket.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use ebb::{ids::NetnsInode, pods::Scope};
use rustix::{
    net::{AddressFamily, SocketType, socket},
    thread::{LinkNameSpaceType, gettid, move_into_link_name_space},
};

use super::{raw, steps};

/// An open namespace with loopback up.
pub(crate) struct Namespace {
    file: File,
}

impl Namespace {
    /// Makes one, on a thread that ends at once.
    pub(crate) fn new() -> Result<Self> {
        on_a_thread(|| {
            raw::unshare_network()?;
            let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            raw::loopback_up(any.as_raw_fd())?;
            let file = File::open("/proc/thread-self/ns/net")?;
            Ok(Self { file })
        })
        .context("making a network namespace")
    }

    /// Runs `f` on a thread of its own inside. Sockets and processes that it makes stay inside.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
            f()
        })
    }
}

fn on_a_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|s| {
        steps::builder()
            .spawn_scoped(s, f)?
            .join()
            .unwrap_or_else(|panic| match panic.downcast_ref::<String>() {
                Some(text) => Err(anyhow!("panicked: {text}")),
                None => Err(anyhow!("panicked")),
            })
    })
}

/// The calling thread's namespace as a scope: `/proc` has an entry for each thread.
pub(crate) fn scope_of_this_thread() -> Result<Scope> {
    Ok(Scope::Netns {
        inode: NetnsInode(fs::metadata("/proc/thread-self/ns/net")?.ino().try_into()?),
        pid: gettid().as_raw_nonzero().get().try_into()?,
    })
}

/// Sets a sysctl of the calling thread's namespace. A kernel that can't do it fails the trial, by name.
pub(crate) fn sysctl(name: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/net/{name}"), value)
        .with_context(|| format!("this kernel can't do the case: setting net/{name}={value}"))
}
