//! The agent's life, from start to stop.

use std::{
    fs::{DirBuilder, File},
    io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    api::server,
    drain::{
        driver::{Drains, Kernel, LookError},
        journal::Journal,
        policy::Policy,
    },
    flow::Flow,
    hold::{
        cri_proxy::listen::{self, ListenError, SocketFile},
        judge::Judge,
        node_port,
    },
    ids::SocketCookie,
    kernel::{self, KernelError, Look, Tracker},
    pods::{
        Scope,
        cri::{Cri, CriError},
        discover::Node,
        kube::{Kube, KubeError, KubeMode},
        service::Pods,
    },
    report::{metrics::Metrics, tell, text::one_line},
};

/// How the agent is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The runtime's CRI socket.
    pub cri_socket: PathBuf,
    /// Where the agent keeps its socket, lock and journal.
    pub run_dir: PathBuf,
    /// Where to serve the node port.
    pub http: Vec<SocketAddr>,
    /// The mount of cgroup v2.
    pub cgroup_root: PathBuf,
    /// Whether to use the API server.
    pub kube: KubeMode,
    /// This node's name in the cluster.
    pub node_name: Option<String>,
    /// Hold also where nobody can tell whether the pod is terminating.
    pub hold_unknown: bool,
    /// Forward what the BPF programs log.
    pub bpf_log: bool,
    /// The policy of pods that say nothing.
    pub policy: Policy,
}

/// Why the agent can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The runtime.
    #[error(transparent)]
    Cri(#[from] CriError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The API server's configuration.
    #[error(transparent)]
    Kube(#[from] KubeError),
    /// The agent's own socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Another agent has the run directory.
    #[error("another ebb agent runs on this node already (it holds {}): stop that one first", lock.display())]
    AlreadyRunning {
        /// The lock file.
        lock: PathBuf,
    },
    /// The run directory is no good.
    #[error("can't use the run directory {}: {source}; make it writable for root, or choose another with --run-dir", path.display())]
    RunDir {
        /// The directory or a file in it.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A port can't be had.
    #[error("can't listen on {address}: {source}; choose another with --http")]
    Port {
        /// The address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
}

impl Kernel for Tracker {
    async fn look(&self, scope: &Scope) -> Result<Look, LookError> {
        Self::look(self, scope).await.map_err(look_error)
    }

    async fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
    ) -> Result<Vec<SocketCookie>, LookError> {
        Self::close_idle(self, scope, idle)
            .await
            .map_err(look_error)
    }

    fn watch(&self, scope: &Scope) -> Result<(), LookError> {
        Self::watch(self, scope).map_err(look_error)
    }

    fn unwatch(&self, scope: &Scope) {
        Self::unwatch(self, scope);
    }
}

fn look_error(e: io::Error) -> LookError {
    LookError(e.to_string())
}

/// A started agent. Dropping it releases what it holds and detaches the BPF programs.
pub struct Running {
    agent: Arc<Agent>,
    /// Ends with the drains.
    teller: JoinHandle<()>,
    ports: Vec<TcpListener>,
    socket: tokio::net::UnixListener,
    socket_file: Option<SocketFile>,
    /// Held for as long as the agent runs.
    _lock: File,
}

/// Starts the agent: everything that can be refused is asked for first, the kernel last, so that a failed
/// start leaves nothing behind.
///
/// # Errors
///
/// See [`StartError`].
pub async fn start(config: Config) -> Result<Running, StartError> {
    let lock = lock(&config.run_dir)?;
    let cri = Cri::connect(&config.cri_socket).await?;
    let kube = Kube::start(config.kube, config.node_name.as_deref()).await?;
    let mut ports = Vec::new();
    for address in config.http {
        ports.push(
            TcpListener::bind(address)
                .await
                .map_err(|source| StartError::Port { address, source })?,
        );
    }
    let listening = listen::bind(&socket_path(&config.run_dir)).await?;
    let (tracker, events) = Tracker::start(kernel::Options {
        bpf_log: config.bpf_log,
    })?;
    let journal = journal(&config.run_dir);
    let pods = Pods::new(
        cri,
        Node {
            host_netns: tracker.host_netns(),
            proc: "/proc".into(),
            cgroup_root: config.cgroup_root,
        },
    );
    let (notices, heard) = mpsc::unbounded_channel();
    let drains = Drains::spawn(Arc::new(tracker.clone()), events, journal, notices);
    let metrics = Arc::new(Metrics::default());
    let teller = tokio::spawn(tell::tell(heard, Arc::clone(&metrics)));
    // The runtime answered a moment ago, so it may again: pods are looked up when somebody asks.
    match tokio::time::timeout(FIRST_LIST_WITHIN, pods.refresh()).await {
        Ok(Ok(_)) => {}
        Ok(Err(e)) => tracing::warn!("{}", one_line(&e.into())),
        Err(_) => tracing::warn!("the container runtime is slow to list its pods"),
    }
    Ok(Running {
        agent: Arc::new(Agent {
            tracker,
            pods,
            kube,
            drains,
            judge: Judge::new(config.hold_unknown),
            metrics,
            policy: config.policy,
        }),
        teller,
        ports,
        socket: listening.listener,
        socket_file: listening.file,
        _lock: lock,
    })
}

/// The agent's unix socket in a run directory.
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

/// How long the start waits for the first list of pods.
const FIRST_LIST_WITHIN: Duration = Duration::from_secs(2);

/// How long requests may take to end when the agent stops: held calls are answered, then cut.
const STOP_WITHIN: Duration = Duration::from_secs(2);

impl Running {
    /// Serves until `stop`, then releases all holds and ends.
    pub async fn serve(self, stop: CancellationToken) {
        let Self {
            agent,
            teller,
            ports,
            socket,
            socket_file,
            _lock,
        } = self;
        tracing::info!(
            runtime = agent.pods.runtime(),
            pods = agent.pods.latest().len(),
            "tracking TCP connections"
        );
        let mut servers = tokio::task::JoinSet::new();
        servers.spawn(server::serve(socket, Arc::clone(&agent), stop.clone()));
        for port in ports {
            servers.spawn(node_port::serve(port, Arc::clone(&agent), stop.clone()));
        }
        stop.cancelled().await;
        agent.drains.shutdown();
        let ended = tokio::time::timeout(STOP_WITHIN, async {
            while servers.join_next().await.is_some() {}
            // The last reports are the ones of the holds that were just released.
            let _ = teller.await;
        });
        if ended.await.is_err() {
            tracing::warn!("some requests did not end in time and were cut");
        }
        drop(socket_file);
        tracing::info!("stopped; all holds are released");
    }
}

/// Takes the run directory for this agent alone.
fn lock(run_dir: &Path) -> Result<File, StartError> {
    let fault = |path: &Path, source: io::Error| StartError::RunDir {
        path: path.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(run_dir)
        .map_err(|e| fault(run_dir, e))?;
    let path = run_dir.join("agent.lock");
    let file = File::create(&path).map_err(|e| fault(&path, e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::AlreadyRunning { lock: path }),
        Err(e) => Err(fault(&path, e.into())),
    }
}

/// The journal is worth a warning, never a failed start.
fn journal(run_dir: &Path) -> Option<Journal> {
    Journal::open(run_dir.join("journal"))
        .inspect_err(|e| tracing::warn!("{e}; holds will not survive a restart of the agent"))
        .ok()
}
