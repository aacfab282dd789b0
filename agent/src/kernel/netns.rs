//! Network namespaces: naming and entering them.

use std::{
    fs::File,
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::PathBuf,
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::ids::NetnsInode;

/// An open network namespace. It lives on as long as this handle, so handles are kept short.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: NetnsInode,
}

impl Netns {
    /// The namespace that process `pid` lives in.
    ///
    /// # Errors
    ///
    /// The process is gone, or may not be looked into.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let file = File::open(PathBuf::from(format!("/proc/{pid}/ns/net")))?;
        let inode = file.metadata()?.ino();
        let inode = u32::try_from(inode).map_err(io::Error::other)?;
        Ok(Self {
            file,
            inode: NetnsInode(inode),
        })
    }

    /// Its inode number.
    pub const fn inode(&self) -> NetnsInode {
        self.inode
    }

    /// Runs `f` inside the namespace, on a thread that is not used for anything else: a thread that could
    /// not get back would be worse than the few microseconds that a new one costs.
    ///
    /// # Errors
    ///
    /// The namespace can't be entered (CAP_SYS_ADMIN is missing), or what `f` fails with.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        thread::scope(|s| {
            thread::Builder::new()
                .name("ebb-netns".into())
                .spawn_scoped(s, || {
                    move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                    f()
                })?
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }
}

/// All network namespaces that a process lives in, each once.
pub(super) fn all() -> Vec<Netns> {
    let mut found = std::collections::HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|n| n.parse().ok());
        // Processes end while we look: those are skipped.
        if let Some(netns) = pid.and_then(|pid| Netns::of_process(pid).ok()) {
            found.entry(netns.inode).or_insert(netns);
        }
    }
    found.into_values().collect()
}
