//! The API of the kernel module: dump a pod's sockets, watch a pod, find a connection.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use ebb_common::LOSSES;
use ebb_core::{
    arrivals::Arrivals,
    clock::BootTime,
    flow::{Flow, Sample},
    ids::{CgroupId, NetnsInode, SocketCookie, WatchId},
    scope::Scope,
};
use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    FlowLookUp, KernelError, KernelEvent, KubeletCgroup, LookUpFailure, SocketDump, WorkloadCount,
    close,
    dump_limiter::DumpLimiter,
    events,
    gone_workloads::GoneWorkloads,
    inspector::Inspected,
    kubelet::KubeletSearch,
    maintenance,
    open_counts::OpenCounts,
    pod_listener::{self, OwnPorts, PodListener},
    programs::Programs,
    watches::watch_keys,
};
use crate::linux::{
    cgroup_descendants::CgroupDescendants,
    netns::{Netns, NetnsThread},
    sync::lock,
};

/// How many events may wait for the receiver. Further events wait in the ring buffer.
const EVENT_QUEUE: usize = 1024;

/// How to start a [`Tracker`].
#[derive(Clone, Debug, Default)]
pub struct TrackerOptions {
    /// Forward the log of the BPF programs.
    pub bpf_log: bool,
    /// Where to search for the kubelet's cgroup, by which ebb recognises probes. Without it, probes count as flows.
    pub kubelet: Option<KubeletCgroup>,
    /// The mount of cgroup v2. Without it, ebb misses cgroups that a container on the host's network creates below its
    /// own after its scope was read, and keeps the counters of workloads that are gone.
    pub cgroup_root: Option<PathBuf>,
}

/// What the clones of a [`Tracker`] and its background tasks share.
pub(super) struct TrackerState {
    pub(super) programs: Programs,
    /// When the programs began to count.
    pub(super) started: BootTime,
    /// The namespaces of watched pods. Kept open, because the process that a namespace was opened through may exit.
    watched: Mutex<HashMap<NetnsInode, WatchedNetns>>,
    pub(super) open_counts: OpenCounts,
    dumps: Arc<DumpLimiter>,
    kubelet: Option<KubeletSearch>,
    pub(super) own_ports: Arc<OwnPorts>,
    pub(super) gone_workloads: Mutex<GoneWorkloads>,
    pub(super) cgroup_root: Option<PathBuf>,
    descendants: Option<CgroupDescendants>,
    pub(super) host: Arc<Netns>,
    pub(super) host_thread: Arc<NetnsThread>,
}

/// The namespace of a watched pod.
#[derive(Clone)]
struct WatchedNetns {
    netns: Arc<Netns>,
    thread: Arc<NetnsThread>,
}

impl TrackerState {
    /// The thread that looks up flows of a watched pod.
    fn thread(&self, scope: &Scope) -> io::Result<Arc<NetnsThread>> {
        match scope {
            Scope::Netns { inode, .. } => {
                let watched = lock(&self.watched).get(inode).cloned();
                watched
                    .map(|watched| watched.thread)
                    .ok_or_else(|| io::Error::other("the pod is not watched"))
            }
            Scope::HostNetwork(_) => Ok(Arc::clone(&self.host_thread)),
            Scope::Untracked(why) => Err(io::Error::other(why.clone())),
        }
    }

    pub(super) fn netns(&self, scope: &Scope) -> io::Result<Arc<Netns>> {
        match scope {
            Scope::Netns { inode, pid } => {
                let watched = lock(&self.watched).get(inode).cloned();
                match watched {
                    Some(watched) => Ok(watched.netns),
                    None => Ok(Arc::new(Netns::open(*inode, *pid)?)),
                }
            }
            Scope::HostNetwork(_) => Ok(Arc::clone(&self.host)),
            Scope::Untracked(why) => Err(io::Error::other(why.clone())),
        }
    }

    /// Searches for the kubelet's cgroups, and gives them to `track`. Blocking.
    pub(super) fn find_kubelet(&self) {
        if let Some(search) = &self.kubelet {
            search.run();
            if let Err(e) = self.programs.set_kubelet(|| search.cgroups()) {
                tracing::warn!("can't tell the BPF programs the kubelet's cgroup: {e}");
            }
        }
    }

    /// Whether the kubelet's probes are recognised.
    pub(super) fn knows_kubelet(&self) -> bool {
        let search = self.kubelet.as_ref();
        search.is_some_and(|search| !search.cgroups().is_empty())
    }

    /// Which of these connections the kubelet dialled, by the cgroup of the socket at the other end. A connection
    /// whose addresses are translated on the way has no such socket, so it is not recognised. Must run in the host's
    /// namespace.
    pub(super) fn probes(&self, connections: &[(SocketAddr, SocketAddr)]) -> io::Result<Vec<bool>> {
        let mut probes = vec![false; connections.len()];
        let search = self.kubelet.as_ref();
        let cgroups = search.map(KubeletSearch::cgroups).unwrap_or_default();
        if cgroups.is_empty() || connections.is_empty() {
            return Ok(probes);
        }
        let other_ends = connections.iter().map(|(local, remote)| (*remote, *local));
        self.programs.inspector.inspect(other_ends, |n, found| {
            if let (Inspected::Connection(other), Some(probe)) = (found, probes.get_mut(n)) {
                *probe = cgroups.contains(&other.cgroup());
            }
        })?;
        Ok(probes)
    }

