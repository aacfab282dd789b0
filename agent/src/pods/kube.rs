//! The API server's view of this node's pods: above all, which of them are being deleted.
//!
//! There is one metadata watch per node, on `spec.nodeName`. Its list comes from the API server's cache, as the
//! kubelet's does, and bookmarks keep it current. The metadata has the deletionTimestamp, the grace period and the
//! annotations; spec and status are never sent. Each object is reduced to a [`KubePod`] as it arrives.
//!
//! While the API server is unreachable, the last known state stays, and the watch is retried with backoff.
//!
//! A second watch, on namespaces, has their annotations (`ebb.dev/drain`). Without the right to it, they are ignored.

mod namespaces;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use ebb_core::{
    clock::BootTime,
    format::one_line,
    ids::{PodName, PodUid},
    policy::annotations::PREFIX,
};
use futures_util::{Stream, StreamExt};
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client, Config,
    config::{InClusterError, KubeConfigOptions, KubeconfigError},
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::{sync::watch, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

pub use self::namespaces::NamespaceAnnotations;
use super::{
    Pod,
    change_notifier::{ChangeNotifier, ChangeSource},
};

/// Set by the kubelet on every pod it runs: `api`, or where a static pod came from
/// (`ConfigSourceAnnotationKey`, `pkg/kubelet/types/pod_update.go`).
const CONFIG_SOURCE: &str = "kubernetes.io/config.source";

/// Set on mirror pods: the UID that the static pod has on its node, which is not the mirror's
/// (`ConfigMirrorAnnotationKey`; `CreateMirrorPod` in `pkg/kubelet/pod/mirror_client.go`).
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// The longest that [`Kube::is_deleting`] waits for the watch. Against a real kubelet the watch was at most
/// a few milliseconds behind StopContainer.
pub const LONGEST_WAIT: Duration = Duration::from_millis(300);

/// The timeout of the GET of one pod, for which a stop waits.
const GET_TIMEOUT: Duration = Duration::from_millis(500);

/// How long the API server may send nothing in the middle of a response. A watch lasts 290 s and has bookmarks, so a
/// longer silence means a dead connection. By default kube-rs waits for a list, and for the start of a response, for
/// ever.
const READ_TIMEOUT: Duration = Duration::from_secs(300);

type PodMeta = PartialObjectMeta<core::Pod>;

/// Whether to use the API server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum KubeMode {
    /// If there is a service account or `$KUBECONFIG`.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// A configuration that exists and can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    /// In a cluster, but the pod's service account can't be read.
    #[error("cannot read this pod's service account; mount its token, or set --kube=off")]
    ServiceAccount(#[source] InClusterError),
    /// `$KUBECONFIG` is set, and its file can't be used.
    #[error(
        "cannot use the file that $KUBECONFIG names; fix it, unset the variable, or set --kube=off"
    )]
    Kubeconfig(#[source] KubeconfigError),
    /// The client can't be built from it.
    #[error("cannot make a client for the API server; fix its configuration, or set --kube=off")]
    Client(#[source] kube::Error),
    /// The name of this node is unknown.
    #[error("NODE_NAME is not set; set it to the pod's spec.nodeName, or set --kube=off")]
    NoNodeName,
}

/// A pod's deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// `metadata.deletionGracePeriodSeconds`. A later delete may shorten it.
    pub grace: Option<Duration>,
    /// When the watch first reported this grace period, which is when it began or somewhat later. For a pod that was
    /// already being deleted when it was first listed, when its first deletion began by the API server's clock: the agent
    /// may have started since.
    pub seen: BootTime,
}

impl Deletion {
    /// The rest of the grace period, if there is one.
    pub fn left(self, now: BootTime) -> Option<Duration> {
        let grace = self.grace?;
        Some(grace.saturating_sub(now.since(self.seen)))
    }
}

