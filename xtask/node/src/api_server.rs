//! A stand-in for the cluster's API server, because no kube-apiserver is to be had here.
//!
//! It speaks the protocol of the real one over HTTP, as far as a node agent needs it: pods, whole or as
//! PartialObjectMetadata, to list, get and watch (versions, bookmarks, `timeoutSeconds`, going on from a
//! version, 410 when that is too old, field selectors, Status objects), and Events to create and patch.
//! It is as open as can be, unless it is started [secured](ApiServer::start_secured), and validates little. Beyond that it misbehaves as it is told ([`Faults`],
//! [`ApiServer::leave`]), and keeps account of what was asked of it.

mod accept;
mod answer;
mod secured;
mod store;
mod watch;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::kubelet::PodSpec;
use accept::Order;
use secured::Secured;
use store::{Key, Store};

pub use accept::Away;

/// How a kind of request is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Answer {
    /// As a healthy server does.
    #[default]
    Good,
    /// As a healthy server does, but so late.
    After(Duration),
    /// With a Status of this code.
    Status(u16),
    /// Not at all; the connection stays open.
    Never,
}

/// When what has changed is told to those who watch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Delivery {
    /// At once.
    #[default]
    AtOnce,
    /// So long after it happened.
    After(Duration),
    /// Never; the watch stays open, and there are no bookmarks either.
    Stalled,
}

/// How the server misbehaves; by default it does not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Lists of pods.
    pub lists: Answer,
    /// The beginnings of watches.
    pub watches: Answer,
    /// Questions for one pod.
    pub gets: Answer,
    /// Events that are created or patched.
    pub events: Answer,
    /// What watches tell.
    pub delivery: Delivery,
    /// Watches tell every change twice.
    pub twice: bool,
    /// Watches tell the change before once more after each one.
    pub old_news: bool,
    /// Watches break in the middle of the next change.
    pub torn: bool,
}

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// All pods that are selected.
    List,
    /// What changes of them.
    Watch,
    /// One pod.
    Get,
    /// A new Event.
    CreateEvent,
    /// Another count of an Event.
    PatchEvent,
    /// Something that this server does not have.
    Other,
}

/// A request, as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// What was asked.
    pub verb: Verb,
    /// The path.
    pub path: String,
    /// The query.
    pub query: BTreeMap<String, String>,
    /// Whether no more than metadata was asked for.
    pub metadata: bool,
    /// When.
    pub at: Instant,
}

/// A running server. Dropping it ends it and its connections.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    orders: mpsc::UnboundedSender<(Order, oneshot::Sender<io::Result<()>>)>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    secured: Option<Secured>,
    state: Mutex<State>,
    /// Told of every change of the state.
    changed: tokio::sync::watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    store: Store,
    events: BTreeMap<Key, Value>,
    faults: Faults,
    asked: Vec<Asked>,
    /// Watches that began before the last one of these end.
    endings: u64,
    watching: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every use, also by a test that has failed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let out = f(&mut self.state());
        self.changed.send_replace(());
        out
    }
}

impl ApiServer {
    /// Starts a server without pods on this address.
    ///
    /// # Errors
    /// If it can't be had.
    pub async fn start(address: SocketAddr) -> io::Result<Self> {
        let listener = tokio::net::TcpListener::bind(address).await?;
        Self::serve(listener, None)
    }

    /// Starts a server that speaks TLS alone, and answers 401 to whoever does not have the token of
    /// [`Self::service_account`].
    ///
    /// # Errors
    /// If the address can't be had, or no certificate made.
    pub async fn start_secured(address: SocketAddr) -> io::Result<Self> {
        let listener = tokio::net::TcpListener::bind(address).await?;
        let secured = Secured::new(listener.local_addr()?)?;
        Self::serve(listener, Some(secured))
    }