    /// The scope with the cgroups that a pod on the host's network has created since the scope was read. These come
    /// last.
    pub(super) fn with_new_cgroups(&self, scope: &Scope) -> io::Result<Scope> {
        let (Scope::HostNetwork(cgroups), Some(descendants)) = (scope, &self.descendants) else {
            return Ok(scope.clone());
        };
        let mut new = descendants.with_descendants(cgroups)?;
        new.retain(|id| !cgroups.contains(id));
        let all = cgroups.iter().copied().chain(new);
        Ok(Scope::HostNetwork(all.collect::<Vec<CgroupId>>()))
    }
}

/// The running BPF programs, and the kernel's socket tables. Cheap to clone; dropping the last clone detaches the
/// programs.
#[derive(Clone)]
pub struct Tracker {
    state: Arc<TrackerState>,
}

impl Tracker {
    /// Loads and attaches the programs. The receiver gets the events of watched workloads.
    ///
    /// # Errors
    ///
    /// See [`KernelError`]; no program stays attached then.
    pub fn start(
        options: TrackerOptions,
    ) -> Result<(Self, mpsc::Receiver<KernelEvent>), KernelError> {
        // The agent runs on the host network, because its node port must be reachable there.
        let host = Netns::of_process(std::process::id()).map_err(|source| KernelError::Io {
            what: "opening the agent's own network namespace".into(),
            source,
        })?;
        let (programs, source) = Programs::start(host.inode(), options.bpf_log)?;
        let host_thread = NetnsThread::start(&host).map_err(|source| KernelError::Io {
            what: "starting a thread in the agent's own network namespace".into(),
            source,
        })?;
        let state = TrackerState {
            programs,
            started: BootTime::now(),
            watched: Mutex::default(),
            open_counts: OpenCounts::default(),
            dumps: Arc::new(DumpLimiter::new(Handle::current())),
            kubelet: options.kubelet.map(KubeletSearch::new),
            own_ports: Arc::<OwnPorts>::default(),
            gone_workloads: Mutex::default(),
            descendants: options.cgroup_root.clone().map(CgroupDescendants::new),
            cgroup_root: options.cgroup_root,
            host_thread: Arc::new(host_thread),
            host: Arc::new(host),
        };
        state.find_kubelet();
        let state = Arc::new(state);
        let (to, from) = mpsc::channel(EVENT_QUEUE);
        let forwarded = events::forward(source, Arc::downgrade(&state), to.clone());
        tokio::spawn(async move {
            if let Err(e) = forwarded.await {
                tracing::error!(
                    "reading kernel events: {e}; pods are held for the settle time alone until the agent is restarted"
                );
                // The channel closes next. This event makes the receiver resync first.
                let _ = to.send(KernelEvent::Lost).await;
            }
        });
        tokio::spawn(maintenance::run(Arc::downgrade(&state)));
        Ok((Self { state }, from))
    }

    /// The host's network namespace.
    pub fn host_netns(&self) -> NetnsInode {
        self.state.host.inode()
    }

    /// Dumps all TCP sockets of a pod from the kernel's tables. A dump visits the table of the whole node, so it runs
    /// off the async threads and concurrent callers for the same namespace share one. It starts after this call.
    ///
    /// # Errors
    ///
    /// The pod can't be tracked, its namespace is gone, or the dump fails.
    pub async fn dump(&self, scope: &Scope) -> io::Result<SocketDump> {
        let netns = match scope {
            Scope::Netns { inode, .. } => *inode,
            Scope::HostNetwork(_) => self.host_netns(),
            Scope::Untracked(why) => return Err(io::Error::other(why.clone())),
        };
        let state = Arc::clone(&self.state);
        let dump = move |scopes: &[Scope]| state.dump(scopes);
        self.state.dumps.dump(netns, scope.clone(), dump).await
    }