/// What ebb keeps of a pod in the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubePod {
    /// The UID that the kubelet and the runtime know it by.
    pub uid: PodUid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Present while it is being deleted. Never for mirror pods: deleting one does not end its static pod.
    pub deletion: Option<Deletion>,
    /// Its current annotations: ebb's own, and those that mark a static pod.
    pub annotations: BTreeMap<String, String>,
}

/// This node's pods according to the API server.
#[derive(Clone, Debug, Default)]
pub struct KubePods {
    /// Whether a complete list was ever received. Stays true while the server is unreachable.
    pub synced: bool,
    /// The pods.
    pub pods: HashMap<PodUid, KubePod>,
}

impl KubePods {
    /// Whether the API server has reported this pod's deletion.
    pub fn is_deleting(&self, uid: &PodUid) -> bool {
        self.pods.get(uid).is_some_and(|p| p.deletion.is_some())
    }

    /// Keeps a known deletion that `update` does not have. A deletion is never undone, and its grace period never
    /// grows (`BeforeDelete` in `staging/src/k8s.io/apiserver/pkg/registry/rest/delete.go`), so such an update is
    /// old. A list from the cache of another API server may be old.
    ///
    /// A shorter grace period is that of a later delete, which is taken to be at `now`: the deletionTimestamp of a list
    /// still counts from the first delete.
    fn keep_deletion(&self, update: &mut KubePod, now: BootTime) {
        let Some(known) = self.pods.get(&update.uid).and_then(|p| p.deletion) else {
            return;
        };
        let newer = update
            .deletion
            .and_then(|new| match (known.grace, new.grace) {
                (Some(known), Some(grace)) => {
                    (grace < known).then_some(Deletion { seen: now, ..new })
                }
                (known, grace) => (known.is_none() && grace.is_some()).then_some(new),
            });
        update.deletion = Some(newer.unwrap_or(known));
    }
}

/// Finds the configuration of the API server: the service account, or else `$KUBECONFIG`.
/// `None`, with a line in the log, if there is neither or `mode` is off.
///
/// # Errors
/// [`KubeError`] if a configuration exists and can't be used.
async fn client(mode: KubeMode) -> Result<Option<Client>, KubeError> {
    let set = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    let config = match mode {
        KubeMode::Off => {
            info!("no API server: --kube=off");
            return Ok(None);
        }
        KubeMode::Auto if set("KUBERNETES_SERVICE_HOST") => {
            Config::incluster().map_err(KubeError::ServiceAccount)?
        }
        KubeMode::Auto if set("KUBECONFIG") => {
            let options = KubeConfigOptions::default();
            Config::from_kubeconfig(&options)
                .await
                .map_err(KubeError::Kubeconfig)?
        }
        KubeMode::Auto => {
            info!("no API server: found neither a service account nor $KUBECONFIG");
            return Ok(None);
        }
    };
    Client::try_from(with_limits(config))
        .map(Some)
        .map_err(KubeError::Client)
}

/// Sets [`READ_TIMEOUT`], unless `config` has a timeout, and turns the client's retries off: it would repeat a
/// request that gets 429, 503 or 504 up to 15 times, the first time after 5 ms. The callers here retry with their own
/// backoff.
fn with_limits(mut config: Config) -> Config {
    config.read_timeout.get_or_insert(READ_TIMEOUT);
    config.default_retry = false;
    config
}

/// The API server's view of this node's pods. Dropping it ends the watch.
pub struct Kube {
    /// `None`: there is no API server.
    client: Option<Client>,
    is_up: Arc<AtomicBool>,
    pods: watch::Receiver<Arc<KubePods>>,
    namespaces: watch::Receiver<Arc<NamespaceAnnotations>>,
    _watches: Vec<AbortOnDropHandle<()>>,
}

impl Kube {
    /// Without an API server: everything stays unknown.
    pub fn off() -> Self {
        Self {
            client: None,
            is_up: Arc::default(),
            pods: watch::Sender::default().subscribe(),
            namespaces: watch::Sender::default().subscribe(),
            _watches: vec![],
        }
    }

