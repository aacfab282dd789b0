//! The door to the kernel: look at a pod's sockets, watch a pod, find a connection.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    ops::Range,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use ebb_common::{BareAck, LOSSES, WorkloadKey};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;

use super::{
    KernelError, KernelEvent, Look, Netns,
    bytes::Bytes,
    close, events, netns,
    programs::{Programs, walk},
    prune::Pruner,
    sock_diag::SockDiag,
};
use crate::{
    clock::BootTime,
    flow::{Flow, Sample},
    ids::{CgroupId, NetnsInode, SocketCookie},
    pods::Scope,
};

/// As many events as may wait for the drains before the ring buffer itself has to hold them.
const EVENT_QUEUE: usize = 1024;

/// How often the counters of pods that are gone are forgotten. The map has room for 16,384 workloads.
const PRUNE_EVERY: Duration = Duration::from_secs(600);

/// How to start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Forward what the BPF programs log.
    pub bpf_log: bool,
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
    /// Outbound flows now.
    pub outbound: i64,
    /// Inbound flows since the start.
    pub inbound_total: u64,
}

/// The running BPF programs and the questions they and the kernel answer. Cheap to clone; the programs are
/// detached when the last clone is dropped.
#[derive(Clone)]
pub struct Tracker {
    inner: Arc<Inner>,
}

struct Inner {
    programs: Mutex<Programs>,
    /// Watched namespaces are kept open, so that looking works when the process they were found by is gone.
    watched: Mutex<HashMap<NetnsInode, Arc<Netns>>>,
    pruner: Mutex<Pruner>,
    host: Netns,
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
        let mut programs = Programs::start(host.inode(), options.bpf_log)?;
        let (to, from) = mpsc::channel(EVENT_QUEUE);
        if let Some(ring) = programs.events.take() {
            let lost = Arc::clone(&programs.lost);
            tokio::spawn(async move {
                if let Err(e) = events::forward(ring, lost, to.clone()).await {
                    tracing::error!(
                        "reading kernel events: {e}; pods are held for the settle time alone until the agent is restarted"
                    );
                    // A closed channel would say the same, but this one is heard at once.
                    let _ = to.send(KernelEvent::Lost).await;
                }
            });
        }
        let inner = Inner {
            programs: Mutex::new(programs),
            watched: Mutex::default(),
            pruner: Mutex::default(),
            host,
        };
        let inner = Arc::new(inner);
        tokio::spawn(prune_now_and_then(Arc::downgrade(&inner)));
        Ok((Self { inner }, from))
    }

    /// The host's network namespace.
    pub fn host_netns(&self) -> NetnsInode {
        self.inner.host.inode()
    }

    /// All TCP sockets of a pod, from the kernel's tables. Walks the table of the whole node, off the async
    /// threads.
    ///
    /// # Errors
    ///
    /// The pod can't be tracked, its namespace is gone, or the kernel does not answer.
    pub async fn look(&self, scope: &Scope) -> io::Result<Look> {
        let scope = scope.clone();
        self.blocking(move |inner| inner.look(&scope)).await
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
        self.blocking(move |inner| {
            inner.within(&scope, |netns| {
                netns.run(SockDiag::open)?.find(local, remote)
            })
        })
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
        self.blocking(move |inner| inner.host.run(SockDiag::open)?.find(local, remote))
            .await
    }

    /// Closes the reading side of `idle` flows of a pod, of those that have not moved since the look that
    /// found them idle, and returns which. Their owners then close them.
    ///
    /// # Errors
    ///
    /// As [`Tracker::look`]; some may have been closed by then.
    pub async fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
    ) -> io::Result<Vec<SocketCookie>> {
        let scope = scope.clone();
        self.blocking(move |inner| inner.within(&scope, |netns| close::idle(netns, &idle)))
            .await
    }

    /// Has the events of a scope reported from now on.
    ///
    /// # Errors
    ///
    /// The pod can't be tracked, its namespace is gone, or too many are watched already.
    pub fn watch(&self, scope: &Scope) -> io::Result<()> {
        if let Scope::Netns { inode, pid } = scope {
            let netns = open(*inode, *pid)?;
            lock(&self.inner.watched).insert(*inode, Arc::new(netns));
        }
        let keys = watch_keys(scope)?;
        let watching = lock(&self.inner.programs).watch(&keys);
        // What was half begun would stay: nobody ends a watch that failed.
        watching.inspect_err(|_| self.unwatch(scope))
    }

    /// Ends what [`Tracker::watch`] began. Harmless if it had not.
    pub fn unwatch(&self, scope: &Scope) {
        if let Scope::Netns { inode, .. } = scope {
            lock(&self.inner.watched).remove(inode);
        }
        let keys = watch_keys(scope).unwrap_or_default();
        if let Err(e) = lock(&self.inner.programs).unwatch(&keys) {
            tracing::warn!("can't count the watched workloads: {e}");
        }
    }

    /// The counters of all workloads.
    pub fn counts(&self) -> Vec<WorkloadCount> {
        lock(&self.inner.programs)
            .workloads
            .iter()
            .filter_map(Result::ok)
            .map(|(key, w)| WorkloadCount {
                cgroup: CgroupId(key.cgroup),
                netns: NetnsInode(key.netns),
                inbound: w.inbound,
                outbound: w.outbound,
                inbound_total: w.inbound_total,
            })
            .collect()
    }

    /// Forgets the counters of pods that are gone: of namespaces without flow and process, now and at the last
    /// call. Returns how many. Done by itself every ten minutes; reads `/proc`.
    pub fn prune(&self) -> usize {
        self.inner.prune()
    }

    /// Losses since the start, by `ebb_common::LOST_…`.
    ///
    /// # Errors
    ///
    /// The map can't be read.
    pub fn losses(&self) -> Result<[u64; LOSSES], KernelError> {
        lock(&self.inner.programs).losses()
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

async fn prune_now_and_then(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(PRUNE_EVERY).await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        // Failing means panicking, which has been reported; the next time may go well.
        let _ = tokio::task::spawn_blocking(move || inner.prune()).await;
    }
}

