//! Starts the agent, serves until the stop, and releases all holds.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use ebb_core::{
    clock::BootTime, drain_report::DrainNotice, format::one_line, policy::Policy, scope::Scope,
};
use ebb_protocol::{
    hold::format_stop_note,
    service::{
        listen::{self, ListenError, SocketFile},
        raise_open_files,
    },
};
use futures_util::future::BoxFuture;
use opentelemetry_otlp::ExporterBuildError;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    checks,
    run_dir::{RunDir, RunDirError},
};
use crate::{
    drains::{
        driver::{DrainHandle, Drains},
        journal::Journal,
        notify::ContainerNotifier,
    },
    kernel::{self, KernelError, KubeletCgroup, Tracker, TrackerOptions},
    linux::{files, logind::NodeShutdown, malloc},
    pods::{
        change_notifier::{self, ChangeNotifier},
        cri::{Cri, CriError},
        discover::NodePaths,
        kube::{Kube, KubeError, KubeMode},
        kubepods::KubepodsCgroup,
        peer_names,
        policies::PodPolicies,
        store::Pods,
        table::PodTable,
    },
    server::{
        PodServices,
        advise::ConnectionLifetimes,
        api::{self, Api},
        deletions::Deletions,
        health::TaskHealth,
        holds::Holds,
        node_port::{NodePort, ScrapeSources, Scraper},
        observed_exits,
        peer_identity::PeerResolver,
        pod_flows::PodFlows,
        pod_port::{self, PodPorts, WaitPortWarnings},
        saved_history::SavedHistory,
        terminations::Terminations,
        wait::Waits,
    },
    telemetry::{
        annotation_warnings, events::EventWriter, metrics::Metrics, reporter::Reporter,
        traces::DrainTracer, workloads::Workloads,
    },
};

/// The agent's configuration.
#[derive(Clone, Debug)]
pub(crate) struct AgentConfig {
    /// The runtime's CRI socket.
    pub(crate) cri_socket: PathBuf,
    pub(crate) run_dir: PathBuf,
    /// Addresses of the node port.
    pub(crate) http: Vec<SocketAddr>,
    /// The mount of cgroup v2.
    pub(crate) cgroup_root: PathBuf,
    /// The cgroup that the kubelet dials from, below that mount. If `None`, ebb searches for it.
    pub(crate) kubelet_cgroup: Option<PathBuf>,
    pub(crate) kube: KubeMode,
    /// This node's name in the cluster.
    pub(crate) node_name: Option<String>,
    /// The socket of the node's system bus, if it has one.
    pub(crate) dbus_socket: Option<PathBuf>,
    /// Hold also without evidence that the pod is terminating.
    pub(crate) hold_unknown: bool,
    /// Log the messages of the BPF programs.
    pub(crate) bpf_log: bool,
    /// The OpenTelemetry collector that gets the spans of drains, if any.
    pub(crate) otlp_endpoint: Option<String>,
    /// The policy of pods without annotations.
    pub(crate) policy: Policy,
}

/// Why the agent can't start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Cri(#[from] CriError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Kube(#[from] KubeError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    #[error(
        "--cri-socket {} is the socket of ebb-cri-proxy: give the container runtime's own, such as \
         /run/containerd/containerd.sock",
        socket.display()
    )]
    CriIsProxy { socket: PathBuf },
    #[error(
        "can't send traces to {endpoint}: {source}; set --otlp-endpoint to the address of a collector, such as http://127.0.0.1:4317"
    )]
    Traces {
        endpoint: String,
        source: ExporterBuildError,
    },
    #[error("can't listen on {address}: {source}; choose another with --http")]
    Port {
        address: SocketAddr,
        source: io::Error,
    },
}

/// A started agent. Dropping it releases what it holds and detaches the BPF programs.
pub(crate) struct Running {
    servers: Servers,
    pods: Arc<Pods>,
    drains: DrainHandle,
    tasks: TaskHealth,
    /// Waits for the end of tasks that must not end, by the name of the task.
    lasting: Vec<(&'static str, BoxFuture<'static, ()>)>,
    changes: Arc<ChangeNotifier>,
    reporter: Reporter,
    /// Ends when the drain driver ends.
    reporting: JoinHandle<()>,
    _runtime_events: AbortOnDropHandle<()>,
    ports: Vec<TcpListener>,
    socket: tokio::net::UnixListener,
    socket_file: Option<SocketFile>,
    /// Locked until the agent has ended.
    run_dir: RunDir,
    /// For the log.
    node: Option<String>,
}

