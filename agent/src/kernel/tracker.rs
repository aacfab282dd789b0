//! The door to the kernel: look at a pod's sockets, watch a pod, find a connection.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ebb_common::LOSSES;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Audit, KernelError, KernelEvent, KubeletCgroup, Look, LookUp, Netns,
    auditor::Auditor,
    close,
    earlier::{self, Earlier},
    events,
    house::keep_house,
    inner::{Inner, open, watch_keys},
    kubelet::Search,
    nested::Nested,
    pod_listener::{self, OwnPorts, PodListener},
    pool::DiagPool,
    programs::Programs,
};
use crate::{
    clock::boot_id,
    flow::{Flow, Sample},
    ids::{CgroupId, NetnsInode, SocketCookie, WatchId},
    lock::lock,
    pods::Scope,
};

/// As many events as may wait for the drains before the ring buffer itself has to hold them.
const EVENT_QUEUE: usize = 1024;

/// How to start.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Forward what the BPF programs log.
    pub bpf_log: bool,
    /// Where the kubelet's cgroup is, so that its probes are known for what they are. Without, they are flows.
    pub kubelet: Option<KubeletCgroup>,
    /// The mount of cgroup v2. Without, counters of cgroups that are gone are kept for as long as their
    /// network namespace has a process, and of cgroups that a container on the host's network makes below its own
    /// only those are known that its scope has.
    pub cgroup_root: Option<PathBuf>,
    /// Where an earlier agent has left what it knew of the flows that are open ([`Tracker::remember`]).
    pub earlier: Option<PathBuf>,
}

/// Counters of one workload, as the BPF programs keep them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkloadCount {
    /// The cgroup whose process made the sockets.
    pub cgroup: CgroupId,
    /// Their network namespace.
    pub netns: NetnsInode,
    /// Inbound flows now.
    pub inbound: i64,
    /// Inbound flows since the start.
    pub inbound_total: u64,
}

/// The running BPF programs and the questions they and the kernel answer. Cheap to clone; the programs are
/// detached when the last clone is dropped.
#[derive(Clone)]
pub struct Tracker {
    pub(super) inner: Arc<Inner>,
}

impl Tracker {
    /// Loads, attaches and seeds. Events of watched workloads arrive at the receiver.
    ///
    /// # Errors
    ///
    /// See [`KernelError`]; nothing stays attached then.
    pub fn start(options: Options) -> Result<(Self, mpsc::Receiver<KernelEvent>), KernelError> {
        // The agent itself runs on the host network: its node port has to be there.
        let host = Netns::of_process(std::process::id()).map_err(|source| KernelError::Io {
            what: "opening the agent's own network namespace".into(),
            source,
        })?;
        let earlier = options.earlier.as_deref().map(taken).unwrap_or_default();
        let mut programs = Programs::start(host.inode(), options.bpf_log, &earlier)?;
        let (to, from) = mpsc::channel(EVENT_QUEUE);
        let own = Arc::<OwnPorts>::default();
        if let Some(ring) = programs.events.take() {
            let own = Arc::clone(&own);
            let lost = Arc::clone(&programs.lost);
            tokio::spawn(async move {
                if let Err(e) = events::forward(ring, lost, own, to.clone()).await {
                    tracing::error!(
                        "reading kernel events: {e}; pods are held for the settle time alone until the agent is restarted"
                    );
                    // A closed channel would say the same, but this one is heard at once.
                    let _ = to.send(KernelEvent::Lost).await;
                }
            });
        }
        let Some(inference) = programs.inference.take() else {
            return Err(KernelError::Io {
                what: "seeding".into(),
                source: io::Error::other("came to no end"),
            });
        };
        let workloads = Arc::clone(&programs.workloads);
        let inner = Inner {
            watches: Arc::clone(&programs.watches),
            programs: Mutex::new(programs),
            auditor: Mutex::new(Auditor::new(Arc::clone(&workloads), inference)),
            workloads,
            drift: AtomicU64::new(0),
            nested: options.cgroup_root.clone().map(Nested::new),
            cgroup_root: options.cgroup_root,
            watched: Mutex::default(),
            walks: Arc::default(),
            pruner: Mutex::default(),
            kubelet: options.kubelet.map(Search::new),
            own,
            host: Arc::new(DiagPool::new(host)),
        };
        inner.find_kubelet();
        let inner = Arc::new(inner);
        tokio::spawn(keep_house(Arc::downgrade(&inner)));
        Ok((Self { inner }, from))
    }