    /// Finds the API server by `mode`, and starts to watch the pods of `node` (`$NODE_NAME`). Does not wait for
    /// the server. An update that changes a [`KubePod`] notifies `changes`. Any other one counts as a change of
    /// status, because the runtime may have done something.
    ///
    /// # Errors
    /// [`KubeError`] if a configuration exists and can't be used.
    pub async fn start(
        mode: KubeMode,
        node: Option<&str>,
        changes: &Arc<ChangeNotifier>,
    ) -> Result<Self, KubeError> {
        match client(mode).await? {
            None => Ok(Self::off()),
            Some(client) => {
                let node = node
                    .filter(|n| !n.is_empty())
                    .ok_or(KubeError::NoNodeName)?;
                Ok(Self::watch(client, node, changes))
            }
        }
    }

    /// Watches the pods of `node` with this client.
    pub fn watch(client: Client, node: &str, changes: &Arc<ChangeNotifier>) -> Self {
        let api: Api<PodMeta> = Api::all(client.clone());
        let config = from_cache().fields(&format!("spec.nodeName={node}"));
        let events = watcher(api, config).default_backoff();
        let (sender, pods) = watch::channel(Arc::default());
        let is_up = Arc::<AtomicBool>::default();
        let of_pods = tokio::spawn(follow(
            events,
            sender,
            Arc::clone(changes),
            Arc::clone(&is_up),
        ));
        let (sender, namespaces) = watch::channel(Arc::default());
        let of_namespaces = namespaces::follow(client.clone(), sender);
        let of_namespaces = tokio::spawn(of_namespaces);
        Self {
            client: Some(client),
            is_up,
            pods,
            namespaces,
            _watches: [of_pods, of_namespaces].map(AbortOnDropHandle::new).into(),
        }
    }

    /// A client of the API server, if there is one.
    pub const fn client(&self) -> Option<&Client> {
        self.client.as_ref()
    }

    /// Whether the API server answers the watch: its last answer was no error. `None` without an API server.
    pub fn is_up(&self) -> Option<bool> {
        let is_up = self.is_up.load(Ordering::Relaxed);
        self.client.is_some().then_some(is_up)
    }

    /// Waits until one of the watches has ended, which happens only if it has panicked. Without an API server, for ever.
    pub(crate) fn ended(&self) -> impl Future<Output = ()> + use<> {
        let (mut pods, mut namespaces) = (self.pods(), self.namespaces());
        let has_watches = self.client.is_some();
        async move {
            if !has_watches {
                std::future::pending::<()>().await;
            }
            tokio::select! {
                () = async { while pods.changed().await.is_ok() {} } => {}
                () = async { while namespaces.changed().await.is_ok() {} } => {}
            }
        }
    }

    /// The pods, which the watch keeps current.
    pub fn pods(&self) -> watch::Receiver<Arc<KubePods>> {
        self.pods.clone()
    }

    /// The annotations of namespaces, which the watch keeps current.
    pub fn namespaces(&self) -> watch::Receiver<Arc<NamespaceAnnotations>> {
        self.namespaces.clone()
    }

    /// Whether the API server decides about the end of `pod`: there is one, and the pod is not a static one.
    pub fn decides_end_of(&self, pod: &Pod) -> bool {
        self.client.is_some() && !is_static(&pod.annotations)
    }

    /// Whether `pod` is being deleted. `None` if that is unknown: there is no API server, it does not answer, or the
    /// pod is a static one, whose end the API server does not decide.
    ///
    /// The watch may be a little behind the kubelet, so this waits up to `wait` ([`LONGEST_WAIT`] at most) for it.
    /// Then it gets this one pod from the server, once, within half a second.
    pub async fn is_deleting(&self, pod: &Pod, wait: Duration) -> Option<bool> {
        let client = self.client.as_ref()?;
        if !self.decides_end_of(pod) {
            return None;
        }
        let uid = &pod.name.uid;
        let mut pods = self.pods.clone();
        let reported = timeout(
            wait.min(LONGEST_WAIT),
            pods.wait_for(|p| p.is_deleting(uid)),
        )
        .await
        .is_ok_and(|waited| waited.is_ok());
        if reported {
            return Some(true);
        }
        Some(get(client, &pod.name).await? != PodState::Running)
    }

