//! The agent's life, from start to stop.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    agent::Agent,
    api::server,
    audits::{self, Audits},
    clock::BootTime,
    drain::{driver::Drains, journal::Journal, policy::Policy},
    hold::{
        caller::Lookups,
        judge::Judge,
        judgements::Judgements,
        node_port,
        pod_port::{self, Warnings},
        shares::Shares,
        wait::WAITS_PER_POD,
    },
    kernel::{self, KernelError, KubeletCgroup, Tracker},
    limits,
    listen::{self, ListenError, SocketFile},
    memory,
    pods::{
        changes::{self, Changes},
        cri::{Cri, CriError},
        discover::Node,
        kube::{Kube, KubeError, KubeMode},
        kubepods::Kubepods,
        service::Pods,
    },
    report::{events::Events, metrics::Metrics, policies, tell::Teller, text::one_line},
    run_dir::{RunDir, RunDirError},
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
    /// The cgroup that the kubelet dials from, below that mount; looked for if not given.
    pub kubelet_cgroup: Option<PathBuf>,
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
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// A port can't be had.
    #[error("can't listen on {address}: {source}; choose another with --http")]
    Port {
        /// The address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
}

/// A started agent. Dropping it releases what it holds and detaches the BPF programs.
pub struct Running {
    agent: Arc<Agent>,
    changes: Arc<Changes>,
    _telling: AbortOnDropHandle<()>,
    auditing: AbortOnDropHandle<()>,
    /// Ends with the drains.
    teller: JoinHandle<()>,
    ports: Vec<TcpListener>,
    socket: tokio::net::UnixListener,
    socket_file: Option<SocketFile>,
    run_dir: RunDir,
}

/// Starts the agent: everything that can be refused is asked for first, the kernel last, so that a failed
/// start leaves nothing behind.
///
/// # Errors
///
/// See [`StartError`].
pub async fn start(config: Config) -> Result<Running, StartError> {
    memory::map_large();
    let run_dir = RunDir::take(&config.run_dir)?;
    // Pods with a wait port take two descriptors each.
    limits::raise_open_files();
    let cri = Cri::connect(&config.cri_socket).await?;
    let changes = Arc::<Changes>::default();
    let kube = Kube::start(config.kube, config.node_name.as_deref(), &changes).await?;
    let mut ports = Vec::new();
    for address in config.http {
        ports.push(
            TcpListener::bind(address)
                .await
                .map_err(|source| StartError::Port { address, source })?,
        );
    }
    let listening = listen::bind(&run_dir.socket()).await?;
    let (tracker, events) = Tracker::start(kernel::Options {
        bpf_log: config.bpf_log,
        kubelet: Some(KubeletCgroup {
            root: config.cgroup_root.clone(),
            named: config.kubelet_cgroup,
        }),
        cgroup_root: Some(config.cgroup_root.clone()),
        earlier: Some(run_dir.flows()),
    })?;
    let journal = journal(&run_dir);
    let kubepods = Kubepods::new(config.cgroup_root.clone());
    let telling = tokio::spawn(changes::of_runtime(cri.clone(), Arc::clone(&changes)));
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
    let events = match (kube.client(), &config.node_name) {
        (Some(client), Some(node)) => Events::start(client.clone(), node, Arc::clone(&metrics)),
        _ => Events::off(),
    };
    let told = Teller::new(Arc::clone(&metrics), events);
    let policies = policies::follow(kube.pods(), config.policy.clone(), {
        let told = told.clone();
        move |news| told.tell(news)
    });
    tokio::spawn(policies);
    let audits = Arc::new(Audits::counted_in(Arc::clone(&metrics)));
    let over = audits::after(Arc::clone(&audits), &pods);
    let auditing = tokio::spawn(audits::make(audits, tracker.clone(), drains.clone()));
    let teller = tokio::spawn(told.clone().follow(heard, over));
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
            lookups: Lookups::new(kubepods),
            waits: Arc::new(Shares::new(WAITS_PER_POD)),
            wait_port_warnings: Warnings::default(),
            teller: told,
            judgements: Judgements::default(),
            started: BootTime::now(),
            metrics,
            policy: config.policy,
        }),
        changes,
        _telling: AbortOnDropHandle::new(telling),
        auditing: AbortOnDropHandle::new(auditing),
        teller,
        ports,
        socket: listening.listener,
        socket_file: listening.file,
        run_dir,
    })
}

/// How long the start waits for the first list of pods.
const FIRST_LIST_WITHIN: Duration = Duration::from_secs(2);

/// How long requests may take to end when the agent stops: held calls are answered, then cut.
pub const STOP_WITHIN: Duration = Duration::from_secs(2);

/// How much of it writing down the open flows may take.
const REMEMBER_WITHIN: Duration = Duration::from_millis(500);

/// How much of it the last Events may take.
const EVENTS_WITHIN: Duration = Duration::from_secs(1);

impl Running {
    /// Serves until `stop`, then releases all holds and ends.
    pub async fn serve(self, stop: CancellationToken) {
        let Self {
            agent,
            changes,
            _telling,
            auditing,
            teller,
            ports,
            socket,
            socket_file,
            run_dir,
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
        let waits = pod_port::serve(Arc::clone(&agent), Arc::clone(&changes), stop.clone());
        servers.spawn(waits);
        let looking = {
            let agent = Arc::clone(&agent);
            AbortOnDropHandle::new(tokio::spawn(async move {
                changes::follow(&agent.pods, &changes).await;
            }))
        };
        stop.cancelled().await;
        drop((looking, auditing));
        agent.drains.shutdown();
        let ended = tokio::time::timeout(STOP_WITHIN, async {
            let told = async {
                // The last reports are the ones of the holds that were just released.
                let _ = teller.await;
                agent.teller.written(EVENTS_WITHIN).await;
            };
            let served = async { while servers.join_next().await.is_some() {} };
            let remembered = async {
                if let Err(e) = agent
                    .tracker
                    .remember(run_dir.flows(), REMEMBER_WITHIN)
                    .await
                {
                    tracing::warn!("can't write down since when flows are open: {e}");
                }
            };
            tokio::join!(told, served, remembered);
        });
        if ended.await.is_err() {
            tracing::warn!("some requests did not end in time and were cut");
        }
        drop(socket_file);
        tracing::info!("stopped; all holds are released");
    }
}

/// The journal is worth a warning, never a failed start.
fn journal(run_dir: &RunDir) -> Option<Journal> {
    Journal::open(run_dir.journal())
        .inspect_err(|e| tracing::warn!("{e}; holds will not survive a restart of the agent"))
        .ok()
}
