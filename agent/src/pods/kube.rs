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
    time::{Duration, SystemTime},
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

use super::{
    Pod,
    changes::{Changes, Teller},
};
use crate::{clock::BootTime, drain::policy::annotations::PREFIX, ids::PodUid};

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

/// How long the API server may say nothing in the middle of an answer. A watch lasts 290 s and has bookmarks; what
/// is silent for longer is dead. kube-rs itself waits for the beginning of an answer, and for a list, for ever.
const SILENT_FOR: Duration = Duration::from_secs(300);

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
    /// When this grace was first heard of, which is when it began, or somewhat later. If the pod was listed so, when it
    /// began by the API server's clock: the agent may have been started since.
    pub seen: BootTime,
}

impl Deletion {
    /// What is left of the grace, if there is one.
    pub fn left(self, now: BootTime) -> Option<Duration> {
        let grace = self.grace?;
        Some(grace.saturating_sub(now.since(self.seen)))
    }
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
    /// Its annotations as they are now: ebb's own, and those that tell a static pod.
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

    /// A deletion is never taken back, and its grace never grows (`BeforeDelete` in
    /// `staging/src/k8s.io/apiserver/pkg/registry/rest/delete.go`): news that say so are old. A list from the
    /// cache of another API server may be.
    fn still_deleting(&self, news: &mut KubePod) {
        let Some(known) = self.pods.get(&news.uid).and_then(|p| p.deletion) else {
            return;
        };
        let shorter = news.deletion.filter(|new| match (known.grace, new.grace) {
            (Some(known), Some(new)) => new < known,
            (known, new) => known.is_none() && new.is_some(),
        });
        news.deletion = Some(shorter.unwrap_or(known));
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
    Client::try_from(impatient(config))
        .map(Some)
        .map_err(KubeError::Client)
}

/// Has what is silent for longer than [`SILENT_FOR`] given up, unless `config` says otherwise, and each request made
/// once: the client would repeat what is answered with 429, 503 or 504 up to 15 times, beginning after 5 ms. What is
/// worth another try has a pace of its own here.
fn impatient(mut config: Config) -> Config {
    config.read_timeout.get_or_insert(SILENT_FOR);
    config.default_retry = false;
    config
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
    /// wait for the server. What is kept of a pod is a change when it is new; what is not is a hint: a status tells that
    /// the runtime has done something.
    ///
    /// # Errors
    /// [`KubeError`] if there is a configuration that can't be used.
    pub async fn start(
        mode: KubeMode,
        node: Option<&str>,
        changes: &Arc<Changes>,
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
    pub fn watch(client: Client, node: &str, changes: &Arc<Changes>) -> Self {
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
        let task = tokio::spawn(follow(events, sender, Arc::clone(changes)));
        Self {
            client: Some(client),
            pods,
            _watch: Some(AbortOnDropHandle::new(task)),
        }
    }

    /// A client of the API server, if there is one.
    pub const fn client(&self) -> Option<&Client> {
        self.client.as_ref()
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
    changes: Arc<Changes>,
) {
    let mut events = std::pin::pin!(events);
    let mut listing = HashMap::new();
    let mut away = false;
    let mut source = None;
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
                source = None;
                continue;
            }
        };
        // A list begins before the server has answered.
        if away && !matches!(event, Event::Init) {
            away = false;
            info!("the API server is back");
        }
        if !matches!(event, Event::Init | Event::InitApply(_)) {
            source.get_or_insert_with(|| changes.source(Teller::Api));
        }
        match event {
            Event::Init => listing = HashMap::new(),
            Event::InitApply(meta) => {
                let since = since_deletion(&meta, SystemTime::now());
                let Some(mut pod) = reduce(meta) else {
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
                pods.values_mut().for_each(|pod| known.still_deleting(pod));
                sender.send_replace(Arc::new(KubePods { synced: true, pods }));
                changes.tell();
            }
            Event::Apply(meta) => {
                let Some(mut pod) = reduce(meta) else {
                    continue;
                };
                let news = sender.send_if_modified(|all| {
                    all.still_deleting(&mut pod);
                    // Status updates, which are most events, change nothing that is kept.
                    let news = all.pods.get(&pod.uid) != Some(&pod);
                    if news {
                        Arc::make_mut(all).pods.insert(pod.uid.clone(), pod);
                    }
                    news
                });
                if news {
                    changes.tell();
                } else {
                    changes.hint();
                }
            }
            Event::Delete(meta) => {
                let Some(pod) = reduce(meta) else { continue };
                sender.send_if_modified(|all| Arc::make_mut(all).pods.remove(&pod.uid).is_some());
                changes.tell();
            }
        }
    }
}

/// How long ago a pod was deleted, by the clock of the API server: a deletionTimestamp is when the grace ends
/// (`BeforeDelete`). Zero if it was not, or only in the future.
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

/// What is kept of a pod. `None` if it has no UID, which the API server does not do.
fn reduce(meta: PodMeta) -> Option<KubePod> {
    let meta = meta.metadata;
    let mut annotations = meta.annotations.unwrap_or_default();
    // What other programs write there is no news, and may be large.
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
fn is_static(annotations: &BTreeMap<String, String>) -> bool {
    annotations
        .get(CONFIG_SOURCE)
        .is_some_and(|source| source != "api")
}

#[cfg(test)]
mod tests;