    /// Looks up single flows of a watched pod by their local and remote addresses. Costs microseconds, however many
    /// connections the node has.
    ///
    /// # Errors
    ///
    /// See [`LookUpFailure`]: make a dump instead.
    pub async fn look_up(
        &self,
        scope: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> Result<FlowLookUp, LookUpFailure> {
        let (state, scope) = (Arc::clone(&self.state), scope.clone());
        let thread = state.thread(&scope)?;
        thread.run(move || state.look_up(&scope, &flows)).await?
    }

    /// The connection between `local` and `remote` in the scope's namespace, if it exists. [`Sample::origin`] always
    /// says accepted.
    ///
    /// # Errors
    ///
    /// As [`Tracker::dump`].
    pub async fn find(
        &self,
        scope: &Scope,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<Sample>> {
        let scope = scope.clone();
        self.blocking(move |state| state.find(&*state.netns(&scope)?, local, remote))
            .await
    }

    /// The connection between `local` and `remote` in the host's namespace, as [`Tracker::find`].
    ///
    /// # Errors
    ///
    /// The lookup fails.
    pub(crate) async fn find_on_host(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<Sample>> {
        self.blocking(move |state| state.find(&state.host, local, remote))
            .await
    }

    /// Shuts down the read side of those `idle` flows that have not changed since the dump that found them idle, and
    /// returns which. Their owners then close them. Stops when `over` is cancelled.
    ///
    /// # Errors
    ///
    /// As [`Tracker::dump`]; some flows may have been closed before the error.
    pub async fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> io::Result<Vec<SocketCookie>> {
        let scope = scope.clone();
        self.blocking(move |state| {
            close::close_idle(&state.programs, &*state.netns(&scope)?, &idle, &over)
        })
        .await
    }

    /// Starts sending the events of a scope. They carry the returned id. Also searches for the kubelet again, in the
    /// background, because a restarted service has another cgroup.
    ///
    /// # Errors
    ///
    /// The pod can't be tracked, its namespace is gone, or too many workloads are watched already.
    pub fn watch(&self, scope: &Scope) -> io::Result<WatchId> {
        if let Scope::Netns { inode, pid } = scope {
            let netns = Netns::open(*inode, *pid)?;
            let watched = WatchedNetns {
                thread: Arc::new(NetnsThread::start(&netns)?),
                netns: Arc::new(netns),
            };
            lock(&self.state.watched).insert(*inode, watched);
        }
        let keys = watch_keys(scope)?;
        self.search_kubelet_if_due();
        let watching = lock(&self.state.programs.watches).begin(&keys);
        // The caller does not end a watch that failed to start, so it is undone here.
        watching.inspect_err(|_| self.unwatch(scope))
    }

    /// Ends the watch of a scope. Does nothing if the scope is not watched.
    pub fn unwatch(&self, scope: &Scope) {
        if let Scope::Netns { inode, .. } = scope {
            lock(&self.state.watched).remove(inode);
        }
        let keys = watch_keys(scope).unwrap_or_default();
        if let Err(e) = lock(&self.state.programs.watches).end(&keys) {
            tracing::warn!("can't update the number of watched workloads: {e}");
        }
    }

    /// Listens on a port on all addresses of a pod's network namespace. Dumps ([`Sample::to_wait_port`]) and events
    /// ([`SocketEvent::exempt`](super::SocketEvent::exempt)) mark connections to it.
    ///
    /// # Errors
    ///
    /// The pod has no namespace of its own or is gone, or the port is in use ([`io::ErrorKind::AddrInUse`]).
    pub(crate) async fn listen_in(&self, scope: &Scope, port: u16) -> io::Result<PodListener> {
        let Scope::Netns { inode, pid } = *scope else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let opened = self
            .blocking(move |state| {
                pod_listener::listen_in(&state.own_ports, &Netns::open(inode, pid)?, pid, port)
            })
            .await?;
        opened.register()
    }

    /// How often clients connect to a pod; `None` if that is not known. It was counted since the programs' start.
    ///
    /// # Errors
    ///
    /// The counters can't be read, or the pod is gone.
    pub async fn arrivals(&self, scope: &Scope) -> io::Result<Option<Arrivals>> {
        let scope = scope.clone();
        self.blocking(move |state| state.arrivals(&scope)).await
    }

    /// The counters of all workloads. Makes several system calls per workload: call it off the async threads.
    pub fn counts(&self) -> Vec<WorkloadCount> {
        self.state.counts()
    }

    /// Removes the counters of workloads that are gone, as of `now`. The tracker does so by itself every ten minutes.
    /// Blocking.
    ///
    /// # Errors
    ///
    /// The counters or the tree of cgroups can't be read.
    pub fn remove_gone_workloads(&self, now: BootTime) -> io::Result<()> {
        self.state.remove_gone_workloads(now)
    }

    /// How many state changes of TCP sockets the programs have missed since the start.
    ///
    /// # Errors
    ///
    /// The kernel does not report the number.
    pub fn missed_changes(&self) -> io::Result<u64> {
        self.state.programs.missed_changes()
    }

    /// Losses since the start, by `ebb_common::LOST_…`.
    ///
    /// # Errors
    ///
    /// The map can't be read.
    pub fn losses(&self) -> Result<[u64; LOSSES], KernelError> {
        self.state.programs.losses()
    }

    /// Starts a search for the kubelet's cgroups, unless one is already waiting to start.
    fn search_kubelet_if_due(&self) {
        if let Some(search) = &self.state.kubelet
            && let Ok(runtime) = Handle::try_current()
            && search.is_due()
        {
            let state = Arc::clone(&self.state);
            runtime.spawn_blocking(move || state.find_kubelet());
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce(&TrackerState) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let state = Arc::clone(&self.state);
        tokio::task::spawn_blocking(move || f(&state))
            .await
            .unwrap_or_else(|e| Err(io::Error::other(e)))
    }
}