impl Inner {
    fn prune(&self) -> usize {
        let mut inhabited: HashSet<_> = netns::all().iter().map(Netns::inode).collect();
        inhabited.insert(self.host.inode());
        inhabited.extend(lock(&self.watched).keys());
        let mut programs = lock(&self.programs);
        let counts = programs.workloads.iter().filter_map(Result::ok);
        let gone = lock(&self.pruner).gone(counts, &inhabited);
        gone.iter()
            .filter(|key| programs.workloads.remove(key).is_ok())
            .count()
    }

    fn look(&self, scope: &Scope) -> io::Result<Look> {
        let storage = lock(&self.programs).flows.try_clone()?;
        self.within(scope, |netns| {
            let taken_at = BootTime::now();
            let from = monotonic();
            let mut samples = netns.run(SockDiag::open)?.dump(Some(storage.as_fd()))?;
            let dumped = from..monotonic();
            // A host-network pod's sockets are those of its cgroups.
            if let Scope::HostNetwork(cgroups) = scope {
                samples.retain(|s| s.cgroup.is_some_and(|c| cgroups.contains(&c)));
            }
            if samples.iter().any(Sample::is_tie) {
                self.break_ties(&mut samples, &dumped, netns)?;
            }
            Ok(Look { taken_at, samples })
        })
    }

    /// Finds out whose word was the last where the kernel's times do not tell: a second walk, of the same
    /// cost as the first, only where it is needed.
    fn break_ties(
        &self,
        samples: &mut [Sample],
        dumped: &Range<Duration>,
        netns: &Netns,
    ) -> io::Result<()> {
        let link = lock(&self.programs)
            .iterator("bare_ack")
            .map_err(io::Error::other)?;
        let written = walk(link, netns)?;
        let (found, _) = written.as_chunks::<{ size_of::<BareAck>() }>();
        let delivered_at: HashMap<u64, Duration> = found
            .iter()
            .filter_map(|found| bare_ack(Bytes(found)))
            // What moved since the dump began is not what the dump describes: the answer to a probe, say, that
            // arrived in between. Such a tie stays undecided.
            .filter(|found| Duration::from_micros(found.touched_at) < dumped.start)
            .map(|found| (found.cookie, Duration::from_micros(found.delivered_at)))
            .collect();
        for sample in samples.iter_mut().filter(|s| s.is_tie()) {
            if let Some(delivered_at) = delivered_at.get(&sample.cookie.0) {
                sample.set_bare_ack(dumped.end.saturating_sub(*delivered_at));
            }
        }
        Ok(())
    }

    /// Calls `f` with the namespace of `scope`.
    fn within<T>(&self, scope: &Scope, f: impl FnOnce(&Netns) -> io::Result<T>) -> io::Result<T> {
        match scope {
            Scope::Netns { inode, pid } => {
                // Not under the lock: a look may take a while.
                let watched = lock(&self.watched).get(inode).cloned();
                match watched {
                    Some(netns) => f(&netns),
                    None => f(&open(*inode, *pid)?),
                }
            }
            Scope::HostNetwork(_) => f(&self.host),
            Scope::Untracked(why) => Err(io::Error::other(why.clone())),
        }
    }
}

fn bare_ack(mut found: Bytes<'_>) -> Option<BareAck> {
    Some(BareAck {
        cookie: found.u64()?,
        delivered_at: found.u64()?,
        touched_at: found.u64()?,
    })
}

/// The clock by which the kernel's TCP stamps what it sends and receives (`tcp_clock_us`).
fn monotonic() -> Duration {
    clock_gettime(ClockId::Monotonic)
        .try_into()
        .unwrap_or_default()
}

/// Opens the namespace of `pid` and makes sure that it is the one that was meant: pids are reused.
fn open(inode: NetnsInode, pid: u32) -> io::Result<Netns> {
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

fn watch_keys(scope: &Scope) -> io::Result<Vec<WorkloadKey>> {
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

/// The maps hold no invariant that a panic could break half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
