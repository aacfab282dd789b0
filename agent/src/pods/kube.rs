//! What the API server says of this node's pods: above all, which of them are being deleted.
//!
//! One metadata watch per node, on `spec.nodeName`, listed from the API server's cache (as the kubelet
//! itself does) and kept up with bookmarks. Metadata suffices: deletionTimestamp, the grace period and the
//! annotations are all there, and spec and status are never sent. Each object is reduced to a [`KubePod`]
//! as it arrives.
//!
//! While the API server is away the last known state stays, and the watch is tried again with backoff.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1 as core;
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

use super::Pod;
use crate::ids::PodUid;

/// Set by the kubelet on every pod it runs: `api`, or where a static pod came from
/// (`ConfigSourceAnnotationKey`, `pkg/kubelet/types/pod_update.go`).
const CONFIG_SOURCE: &str = "kubernetes.io/config.source";

/// Set on mirror pods: the UID that the static pod has on its node, which is not the mirror's
/// (`ConfigMirrorAnnotationKey`; `CreateMirrorPod` in `pkg/kubelet/pod/mirror_client.go`).
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// The longest that [`Kube::is_deleting`] waits for the watch. Against a real kubelet the watch was at most
/// a few milliseconds behind StopContainer.
pub const LONGEST_WAIT: Duration = Duration::from_millis(300);

/// How long the one question to the API server may take: a stop is waiting for it.
const GET_TIMEOUT: Duration = Duration::from_millis(500);

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

/// A configuration that is there and can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeError {
    /// In a cluster, but the pod's service account can't be read.
    #[error("cannot read this pod's service account; mount its token, or set --kube=off")]
    ServiceAccount(#[source] InClusterError),
    /// `$KUBECONFIG` is set and no good.
    #[error("cannot use the file that $KUBECONFIG names; mend it, unset it, or set --kube=off")]
    Kubeconfig(#[source] KubeconfigError),
    /// No client can be made of it.
    #[error("cannot make a client for the API server; mend its configuration, or set --kube=off")]
    Client(#[source] kube::Error),
    /// It is not known which node this is.
    #[error("NODE_NAME is not set; set it to the pod's spec.nodeName, or set --kube=off")]
    NoNodeName,
}

/// A pod's deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// `metadata.deletionGracePeriodSeconds`. A later delete may shorten it.
    pub grace: Option<Duration>,
}

/// A pod, as far as the API server's word is needed.
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
    /// Its annotations as they are now.
    pub annotations: BTreeMap<String, String>,
}

/// This node's pods by the API server.
#[derive(Clone, Debug, Default)]
pub struct KubePods {
    /// Whether a complete list was ever received. It is kept when the server goes away.
    pub synced: bool,
    /// The pods.
    pub pods: HashMap<PodUid, KubePod>,
}

impl KubePods {
    /// Whether this pod is known to be on its way out.
    pub fn is_deleting(&self, uid: &PodUid) -> bool {
        self.pods.get(uid).is_some_and(|p| p.deletion.is_some())
    }
}

/// Finds the configuration of the API server: the service account, or else `$KUBECONFIG`.
/// `None`, with one line in the log, if there is neither or `mode` says off.
///
/// # Errors
/// [`KubeError`] if there is one that can't be used.
pub async fn client(mode: KubeMode) -> Result<Option<Client>, KubeError> {
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
            info!("no API server: neither a service account nor $KUBECONFIG is there");
            return Ok(None);
        }
    };
    Client::try_from(config)
        .map(Some)
        .map_err(KubeError::Client)
}

/// The API server's word on this node's pods. Its watch ends when it is dropped.
pub struct Kube {
    /// `None`: there is no API server.
    client: Option<Client>,
    pods: watch::Receiver<Arc<KubePods>>,
    _watch: Option<AbortOnDropHandle<()>>,
}

impl Kube {
    /// No API server: nothing is ever known.
    pub fn off() -> Self {
        Self {
            client: None,
            pods: watch::Sender::default().subscribe(),
            _watch: None,
        }
    }

    /// Finds the API server as `mode` says, and begins to watch the pods of `node` (`$NODE_NAME`). Does not
    /// wait for the server.
    ///
    /// # Errors
    /// [`KubeError`] if there is a configuration that can't be used.
    pub async fn start(mode: KubeMode, node: Option<&str>) -> Result<Self, KubeError> {
        match client(mode).await? {
            None => Ok(Self::off()),
            Some(client) => {
                let node = node
                    .filter(|n| !n.is_empty())
                    .ok_or(KubeError::NoNodeName)?;
                Ok(Self::watch(client, node))
            }
        }
    }