    /// Whether the API server says that this pod is gone, or that another pod has its name. `None` if it does not answer.
    pub async fn is_removed(&self, pod: &PodName) -> Option<bool> {
        let state = get(self.client.as_ref()?, pod).await?;
        Some(state == PodState::Gone)
    }
}

/// The configuration of a watch whose list comes from the API server's cache, which has an index of pods by node. A
/// consistent list would be read from etcd, by every node of the cluster whenever the server restarts.
fn from_cache() -> watcher::Config {
    let mut config = watcher::Config::default().any_semantic();
    // With a page size, kube-rs requests a consistent list after all. A node has a few hundred pods.
    config.page_size = None;
    config
}

/// What the API server says of one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PodState {
    /// It does not exist, or another pod has its name.
    Gone,
    /// It is being deleted.
    Ending,
    Running,
}

/// Gets one pod from the API server; `None` if the server does not answer in time.
async fn get(client: &Client, pod: &PodName) -> Option<PodState> {
    let api: Api<PodMeta> = Api::namespaced(client.clone(), &pod.namespace);
    match timeout(GET_TIMEOUT, api.get_opt(&pod.name)).await {
        Ok(Ok(None)) => Some(PodState::Gone),
        Ok(Ok(Some(found))) => {
            let found = reduce(found.metadata)?;
            Some(if found.uid != pod.uid {
                PodState::Gone
            } else if found.deletion.is_some() {
                PodState::Ending
            } else {
                PodState::Running
            })
        }
        Ok(Err(e)) => {
            debug!(error = %e, %pod, "cannot get the pod from the API server, to see whether it is being deleted");
            None
        }
        Err(_) => {
            debug!(%pod, "the API server did not answer in time");
            None
        }
    }
}

impl std::fmt::Debug for Kube {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kube")
            .field("off", &self.client.is_none())
            .finish_non_exhaustive()
    }
}

/// Applies the events of the watch to `sender`. A list replaces the known pods only when it is complete.
async fn follow(
    events: impl Stream<Item = watcher::Result<Event<PodMeta>>>,
    sender: watch::Sender<Arc<KubePods>>,
    changes: Arc<ChangeNotifier>,
    is_up: Arc<AtomicBool>,
) {
    let mut events = std::pin::pin!(events);
    let mut listing = HashMap::new();
    let mut away = false;
    let mut source = None;
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            // The server's history no longer has the last resource version: the watcher lists again.
            Err(watcher::Error::WatchError(status)) if status.code == 410 => {
                debug!("the watch on pods is too far behind; listing them again");
                continue;
            }
            Err(e) => {
                if !away {
                    warn!("{}; using the last known pods", trouble(&e));
                }
                away = true;
                is_up.store(false, Ordering::Relaxed);
                source = None;
                continue;
            }
        };
        // `Init` comes before the server has answered.
        if !matches!(event, Event::Init) {
            is_up.store(true, Ordering::Relaxed);
        }
        if away && !matches!(event, Event::Init) {
            away = false;
            info!("the API server is back");
        }
        if !matches!(event, Event::Init | Event::InitApply(_)) {
            source.get_or_insert_with(|| changes.add_source(ChangeSource::Api));
        }
        match event {
            Event::Init => listing = HashMap::new(),
            Event::InitApply(meta) => {
                let since = since_deletion(&meta, SystemTime::now());
                let Some(mut pod) = reduce(meta.metadata) else {
                    continue;
                };
                if let Some(deletion) = &mut pod.deletion {
                    deletion.seen = deletion.seen.before(since);
                }
                listing.insert(pod.uid.clone(), pod);
            }
            Event::InitDone => {
                let mut pods = std::mem::take(&mut listing);
                let known = sender.borrow().clone();
                let now = BootTime::now();
                pods.values_mut()
                    .for_each(|pod| known.keep_deletion(pod, now));
                sender.send_replace(Arc::new(KubePods { synced: true, pods }));
                changes.notify();
            }
            Event::Apply(meta) => {
                let Some(mut pod) = reduce(meta.metadata) else {
                    continue;
                };
                let changed = sender.send_if_modified(|all| {
                    all.keep_deletion(&mut pod, BootTime::now());
                    // Status updates, which are most events, change nothing that is kept.
                    let changed = all.pods.get(&pod.uid) != Some(&pod);
                    if changed {
                        Arc::make_mut(all).pods.insert(pod.uid.clone(), pod);
                    }
                    changed
                });
                if changed {
                    changes.notify();
                } else {
                    changes.notify_status();
                }
            }
            Event::Delete(meta) => {
                let Some(pod) = reduce(meta.metadata) else {
                    continue;
                };
                sender.send_if_modified(|all| Arc::make_mut(all).pods.remove(&pod.uid).is_some());
                changes.notify();
            }
        }
    }
}

