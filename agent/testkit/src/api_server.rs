//! A simulated API server, because kube-apiserver is not among the parts.
//!
//! It implements the part of the real server's HTTP API that a node agent needs: list, get and watch of pods, list and
//! watch of namespaces, whole or as PartialObjectMetadata (versions, bookmarks, `timeoutSeconds`, resuming from a version,
//! 410 if that is too old, field selectors, Status objects), create and patch of Events, and `pods/exec` for the kubectl
//! plugin. It has neither TLS nor authentication, unless it is started [secured](ApiServer::start_secured), and
//! validates little. Tests can inject faults ([`Faults`], [`ApiServer::leave`]), and it records all requests.

mod accept;
mod answer;
mod exec;
mod secured;
mod store;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::kubelet::{Kubelet, PodSpec, StartedPod};
use accept::ListenerCommand;
use exec::ExecTarget;
use secured::Secured;
use store::{Key, Store};

pub use accept::Away;

/// How the server answers a kind of request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AnswerMode {
    /// Like a healthy server.
    #[default]
    Good,
    /// Like a healthy server, but after this delay.
    After(Duration),
    /// With a Status with this code.
    Status(u16),
    /// Never; the connection stays open.
    Never,
}

/// When watches send a change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Delivery {
    /// At once.
    #[default]
    AtOnce,
    /// This long after the change.
    After(Duration),
    /// Never; the watch stays open, without bookmarks.
    Stalled,
}

/// The faults of the server; by default it has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Lists of pods.
    pub lists: AnswerMode,
    /// Starts of watches.
    pub watches: AnswerMode,
    /// Gets of one pod.
    pub gets: AnswerMode,
    /// Creates and patches of Events.
    pub events: AnswerMode,
    /// Lists and watches of namespaces. The faults of watches below are those of watches on pods.
    pub namespaces: AnswerMode,
    /// When watches send changes.
    pub delivery: Delivery,
    /// Watches send every change twice.
    pub twice: bool,
    /// After each change, watches send the previous change again.
    pub replay_previous: bool,
    /// The next change breaks the connections of watches in the middle of its line.
    pub torn: bool,
}

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiVerb {
    /// List pods.
    List,
    /// Watch pods.
    Watch,
    /// Get one pod.
    Get,
    /// Create an Event.
    CreateEvent,
    /// Patch an Event.
    PatchEvent,
    /// List namespaces.
    ListNamespaces,
    /// Watch namespaces.
    WatchNamespaces,
    /// Any other request.
    Other,
}

/// A request that the server received.
#[derive(Debug, Clone)]
pub struct RecordedRequest {
    /// The kind of request.
    pub verb: ApiVerb,
    /// The path.
    pub path: String,
    /// The query.
    pub query: BTreeMap<String, String>,
    /// Whether it asked for PartialObjectMetadata.
    pub metadata: bool,
    /// When it arrived.
    pub at: Instant,
}

/// A running server. Dropping it ends it and its connections.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<ServerShared>,
    orders: mpsc::UnboundedSender<(ListenerCommand, oneshot::Sender<io::Result<()>>)>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct ServerShared {
    secured: Option<Secured>,
    state: Mutex<ServerState>,
    /// Notified of every change of the state.
    changed: tokio::sync::watch::Sender<()>,
}

#[derive(Debug)]
struct ServerState {
    store: Store,
    namespaces: Store,
    events: BTreeMap<Key, Value>,
    exec_targets: HashMap<Key, ExecTarget>,
    faults: Faults,
    requests: Vec<RecordedRequest>,
    /// The number of [`ApiServer::end_watches`] calls. A watch ends when it grows.
    endings: u64,
    watching: usize,
}

impl ServerState {
    /// The objects that this kind of request is about.
    fn store_of(&self, verb: ApiVerb) -> &Store {
        match ServerShared::is_of_namespaces(verb) {
            true => &self.namespaces,
            false => &self.store,
        }
    }
}