    fn serve(listener: tokio::net::TcpListener, secured: Option<Secured>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            secured,
            state: Mutex::new(State {
                store: Store::new(),
                events: BTreeMap::new(),
                faults: Faults::default(),
                asked: Vec::new(),
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

    /// Writes a kubeconfig that leads here.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn kubeconfig(&self, path: &Path) -> io::Result<()> {
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "it", "user": {}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        });
        fs::write(path, config.to_string())
    }

    /// Writes into a directory what a pod's service account has: token, certificate and namespace.
    ///
    /// # Errors
    /// If it can't be written, or the server is not secured.
    pub fn service_account(&self, directory: &Path) -> io::Result<()> {
        let open = || io::Error::other("the server is not secured");
        self.shared
            .secured
            .as_ref()
            .ok_or_else(open)?
            .write(directory)
    }

    /// A pod is made, and bound to this node.
    pub fn create(&self, pod: &PodSpec, node: &str) {
        self.shared.change(|state| state.store.create(pod, node));
    }

    /// Sets an annotation, or takes it away. Whether there is such a pod.
    pub fn annotate(&self, pod: &PodSpec, name: &str, value: Option<&str>) -> bool {
        self.modify(pod, |pod| {
            let patch = serde_json::json!({"metadata": {"annotations": {name: value}}});
            store::merge(pod, patch);
        })
    }

    /// Changes the status of a pod: what happens most, and says nothing of its metadata. Whether there is
    /// such a pod.
    pub fn set_phase(&self, pod: &PodSpec, phase: &str) -> bool {
        self.modify(pod, |pod| pod["status"]["phase"] = phase.into())
    }

    /// Somebody deletes a pod: it is to end within `grace`. Whether there is such a pod.
    pub fn delete(&self, pod: &PodSpec, grace: Duration) -> bool {
        let key = key(pod);
        self.shared.change(|state| state.store.delete(&key, grace))
    }

    /// The kubelet has ended a pod: it is gone. Whether there was such a pod.
    pub fn remove(&self, pod: &PodSpec) -> bool {
        let key = key(pod);
        self.shared.change(|state| state.store.remove(&key))
    }

    fn modify(&self, pod: &PodSpec, change: impl FnOnce(&mut Value)) -> bool {
        let key = key(pod);
        self.shared.change(|state| state.store.modify(&key, change))
    }

    /// Misbehaves so from now on.
    pub fn misbehave(&self, faults: Faults) {
        self.shared.change(|state| state.faults = faults);
    }

    /// Forgets what has changed until now: whoever watches, or goes on from a version, is told 410.
    pub fn forget(&self) {
        self.shared.change(|state| state.store.forget());
    }

    /// Ends all watches as when their time is over.
    pub fn end_watches(&self) {
        self.shared.change(|state| state.endings += 1);
    }

    /// Goes away, with a reset of every connection, until [`Self::come_back`].
    ///
    /// # Errors
    /// If the server has ended.
    pub async fn leave(&self, how: Away) -> io::Result<()> {
        self.order(Order::Leave(how)).await
    }

    /// Is there again.
    ///
    /// # Errors
    /// If the address can't be had any more.
    pub async fn come_back(&self) -> io::Result<()> {
        self.order(Order::ComeBack).await
    }

    async fn order(&self, order: Order) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        let ended = || io::Error::other("the server has ended");
        self.orders.send((order, done)).map_err(|_| ended())?;
        wait.await.map_err(|_| ended())?
    }

    /// All that was asked so far, in order.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.state().asked.clone()
    }

    /// How often that was asked so far.
    pub fn count(&self, verb: Verb) -> usize {
        let state = self.shared.state();
        state.asked.iter().filter(|a| a.verb == verb).count()
    }

    /// How many watches are open.
    pub fn watching(&self) -> usize {
        self.shared.state().watching
    }

    /// The Events that are kept, oldest first.
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

fn key(pod: &PodSpec) -> Key {
    (pod.namespace.clone(), pod.name.clone())
}