    /// The host's network namespace.
    pub fn host_netns(&self) -> NetnsInode {
        self.inner.host.netns().inode()
    }

    /// All TCP sockets of a pod, from the kernel's tables. Walks the table of the whole node, off the async
    /// threads, together with others that ask for the same namespace meanwhile. The walk begins after the
    /// call.
    ///
    /// # Errors
    ///
    /// The pod can't be tracked, its namespace is gone, or the kernel does not answer.
    pub async fn look(&self, scope: &Scope) -> io::Result<Look> {
        let netns = match scope {
            Scope::Netns { inode, .. } => *inode,
            Scope::HostNetwork(_) => self.host_netns(),
            Scope::Untracked(why) => return Err(io::Error::other(why.clone())),
        };
        let inner = Arc::clone(&self.inner);
        let walk = move |scopes: &[Scope]| inner.walk(scopes);
        self.inner.walks.look(netns, scope.clone(), walk).await
    }

    /// Looks up single flows of a watched pod, each by its two ends, and says how many edges the kernel had
    /// counted before. Costs microseconds, whatever the number of connections on the node, unless another
    /// process keeps sock_diag busy: older kernels answer one at a time (`sock_diag_mutex`).
    ///
    /// # Errors
    ///
    /// As [`Tracker::look`], or not all of the pod is watched: it has no watch, or is on the host's network and has
    /// made cgroups since.
    pub async fn look_up(
        &self,
        scope: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> io::Result<LookUp> {
        let scope = scope.clone();
        self.blocking(move |inner| inner.look_up(&scope, &flows))
            .await
    }

    /// The connection between `local` and `remote` in the scope's namespace, if it exists.
    ///
    /// # Errors
    ///
    /// As [`Tracker::look`].
    pub async fn find(
        &self,
        scope: &Scope,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<Sample>> {
        let scope = scope.clone();
        self.blocking(move |inner| inner.pool(&scope)?.ask(|diag| diag.find(local, remote)))
            .await
    }

    /// The connection between `local` and `remote` in the host's namespace, if it exists.
    ///
    /// # Errors
    ///
    /// The kernel does not answer.
    pub async fn find_on_host(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<Sample>> {
        self.blocking(move |inner| inner.host.ask(|diag| diag.find(local, remote)))
            .await
    }

    /// Closes the reading side of `idle` flows of a pod, of those that have not moved since the look that
    /// found them idle, and returns which. Their owners then close them. Closes no more of them once this is `over`.
    ///
    /// # Errors
    ///
    /// As [`Tracker::look`]; some may have been closed by then.
    pub async fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> io::Result<Vec<SocketCookie>> {
        let scope = scope.clone();
        self.blocking(move |inner| {
            close::idle(&inner.programs, &*inner.pool(&scope)?, &idle, &over)
        })
        .await
    }

    /// Has the events of a scope reported from now on. They carry the number of this watch. Looks for the kubelet
    /// anew, in the background: a restarted service has another cgroup.
    ///
    /// # Errors
    ///
    /// The pod can't be tracked, its namespace is gone, or too many are watched already.
    pub fn watch(&self, scope: &Scope) -> io::Result<WatchId> {
        if let Scope::Netns { inode, pid } = scope {
            let pool = DiagPool::new(open(*inode, *pid)?);
            lock(&self.inner.watched).insert(*inode, Arc::new(pool));
        }
        let keys = watch_keys(scope)?;
        self.find_kubelet();
        let watching = lock(&self.inner.watches).begin(&keys);
        // What was half begun would stay: nobody ends a watch that failed.
        watching.inspect_err(|_| self.unwatch(scope))
    }

    /// Ends what [`Tracker::watch`] began. Harmless if it had not.
    pub fn unwatch(&self, scope: &Scope) {
        if let Scope::Netns { inode, .. } = scope {
            lock(&self.inner.watched).remove(inode);
        }
        let keys = watch_keys(scope).unwrap_or_default();
        if let Err(e) = lock(&self.inner.watches).end(&keys) {
            tracing::warn!("can't count the watched workloads: {e}");
        }
    }

    /// Listens on a port inside a pod's network namespace, on all its addresses. Connections to it are marked
    /// in every look ([`Sample::to_wait_port`]) and reported as no edge.
    ///
    /// # Errors
    ///
    /// The pod has no namespace of its own or is gone, or the port is taken ([`io::ErrorKind::AddrInUse`]).
    pub async fn listen_in(&self, scope: &Scope, port: u16) -> io::Result<PodListener> {
        let Scope::Netns { inode, pid } = *scope else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let opened = self
            .blocking(move |inner| {
                pod_listener::listen_in(&inner.own, &open(inode, pid)?, pid, port)
            })
            .await?;
        opened.register()
    }

    /// The counters of all workloads. Some system calls for each: nothing for an async thread.
    pub fn counts(&self) -> Vec<WorkloadCount> {
        self.inner
            .workloads
            .iter()
            .filter_map(Result::ok)
            .map(|(key, w)| WorkloadCount {
                cgroup: CgroupId(key.cgroup),
                netns: NetnsInode(key.netns),
                inbound: w.inbound,
                inbound_total: w.inbound_total,
            })
            .collect()
    }

    /// Compares the counters of a pod, or of the whole node, with the kernel's own tables, and corrects them. Off
    /// the async threads; takes a walk of the node's table for each namespace, some more where connections open
    /// and close. Who stops waiting ends it.
    ///
    /// # Errors
    ///
    /// The pod can't be tracked, or its namespace is gone.
    pub async fn audit(&self, scope: Option<&Scope>) -> io::Result<Audit> {
        let scope = scope.cloned();
        let unwanted = CancellationToken::new();
        let _wanted = unwanted.clone().drop_guard();
        self.blocking(move |inner| inner.audit(scope.as_ref(), &unwanted))
            .await
    }

    /// By how many flows audits have found the counters wrong since the start.
    pub fn drift(&self) -> u64 {
        self.inner.drift.load(Ordering::Relaxed)
    }

    /// Forgets the counters of what is gone: of workloads without flow whose namespace has no process, or whose
    /// cgroup is not there, now and at the last call. Returns how many. Done by itself every ten minutes; reads
    /// `/proc` and the directories of cgroups.
    pub fn prune(&self) -> usize {
        self.inner.prune()
    }

    /// Writes down since when each flow is open, for the next agent ([`Options::earlier`]), and returns of how many.
    /// What is not done `within` this time is left out: of those flows the next agent knows no more than that they are
    /// older than itself. Off the async threads; takes a walk of the node's table for each namespace.
    ///
    /// # Errors
    ///
    /// The file can't be written, or the kernel does not walk.
    pub async fn remember(&self, path: PathBuf, within: Duration) -> io::Result<usize> {
        self.blocking(move |inner| inner.remember(&path, within))
            .await
    }

    /// Losses since the start, by `ebb_common::LOST_…`.
    ///
    /// # Errors
    ///
    /// The map can't be read.
    pub fn losses(&self) -> Result<[u64; LOSSES], KernelError> {
        lock(&self.inner.programs).losses()
    }

    fn find_kubelet(&self) {
        if let Some(search) = &self.inner.kubelet
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
            && search.is_due()
        {
            let inner = Arc::clone(&self.inner);
            runtime.spawn_blocking(move || inner.find_kubelet());
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || f(&inner))
            .await
            .unwrap_or_else(|e| Err(io::Error::other(e)))
    }
}

/// What an earlier agent has left. Worth a warning, never a failed start.
fn taken(path: &Path) -> Earlier {
    let taken = boot_id().and_then(|boot| earlier::take(path, &boot));
    taken.unwrap_or_else(|e| {
        tracing::warn!(
            "can't read {}: {e}; flows are as old as this agent",
            path.display()
        );
        Earlier::new()
    })
}