impl ServerShared {
    fn state(&self) -> MutexGuard<'_, ServerState> {
        // The state is consistent even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The objects that this verb lists or watches.
    fn is_of_namespaces(verb: ApiVerb) -> bool {
        matches!(verb, ApiVerb::ListNamespaces | ApiVerb::WatchNamespaces)
    }

    fn change<T>(&self, f: impl FnOnce(&mut ServerState) -> T) -> T {
        let out = f(&mut self.state());
        self.changed.send_replace(());
        out
    }
}

impl ApiServer {
    /// Starts a server without pods on this address.
    ///
    /// # Errors
    /// If it can't listen there.
    pub async fn start(address: SocketAddr) -> io::Result<Self> {
        let listener = tokio::net::TcpListener::bind(address).await?;
        Self::serve(listener, None)
    }

    /// Starts a server that accepts only TLS, and answers 401 to requests without the token of
    /// [`Self::service_account`].
    ///
    /// # Errors
    /// If it can't listen there or make a certificate.
    pub async fn start_secured(address: SocketAddr) -> io::Result<Self> {
        let listener = tokio::net::TcpListener::bind(address).await?;
        let secured = Secured::new(listener.local_addr()?)?;
        Self::serve(listener, Some(secured))
    }

    fn serve(listener: tokio::net::TcpListener, secured: Option<Secured>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let shared = Arc::new(ServerShared {
            secured,
            state: Mutex::new(ServerState {
                store: Store::new(),
                namespaces: Store::new(),
                events: BTreeMap::new(),
                exec_targets: HashMap::new(),
                faults: Faults::default(),
                requests: Vec::new(),
                endings: 0,
                watching: 0,
            }),
            changed: tokio::sync::watch::Sender::new(()),
        });
        let (orders, to_do) = mpsc::unbounded_channel();
        let task = tokio::spawn(accept::run(listener, address, Arc::clone(&shared), to_do));
        Ok(Self {
            address,
            shared,
            orders,
            task,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes a kubeconfig for this server.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn kubeconfig(&self, path: &Path) -> io::Result<()> {
        let cluster = serde_json::json!({"server": format!("http://{}", self.address)});
        write_kubeconfig(path, cluster, serde_json::json!({}))
    }

    /// Writes a kubeconfig for this secured server, with the files of [`Self::service_account`] in `account`.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn kubeconfig_with(&self, account: &Path, path: &Path) -> io::Result<()> {
        let cluster = serde_json::json!({
            "server": format!("https://{}", self.address),
            "certificate-authority": account.join("ca.crt"),
        });
        let user = serde_json::json!({"tokenFile": account.join("token")});
        write_kubeconfig(path, cluster, user)
    }

    /// Writes the files of a service account into a directory: token, certificate and namespace.
    ///
    /// # Errors
    /// If they can't be written, or the server is not secured.
    pub fn service_account(&self, directory: &Path) -> io::Result<()> {
        let open = || io::Error::other("the server is not secured");
        self.shared
            .secured
            .as_ref()
            .ok_or_else(open)?
            .write(directory)
    }

    /// Runs the commands of `pods/exec` in this pod's containers.
    pub fn allow_exec(&self, pod: &StartedPod, kubelet: Kubelet) {
        let target = ExecTarget {
            kubelet,
            pod: pod.clone(),
        };
        let mut state = self.shared.state();
        state.exec_targets.insert(key(&pod.spec), target);
    }

    /// Creates a pod, bound to this node.
    pub fn create(&self, pod: &PodSpec, node: &str) {
        self.shared.change(|state| state.store.create(pod, node));
    }

    /// Sets or removes an annotation. Returns whether the pod exists.
    pub fn annotate(&self, pod: &PodSpec, name: &str, value: Option<&str>) -> bool {
        self.modify(pod, |pod| {
            let patch = serde_json::json!({"metadata": {"annotations": {name: value}}});
            store::merge(pod, patch);
        })
    }

    /// Sets or removes an annotation of a namespace, which is created if it does not exist.
    pub fn annotate_namespace(&self, name: &str, annotation: &str, value: Option<&str>) {
        self.shared
            .change(|state| state.namespaces.annotate_namespace(name, annotation, value));
    }

    /// Changes the status of a pod, the most frequent change, which leaves the metadata as it is. Returns whether the
    /// pod exists.
    pub fn set_phase(&self, pod: &PodSpec, phase: &str) -> bool {
        self.modify(pod, |pod| pod["status"]["phase"] = phase.into())
    }

    /// Sets a pod's addresses. Returns whether the pod exists.
    pub fn set_addresses(&self, pod: &PodSpec, addresses: &[&str]) -> bool {
        let ips: Vec<_> = addresses
            .iter()
            .map(|ip| serde_json::json!({"ip": ip}))
            .collect();
        self.modify(pod, |pod| pod["status"]["podIPs"] = ips.into())
    }

    /// Deletes a pod with a grace period. Returns whether the pod exists.
    pub fn delete(&self, pod: &PodSpec, grace: Duration) -> bool {
        let key = key(pod);
        self.shared.change(|state| state.store.delete(&key, grace))
    }

    /// Removes a pod, as after the kubelet has ended it. Returns whether the pod existed.
    pub fn remove(&self, pod: &PodSpec) -> bool {
        let key = key(pod);
        self.shared.change(|state| state.store.remove(&key))
    }

    fn modify(&self, pod: &PodSpec, change: impl FnOnce(&mut Value)) -> bool {
        let key = key(pod);
        self.shared.change(|state| state.store.modify(&key, change))
    }

    /// Sets the faults from now on.
    pub fn misbehave(&self, faults: Faults) {
        self.shared.change(|state| state.faults = faults);
    }

    /// Drops the change history: open watches, and watches from an earlier version, get 410.
    pub fn forget(&self) {
        self.shared.change(|state| state.store.forget());
    }

    /// Ends all watches as at their timeout.
    pub fn end_watches(&self) {
        self.shared.change(|state| state.endings += 1);
    }

    /// Resets all connections and serves none until [`Self::come_back`].
    ///
    /// # Errors
    /// If the server has ended.
    pub async fn leave(&self, how: Away) -> io::Result<()> {
        self.order(ListenerCommand::Leave(how)).await
    }

    /// Serves again after [`Self::leave`].
    ///
    /// # Errors
    /// If it can't listen on the address again.
    pub async fn come_back(&self) -> io::Result<()> {
        self.order(ListenerCommand::ComeBack).await
    }

    async fn order(&self, order: ListenerCommand) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        let ended = || io::Error::other("the server has ended");
        self.orders.send((order, done)).map_err(|_| ended())?;
        wait.await.map_err(|_| ended())?
    }

    /// All requests so far but those for namespaces, in order.
    pub fn requests(&self) -> Vec<RecordedRequest> {
        let mut requests = self.shared.state().requests.clone();
        requests.retain(|request| !ServerShared::is_of_namespaces(request.verb));
        requests
    }

    /// The number of requests of this kind so far.
    pub fn count(&self, verb: ApiVerb) -> usize {
        let state = self.shared.state();
        state.requests.iter().filter(|a| a.verb == verb).count()
    }

    /// How many watches on pods are open.
    pub fn watching(&self) -> usize {
        self.shared.state().watching
    }

    /// The stored Events, oldest first.
    pub fn events(&self) -> Vec<Value> {
        let mut events: Vec<_> = self.shared.state().events.values().cloned().collect();
        events.sort_by_key(|event| event["eventTime"].as_str().map(str::to_owned));
        events
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn write_kubeconfig(path: &Path, cluster: Value, user: Value) -> io::Result<()> {
    let config = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{"name": "it", "cluster": cluster}],
        "users": [{"name": "it", "user": user}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    });
    fs::write(path, config.to_string())
}

fn key(pod: &PodSpec) -> Key {
    (pod.namespace.clone(), pod.name.clone())
}
