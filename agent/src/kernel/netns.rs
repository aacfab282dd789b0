//! Network namespaces: naming and entering them.

use std::{
    fs::{self, File, Metadata},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use ebb_common::EphemeralPorts;

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
        let file = File::open(format!("/proc/{pid}/ns/net"))?;
        let inode = inode(&file.metadata()?)?;
        Ok(Self { file, inode })
    }

    /// The inode number of the namespace that a link leads to, such as `/proc/PID/ns/net`.
    ///
    /// # Errors
    ///
    /// It can't be followed.
    pub fn inode_at(link: &Path) -> io::Result<NetnsInode> {
        inode(&fs::metadata(link)?)
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

/// The ports that the kernel gives to what dials in the calling thread's network namespace: what is below
/// /proc/sys/net depends on who asks.
pub(super) fn ephemeral_ports() -> io::Result<EphemeralPorts> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(EphemeralPorts { first, last }),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Inode numbers of nsfs are unsigned ints (`struct ns_common`, include/linux/ns_common.h).
fn inode(of: &Metadata) -> io::Result<NetnsInode> {
    let inode = u32::try_from(of.ino()).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(NetnsInode(inode))
}
