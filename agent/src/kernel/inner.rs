//! What the clones of a [`super::Tracker`] share.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, atomic::AtomicU64},
};

use aya::maps::MapData;
use ebb_common::{Workload, WorkloadKey};

use super::{
    Netns, auditor::Auditor, kubelet::Search, nested::Nested, pod_listener::OwnPorts,
    pool::DiagPool, programs::Programs, prune::Pruner, walks::Walks, watches::Watches,
};
use crate::{ids::NetnsInode, lock::lock, pods::Scope};

pub(super) struct Inner {
    pub(super) programs: Mutex<Programs>,
    pub(super) watches: Arc<Mutex<Watches>>,
    /// Watched namespaces are kept open, so that looking works when the process they were found by is gone,
    /// and they are entered once and not for each question.
    pub(super) watched: Mutex<HashMap<NetnsInode, Arc<DiagPool>>>,
    pub(super) walks: Arc<Walks>,
    pub(super) pruner: Mutex<Pruner>,
    pub(super) kubelet: Option<Search>,
    /// Ports inside pods that are ebb's own.
    pub(super) own: Arc<OwnPorts>,
    /// See `maps::WORKLOADS`.
    pub(super) workloads: Arc<aya::maps::HashMap<MapData, WorkloadKey, Workload>>,
    /// Held for as long as an audit takes, by threads that may block.
    pub(super) auditor: Mutex<Auditor>,
    /// By how many flows audits have found the counters wrong.
    pub(super) drift: AtomicU64,
    pub(super) cgroup_root: Option<PathBuf>,
    pub(super) nested: Option<Nested>,
    pub(super) host: Arc<DiagPool>,
}

impl Inner {
    /// The namespace of `scope`, to ask.
    pub(super) fn pool(&self, scope: &Scope) -> io::Result<Arc<DiagPool>> {
        match scope {
            Scope::Netns { inode, pid } => {
                let watched = lock(&self.watched).get(inode).cloned();
                match watched {
                    Some(pool) => Ok(pool),
                    None => Ok(Arc::new(DiagPool::new(open(*inode, *pid)?))),
                }
            }
            Scope::HostNetwork(_) => Ok(Arc::clone(&self.host)),
            Scope::Untracked(why) => Err(io::Error::other(why.clone())),
        }
    }
}

/// Opens the namespace of `pid` and makes sure that it is the one that was meant: pids are reused.
pub(super) fn open(inode: NetnsInode, pid: u32) -> io::Result<Netns> {
    let netns = Netns::of_process(pid)?;
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

pub(super) fn watch_keys(scope: &Scope) -> io::Result<Vec<WorkloadKey>> {
    match scope {
        Scope::Netns { inode, .. } => Ok(vec![WorkloadKey {
            cgroup: 0,
            netns: inode.0,
            zero: 0,
        }]),
        Scope::HostNetwork(cgroups) => Ok(cgroups
            .iter()
            .map(|c| WorkloadKey {
                cgroup: c.0,
                netns: 0,
                zero: 0,
            })
            .collect()),
        Scope::Untracked(why) => Err(io::Error::other(why.clone())),
    }
}
