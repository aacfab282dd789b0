//! Identifies and enters network namespaces.

use std::{
    fs::{self, File, Metadata},
    io,
    ops::RangeInclusive,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::mpsc,
    thread,
};

use ebb_core::ids::NetnsInode;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

/// An open network namespace. The handle keeps the namespace alive, so do not keep it longer than needed.
#[derive(Debug)]
pub struct Netns {
    file: File,
    inode: NetnsInode,
}

impl Netns {
    /// Opens the namespace of process `pid`.
    ///
    /// # Errors
    ///
    /// The process is gone, or access to it is denied.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/ns/net"))?;
        let inode = inode(&file.metadata()?)?;
        Ok(Self { file, inode })
    }

    /// Opens the namespace of process `pid`, and checks that it is `inode`, because pids are reused.
    pub(crate) fn open(inode: NetnsInode, pid: u32) -> io::Result<Self> {
        let netns = Self::of_process(pid)?;
        if netns.inode() == inode {
            Ok(netns)
        } else {
            Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "process {pid} is no longer in network namespace {}",
                    inode.0
                ),
            ))
        }
    }

    /// Whether process `pid` is gone, or is not in the namespace `inode`, because the pid was reused. False if that can't
    /// be told.
    pub(crate) fn is_gone(inode: NetnsInode, pid: u32) -> bool {
        // A process that has exited and is not reaped has no namespace.
        Self::open(inode, pid).is_err_and(|e| {
            let gone = [rustix::io::Errno::NOENT, rustix::io::Errno::SRCH];
            e.kind() == io::ErrorKind::NotFound
                || gone
                    .iter()
                    .any(|errno| e.raw_os_error() == Some(errno.raw_os_error()))
        })
    }

    /// The inode number of the namespace that a link such as `/proc/PID/ns/net` leads to.
    ///
    /// # Errors
    ///
    /// The link can't be followed.
    pub fn inode_at(link: &Path) -> io::Result<NetnsInode> {
        inode(&fs::metadata(link)?)
    }

    /// The inode number of the namespace.
    pub const fn inode(&self) -> NetnsInode {
        self.inode
    }

    /// Runs `f` inside the namespace on a new thread. That costs some microseconds, but a shared thread might fail to
    /// return to its own namespace.
    ///
    /// # Errors
    ///
    /// The namespace can't be entered (CAP_SYS_ADMIN is missing), or `f` fails.
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

/// A thread that stays in a network namespace, for work that should not wait for a new thread. Dropping the handle
/// ends it.
#[derive(Debug)]
pub(crate) struct NetnsThread {
    work: mpsc::Sender<Work>,
}

type Work = Box<dyn FnOnce() + Send>;

impl NetnsThread {
    /// # Errors
    ///
    /// The namespace can't be entered (CAP_SYS_ADMIN is missing), or no thread can be started.
    pub(crate) fn start(netns: &Netns) -> io::Result<Self> {
        let file = netns.file.try_clone()?;
        let (work, queue) = mpsc::channel::<Work>();
        let (entered, is_inside) = mpsc::channel();
        thread::Builder::new()
            .name("ebb-netns".into())
            .spawn(move || {
                let network = Some(LinkNameSpaceType::Network);
                let inside = move_into_link_name_space(file.as_fd(), network);
                let is_inside = inside.is_ok();
                let _ = entered.send(inside);
                drop(file);
                if is_inside {
                    for work in queue {
                        // The hook of the panic has logged it, and the caller gets an error.
                        let _ = catch_unwind(AssertUnwindSafe(work));
                    }
                }
            })?;
        is_inside.recv().map_err(io::Error::other)??;
        Ok(Self { work })
    }

    /// Runs `f` on the thread, after earlier calls.
    ///
    /// # Errors
    ///
    /// `f` panicked. The thread goes on with the next call: the one of the host lasts as long as the agent.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (result, received) = oneshot::channel();
        let work: Work = Box::new(move || drop(result.send(f())));
        let gone = || io::Error::other("the thread in the namespace panicked");
        self.work.send(work).map_err(|_| gone())?;
        received.await.map_err(|_| gone())
    }
}

/// The ephemeral ports of the calling thread's network namespace, which is the one that /proc/sys/net shows.
pub(crate) fn ephemeral_ports() -> io::Result<RangeInclusive<u16>> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(first..=last),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether servers in the calling thread's network namespace may use TCP fast open. Such a connection may carry data
/// before the state change that opens it (Documentation/networking/ip-sysctl.rst, `tcp_fastopen`).
pub(crate) fn fast_open_servers() -> io::Result<bool> {
    const SERVER: u32 = 2;
    let text = fs::read_to_string("/proc/sys/net/ipv4/tcp_fastopen")?;
    let bits: u32 = text
        .trim()
        .parse()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(bits & SERVER != 0)
}

/// Inode numbers of nsfs fit in 32 bits (`struct ns_common`, include/linux/ns_common.h).
fn inode(of: &Metadata) -> io::Result<NetnsInode> {
    let inode = u32::try_from(of.ino()).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(NetnsInode(inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_runs_its_work_in_the_namespace_also_after_a_panic() {
        let own = Netns::of_process(std::process::id()).unwrap();
        let thread = NetnsThread::start(&own).unwrap();
        let link = Path::new("/proc/thread-self/ns/net");
        let inside = thread.run(|| Netns::inode_at(link)).await.unwrap();
        assert_eq!(inside.unwrap(), own.inode());
        assert_eq!(thread.run(|| 7).await.unwrap(), 7);
        let panicked = thread.run(|| panic!("as the test says")).await;
        assert!(panicked.is_err());
        let inside = thread.run(|| Netns::inode_at(link)).await.unwrap();
        assert_eq!(inside.unwrap(), own.inode());
    }
}