    /// Watches the pods of `node` with this client.
    pub fn watch(client: Client, node: &str) -> Self {
        let api: Api<PodMeta> = Api::all(client.clone());
        // Any: from the API server's cache, which holds pods by node. A consistent list would be
        // read from etcd, by every node of the cluster whenever the server restarts.
        let mut config = watcher::Config::default()
            .any_semantic()
            .fields(&format!("spec.nodeName={node}"));
        // With a limit, kube-rs asks for the consistent list after all. A node has a few hundred pods.
        config.page_size = None;
        let events = watcher(api, config).default_backoff();
        let (sender, pods) = watch::channel(Arc::default());
        let task = tokio::spawn(follow(events, sender));
        Self {
            client: Some(client),
            pods,
            _watch: Some(AbortOnDropHandle::new(task)),
        }
    }

    /// The pods as the watch tells them.
    pub fn pods(&self) -> watch::Receiver<Arc<KubePods>> {
        self.pods.clone()
    }

    /// Whether `pod` is being deleted: `None` if that can't be known, because there is no API server, it
    /// does not answer, or the pod is a static one, whose end it does not decide.
    ///
    /// The watch may be a little behind the kubelet, so it gets up to `wait` ([`LONGEST_WAIT`] at most) to
    /// say so. Then the server is asked for this one pod, once, for half a second at most.
    pub async fn is_deleting(&self, pod: &Pod, wait: Duration) -> Option<bool> {
        let client = self.client.as_ref()?;
        if is_static(&pod.annotations) {
            return None;
        }
        let uid = &pod.name.uid;
        let mut pods = self.pods.clone();
        let told = timeout(
            wait.min(LONGEST_WAIT),
            pods.wait_for(|p| p.is_deleting(uid)),
        )
        .await
        .is_ok_and(|told| told.is_ok());
        if told {
            return Some(true);
        }
        let api: Api<PodMeta> = Api::namespaced(client.clone(), &pod.name.namespace);
        match timeout(GET_TIMEOUT, api.get_opt(&pod.name.name)).await {
            Ok(Ok(None)) => Some(true),
            Ok(Ok(Some(meta))) => match reduce(meta)? {
                // Another pod under its name: this one is gone.
                other if other.uid != *uid => Some(true),
                this => Some(this.deletion.is_some()),
            },
            Ok(Err(e)) => {
                debug!(error = %e, pod = pod.name.name, "the API server did not say whether it is being deleted");
                None
            }
            Err(_) => {
                debug!(pod = pod.name.name, "the API server did not answer in time");
                None
            }
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

/// Keeps `sender` up with the watch. A list replaces what was known only when it is complete.
async fn follow(
    events: impl Stream<Item = watcher::Result<Event<PodMeta>>>,
    sender: watch::Sender<Arc<KubePods>>,
) {
    let mut events = std::pin::pin!(events);
    let mut listing = HashMap::new();
    let mut away = false;
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            // The place to go on from is no longer in the server's history: it is listed anew.
            Err(watcher::Error::WatchError(status)) if status.code == 410 => {
                debug!("the watch on pods is too far behind; listing them again");
                continue;
            }
            Err(e) => {
                if !away {
                    warn!(error = %e, "lost the API server; going on with what is known, and trying again");
                }
                away = true;
                continue;
            }
        };
        // A list begins before the server has answered.
        if away && !matches!(event, Event::Init) {
            away = false;
            info!("the API server is back");
        }
        match event {
            Event::Init => listing = HashMap::new(),
            Event::InitApply(meta) => listing.extend(reduce(meta).map(|p| (p.uid.clone(), p))),
            Event::InitDone => {
                let pods = std::mem::take(&mut listing);
                sender.send_replace(Arc::new(KubePods { synced: true, pods }));
            }
            Event::Apply(meta) => {
                let Some(pod) = reduce(meta) else { continue };
                sender.send_if_modified(|all| {
                    // Status updates, which are most events, change nothing that is kept.
                    let news = all.pods.get(&pod.uid) != Some(&pod);
                    if news {
                        Arc::make_mut(all).pods.insert(pod.uid.clone(), pod);
                    }
                    news
                });
            }
            Event::Delete(meta) => {
                let Some(pod) = reduce(meta) else { continue };
                sender.send_if_modified(|all| Arc::make_mut(all).pods.remove(&pod.uid).is_some());
            }
        }
    }
}

/// What is kept of a pod. `None` if it has no UID, which the API server does not do.
fn reduce(meta: PodMeta) -> Option<KubePod> {
    let meta = meta.metadata;
    let annotations = meta.annotations.unwrap_or_default();
    let mirrored = annotations.get(CONFIG_MIRROR).map(PodUid::new);
    let deletion = meta
        .deletion_timestamp
        .filter(|_| mirrored.is_none())
        .map(|_| Deletion {
            grace: meta
                .deletion_grace_period_seconds
                .and_then(|s| u64::try_from(s).ok())
                .map(Duration::from_secs),
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
fn is_static(annotations: &BTreeMap<String, String>) -> bool {
    annotations
        .get(CONFIG_SOURCE)
        .is_some_and(|source| source != "api")
}

#[cfg(test)]
mod tests;