/// The answer of the API server that refuses the request, if that is the error.
fn refusal(error: &watcher::Error) -> Option<&kube::core::Status> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = cause {
        if let Some(kube::Error::Api(status)) = e.downcast_ref() {
            return Some(status);
        }
        cause = e.source();
    }
    None
}

/// What is wrong with the API server, on one line.
fn trouble(error: &watcher::Error) -> String {
    if let Some(status) = refusal(error) {
        return format!("the API server refuses to list or watch pods: {status}");
    }
    if let watcher::Error::WatchError(status) = error {
        return format!("the API server ended the watch on pods: {status}");
    }
    format!("API server unreachable: {}", one_line(error))
}

/// How long ago a pod was first deleted, by the API server's clock: a deletionTimestamp is the moment of the first delete
/// and the grace period of the last one (`BeforeDelete`). Zero if the pod is not being deleted, or if that clock is ahead.
fn since_deletion(meta: &PodMeta, now: SystemTime) -> Duration {
    let meta = &meta.metadata;
    let grace = meta.deletion_grace_period_seconds.unwrap_or_default();
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or_default());
    let ends = meta
        .deletion_timestamp
        .as_ref()
        .map(|t| SystemTime::from(t.0));
    let began = ends.and_then(|ends| ends.checked_sub(grace));
    began
        .and_then(|began| now.duration_since(began).ok())
        .unwrap_or_default()
}

/// What ebb keeps of a pod. `None` without a UID, which the API server always sets.
fn reduce(meta: ObjectMeta) -> Option<KubePod> {
    let mut annotations = meta.annotations.unwrap_or_default();
    // Annotations of other programs are not needed, and may be large.
    annotations.retain(|name, _| {
        name.starts_with(PREFIX) || [CONFIG_SOURCE, CONFIG_MIRROR].contains(&name.as_str())
    });
    let mirrored = annotations.get(CONFIG_MIRROR).map(PodUid::new);
    let deletion = meta
        .deletion_timestamp
        .filter(|_| mirrored.is_none())
        .map(|_| Deletion {
            grace: meta
                .deletion_grace_period_seconds
                .and_then(|s| u64::try_from(s).ok())
                .map(Duration::from_secs),
            seen: BootTime::now(),
        });
    Some(KubePod {
        uid: match mirrored {
            Some(uid) => uid,
            None => PodUid::new(meta.uid?),
        },
        namespace: meta.namespace.unwrap_or_default(),
        name: meta.name.unwrap_or_default(),
        deletion,
        annotations,
    })
}

/// Whether these are the annotations of a static pod: one that the kubelet has from a file or a URL.
pub(crate) fn is_static(annotations: &BTreeMap<String, String>) -> bool {
    annotations
        .get(CONFIG_SOURCE)
        .is_some_and(|source| source != "api")
}

#[cfg(test)]
mod tests;