async fn listen_on(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, StartError> {
    let mut ports = Vec::new();
    for &address in addresses {
        let port = TcpListener::bind(address).await;
        ports.push(port.map_err(|source| StartError::Port { address, source })?);
    }
    Ok(ports)
}

fn traces(config: &AgentConfig) -> Result<Option<DrainTracer>, StartError> {
    let Some(endpoint) = &config.otlp_endpoint else {
        return Ok(None);
    };
    let tracer = DrainTracer::new(endpoint, config.node_name.as_deref());
    tracer.map(Some).map_err(|source| StartError::Traces {
        endpoint: endpoint.clone(),
        source,
    })
}

/// Lists the pods. If the runtime does not answer in time, the first request lists them.
async fn first_list(pods: &Pods) {
    match tokio::time::timeout(FIRST_LIST_WITHIN, pods.refresh()).await {
        Ok(Ok(_)) => {}
        Ok(Err(e)) => tracing::warn!("{}", one_line(&e)),
        Err(_) => tracing::warn!(
            "the container runtime did not list its pods within {FIRST_LIST_WITHIN:?}; ebb lists them at the next request"
        ),
    }
}

/// Starts the agent. The steps that can fail come first, and the BPF programs last of these, so that a failed start
/// leaves nothing behind.
pub(crate) async fn start(config: AgentConfig) -> Result<Running, StartError> {
    malloc::set_mmap_threshold();
    // First, because it costs nothing, and on an older kernel the agent can't run at all.
    kernel::check_release()?;
    let run_dir = RunDir::take(&config.run_dir)?;
    // Each pod with a wait port takes two descriptors.
    raise_open_files();
    checks::cri_socket(&config.cri_socket)?;
    let cri = Cri::connect(&config.cri_socket).await?;
    let changes = Arc::<ChangeNotifier>::default();
    let kube = Kube::start(config.kube, config.node_name.as_deref(), &changes).await?;
    let traces = traces(&config)?;
    let ports = listen_on(&config.http).await?;
    let listening = listen::bind(&run_dir.socket()).await?;
    let (tracker, events) = Tracker::start(TrackerOptions {
        bpf_log: config.bpf_log,
        kubelet: Some(KubeletCgroup {
            root: config.cgroup_root.clone(),
            named: config.kubelet_cgroup.clone(),
        }),
        cgroup_root: Some(config.cgroup_root.clone()),
    })?;
    checks::cgroup_root(&config.cgroup_root);
    let journal = journal(&run_dir);
    let tasks = TaskHealth::default();
    let runtime_events = change_notifier::follow_runtime(cri.clone(), Arc::clone(&changes));
    let runtime_events = tokio::spawn(
        tasks
            .clone()
            .watch("the task that follows the runtime's events", runtime_events),
    );
    let pods = Arc::new(Pods::new(
        cri.clone(),
        NodePaths {
            host_netns: tracker.host_netns(),
            proc: PROC.into(),
            cgroup_root: config.cgroup_root.clone(),
        },
    ));
    let (notice_sender, notices) = mpsc::unbounded_channel();
    let notifier = ContainerNotifier::new(cri, Arc::clone(&pods), PROC.into());
    let drains = Drains::spawn_with(
        Arc::new(tracker.clone()),
        events,
        journal,
        notice_sender,
        Some(Arc::new(notifier)),
    );
    let metrics = Arc::new(Metrics::default());
    let reporting = start_reporting(&config, &kube, traces, notices, &metrics, &tasks);
    let lasting: Vec<(_, BoxFuture<'static, ()>)> = vec![
        ("the watch on the API server", Box::pin(kube.ended())),
        ("the task that writes Events", reporting.events_ended),
    ];
    let watch = |name, task: BoxFuture<'static, ()>| tokio::spawn(tasks.clone().watch(name, task));
    if let (Some(_), Some(node)) = (kube.client(), &config.node_name) {
        let check = checks::node_name(node.clone(), kube.pods(), pods.subscribe());
        watch("the check of the node's name", Box::pin(check));
    }
    let lists = follow_lists(pods.subscribe(), metrics.workloads.clone(), drains.clone());
    watch("the task that follows the lists of pods", Box::pin(lists));
    first_list(&pods).await;
    tokio::spawn(count_older(tracker.clone(), pods.latest()));

    let exits = observed_exits::follow(Arc::clone(&pods), drains.clone());
    watch("the task that follows exits", Box::pin(exits));
    let policies = Arc::new(PodPolicies::new(kube, config.policy.clone()));
    let deletions = Deletions {
        pods: Arc::clone(&pods),
        policies: Arc::clone(&policies),
        drains: drains.clone(),
    };
    watch(
        "the task that follows deletions",
        Box::pin(deletions.follow()),
    );
    let reporter = reporting.reporter;
    let parts = ServerParts {
        tracker,
        pods: Arc::clone(&pods),
        policies,
        drains: drains.clone(),
        reporter: reporter.clone(),
        metrics,
        tasks: tasks.clone(),
    };
    let servers = build_servers(&config, &run_dir, parts);
    watch(
        "the history of drains",
        Box::pin(Arc::clone(&servers.history).follow()),
    );
    Ok(Running {
        servers,
        pods,
        drains,
        tasks,
        lasting,
        changes,
        reporter,
        reporting: reporting.ended,
        _runtime_events: AbortOnDropHandle::new(runtime_events),
        ports,
        socket: listening.listener,
        socket_file: listening.file,
        run_dir,
        node: config.node_name,
    })
}

/// The tasks that report what happens to pods.
struct Reporting {
    reporter: Reporter,
    /// Ends when the drain driver ends.
    ended: JoinHandle<()>,
    /// Ends when no more Events are written.
    events_ended: BoxFuture<'static, ()>,
}

/// Starts the reporter, which follows the `notices` of the driver, and the check of annotations.
fn start_reporting(
    config: &AgentConfig,
    kube: &Kube,
    traces: Option<DrainTracer>,
    notices: mpsc::UnboundedReceiver<DrainNotice>,
    metrics: &Arc<Metrics>,
    tasks: &TaskHealth,
) -> Reporting {
    let events = match (kube.client(), &config.node_name) {
        (Some(client), Some(node)) => EventWriter::start(client.clone(), node, Arc::clone(metrics)),
        _ => EventWriter::off(),
    };
    let events_ended = Box::pin(events.ended());
    let reporter = Reporter::new(Arc::clone(metrics), events, traces);
    let annotations = annotation_warnings::follow(kube.pods(), config.policy.clone(), {
        let reporter = reporter.clone();
        move |event| reporter.report(event)
    });
    tokio::spawn(tasks.clone().watch("the check of annotations", annotations));
    let reports = reporter.clone().follow(notices);
    let ended = tokio::spawn(tasks.clone().watch("the reporter of drains", reports));
    Reporting {
        reporter,
        ended,
        events_ended,
    }
}

/// What the servers are made of.
struct ServerParts {
    tracker: Tracker,
    pods: Arc<Pods>,
    policies: Arc<PodPolicies>,
    drains: DrainHandle,
    reporter: Reporter,
    metrics: Arc<Metrics>,
    tasks: TaskHealth,
}

/// The agent's servers, before they serve.
struct Servers {
    api: Api,
    node_port: Arc<NodePort>,
    pod_ports: PodPorts,
    history: Arc<SavedHistory>,
}

/// Makes the servers, and restores the history.
fn build_servers(config: &AgentConfig, run_dir: &RunDir, parts: ServerParts) -> Servers {
    let ServerParts {
        tracker,
        pods,
        policies,
        drains,
        reporter,
        metrics,
        tasks,
    } = parts;
    let services = PodServices {
        pods: Arc::clone(&pods),
        flows: PodFlows::new(tracker.clone(), Arc::clone(&policies)),
        drains: drains.clone(),
    };
    let shutdown = NodeShutdown::new(config.dbus_socket.clone());
    let kubepods = KubepodsCgroup::new(config.cgroup_root.clone());
    let waits = Arc::new(Waits::new(
        PeerResolver::new(tracker.clone(), Arc::clone(&pods), kubepods),
        services.clone(),
        shutdown.clone(),
    ));
    let holds = Arc::new(Holds::new(
        services.clone(),
        Terminations::new(config.hold_unknown),
        shutdown,
        Arc::clone(&metrics),
    ));
    let history = Arc::new(SavedHistory::restore(run_dir.history(), &drains, &holds));
    let warnings = Arc::new(WaitPortWarnings::new(reporter));
    let api = Api::new(
        services,
        holds,
        Arc::clone(&waits),
        Arc::clone(&warnings),
        ConnectionLifetimes::new(tracker.clone(), metrics.workloads.clone()),
    );
    let sources = ScrapeSources {
        tracker: tracker.clone(),
        pods: Arc::clone(&pods),
        policies: Arc::clone(&policies),
        drains: drains.clone(),
        run_dir: config.run_dir.clone(),
    };
    let node_port = NodePort::new(
        Arc::clone(&waits),
        Arc::clone(&pods),
        drains,
        tasks,
        Scraper::new(sources, metrics),
    );
    Servers {
        api,
        node_port: Arc::new(node_port),
        pod_ports: PodPorts {
            tracker,
            pods,
            policies,
            waits,
            warnings,
        },
        history,
    }
}

/// Passes each list of pods to the metrics, because a pod may be gone by the next scrape, and to the drains, which keep
/// the beginnings of listed pods.
async fn follow_lists(
    mut pods: watch::Receiver<Arc<PodTable>>,
    workloads: Workloads,
    drains: DrainHandle,
) {
    while pods.changed().await.is_ok() {
        let table = pods.borrow_and_update().clone();
        workloads.learn(table.iter().map(|pod| &**pod));
        let listed = table.iter().map(|pod| pod.name.uid.clone()).collect();
        drains.pods_listed(listed, peer_names::of(&table));
    }
}

/// Dumps the sockets of each pod's namespace once, because the counters do not include connections that were opened
/// before the programs were attached.
async fn count_older(tracker: Tracker, pods: Arc<PodTable>) {
    let mut is_host_counted = false;
    for pod in pods.iter() {
        // All pods on the host network share one namespace.
        let is_on_host = matches!(pod.scope, Scope::HostNetwork(_));
        if is_on_host && is_host_counted {
            continue;
        }
        match tracker.dump(&pod.scope).await {
            Ok(_) => is_host_counted |= is_on_host,
            Err(e) => {
                tracing::debug!(pod = %pod.name, "can't count the connections that were opened before the start: {e}");
            }
        }
    }
}

/// `/proc` of the node's PID namespace, in which the agent runs.
const PROC: &str = "/proc";

/// How long the start waits for the first list of pods.
const FIRST_LIST_WITHIN: Duration = Duration::from_secs(2);

/// How long requests may take to end when the agent stops. Then their connections are cut.
pub const STOP_WITHIN: Duration = Duration::from_secs(2);

/// How much of [`STOP_WITHIN`] the last Events may take.
const EVENTS_WITHIN: Duration = Duration::from_secs(1);

impl Running {
    /// Serves until `stop`, then releases all holds and ends.
    pub(crate) async fn serve(self, stop: CancellationToken) {
        let Self {
            servers:
                Servers {
                    api,
                    node_port,
                    pod_ports,
                    history,
                },
            pods,
            drains,
            tasks,
            lasting,
            changes,
            reporter,
            reporting,
            _runtime_events,
            ports,
            socket,
            socket_file,
            run_dir,
            node,
        } = self;
        let addresses = ports.iter().filter_map(|port| port.local_addr().ok());
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            http = ?addresses.collect::<Vec<_>>(),
            socket = %run_dir.socket().display(),
            runtime = pods.runtime(),
            node,
            pods = pods.latest().len(),
            policy = %pod_ports.policies.node(),
            "tracking TCP connections"
        );
        let mut serving = tokio::task::JoinSet::new();
        let watch = |name, server: BoxFuture<'static, ()>| {
            tasks.clone().watch_server(name, stop.clone(), server)
        };
        let api = api::serve(socket, Arc::new(api), stop.clone());
        serving.spawn(watch("the server of the agent's socket", Box::pin(api)));
        // Until now, calls that found the socket got no answer, and the note told the proxy to ask again. If it stays,
        // calls only wait longer for this agent.
        let _ = files::remove(&run_dir.stop_note());
        for port in ports {
            let server = Arc::clone(&node_port).serve(port, stop.clone());
            serving.spawn(watch("a server of the node port", Box::pin(server)));
        }
        let waits = pod_port::serve(pod_ports, Arc::clone(&changes), stop.clone());
        serving.spawn(watch("the server of wait ports", Box::pin(waits)));
        for (name, ended) in lasting {
            tokio::spawn(watch(name, ended));
        }
        let lists = async move { change_notifier::follow(&pods, &changes).await };
        let lists = watch("the task that lists pods", Box::pin(lists));
        let refreshing = AbortOnDropHandle::new(tokio::spawn(lists));
        stop.cancelled().await;
        drop(refreshing);
        // Before the first call can miss this agent.
        note_stop(&run_dir);
        drains.shutdown();
        let ended = tokio::time::timeout(STOP_WITHIN, async {
            let reported = async {
                // The last reports are the ones of the holds that were just released.
                let _ = reporting.await;
                reporter.flush(EVENTS_WITHIN).await;
            };
            let served = async { while serving.join_next().await.is_some() {} };
            tokio::join!(reported, served);
        });
        if ended.await.is_err() {
            tracing::warn!(
                "some requests did not end within {STOP_WITHIN:?} of the stop and were cut"
            );
        }
        history.save_last().await;
        drop(socket_file);
        tracing::info!("stopped; all holds are released");
        // Unlocks it.
        drop(run_dir);
    }
}

/// Tells the calls that find no agent from now on that another one is likely to start.
fn note_stop(run_dir: &RunDir) {
    let note = format_stop_note(BootTime::now());
    if let Err(e) = files::write_for_this_boot(&run_dir.stop_note(), note.as_bytes()) {
        tracing::warn!(
            "can't write {}: {e}; stops that arrive before the next agent starts will not be held",
            run_dir.stop_note().display()
        );
    }
}

/// Opens the journal. If that fails, the agent warns and starts without one.
fn journal(run_dir: &RunDir) -> Option<Journal> {
    Journal::open(run_dir.journal())
        .inspect_err(|e| tracing::warn!("{e}; holds will not survive a restart of the agent"))
        .ok()
}
