//! The driver's requests to the kernel.

use std::{collections::HashSet, io, net::SocketAddr, sync::Arc, time::Duration};

use ebb_core::{
    arrivals::Arrivals,
    drain_report::DumpReason,
    flow::{Flow, Snapshot},
    ids::{SocketCookie, WatchId},
    machine::FlowEndpoints,
    policy::{Policy, PortsInUse},
    scope::Scope,
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    kernel::{FlowLookUp, LookUpFailure, SocketDump, Tracker},
    pods::Pod,
};

/// A dump or a lookup that takes longer has failed.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(5);

/// A request to the kernel failed. The text has the request and the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KernelRequestError(pub String);

/// The requests of the driver to the kernel.
pub trait Kernel: Send + Sync + 'static {
    /// All TCP sockets of the pod.
    fn dump(
        &self,
        scope: &Scope,
    ) -> impl Future<Output = Result<SocketDump, KernelRequestError>> + Send;
    /// Closes those of these idle flows of the pod that have not moved since the snapshot that showed them, and
    /// returns which. No more of them once the drain is `over`.
    fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> impl Future<Output = Result<Vec<SocketCookie>, KernelRequestError>> + Send;
    /// The sockets of the watched pod between these addresses, and how many events of the watch had been sent before.
    fn look_up(
        &self,
        scope: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> impl Future<Output = Result<FlowLookUp, LookUpFailure>> + Send;
    /// Starts to send and count the events of this scope, as those of this watch.
    fn watch(&self, scope: &Scope) -> Result<WatchId, KernelRequestError>;
    /// How often clients connect to the pod, if that is known.
    fn arrivals(&self, scope: &Scope) -> impl Future<Output = Option<Arrivals>> + Send;
    /// Stops sending the events of this scope.
    fn unwatch(&self, scope: &Scope);
}

impl Kernel for Tracker {
    async fn dump(&self, scope: &Scope) -> Result<SocketDump, KernelRequestError> {
        Self::dump(self, scope).await.map_err(request_error)
    }

    async fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> Result<Vec<SocketCookie>, KernelRequestError> {
        Self::close_idle(self, scope, idle, over)
            .await
            .map_err(request_error)
    }

    async fn look_up(
        &self,
        scope: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> Result<FlowLookUp, LookUpFailure> {
        Self::look_up(self, scope, flows).await
    }

    fn watch(&self, scope: &Scope) -> Result<WatchId, KernelRequestError> {
        Self::watch(self, scope).map_err(request_error)
    }

    async fn arrivals(&self, scope: &Scope) -> Option<Arrivals> {
        let arrivals = Self::arrivals(self, scope).await;
        arrivals.unwrap_or_else(|e| {
            debug!("can't read how often clients connect to the pod: {e}");
            None
        })
    }

    fn unwatch(&self, scope: &Scope) {
        Self::unwatch(self, scope);
    }
}

fn request_error(e: io::Error) -> KernelRequestError {
    KernelRequestError(e.to_string())
}

/// The result of lookups.
pub(super) struct LookedUp {
    /// How many events of the watch the kernel had sent when the lookups began.
    pub(super) sent: u64,
    /// How many state changes the kernel had left out, in all, when the lookups were over.
    pub(super) missed_changes: u64,
    /// The flows that are still there.
    pub(super) flows: Snapshot,
}

/// Begins lookups of these flows, and applies the pod's policy to them. The error is the reason for a dump.
pub(super) fn look_up<K: Kernel>(
    kernel: Arc<K>,
    pod: &Arc<Pod>,
    policy: &Policy,
    flows: Vec<FlowEndpoints>,
) -> impl Future<Output = Result<LookedUp, DumpReason>> + Send + use<K> {
    let (pod, policy) = (pod.clone(), policy.clone());
    // In a task of its own: a panic then fails the lookup, which would otherwise never end.
    let look_up = tokio::spawn(async move {
        let ends = flows.iter().map(|f| (f.local, f.remote)).collect();
        let found = timeout(KERNEL_TIMEOUT, kernel.look_up(&pod.scope, ends)).await;
        let mut found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(LookUpFailure::FastOpen)) => return Err(DumpReason::FastOpen),
            Ok(Err(_)) | Err(_) => return Err(DumpReason::LookupFailed),
        };
        // Addresses are reused: if another socket has them, this one is gone.
        let wanted: HashSet<_> = flows.iter().map(|f| f.cookie).collect();
        found.samples.retain(|s| wanted.contains(&s.cookie));
        let flows = Snapshot::new(
            found.taken_at,
            &found.samples,
            policy.classify_options(),
            |_| true,
            |ip| pod.is_own_ip(ip),
        );
        Ok(LookedUp {
            sent: found.sent,
            missed_changes: found.missed_changes,
            flows,
        })
    });
    async move { look_up.await.unwrap_or(Err(DumpReason::LookupFailed)) }
}

/// The result of a dump.
pub(super) struct Dumped {
    /// How many state changes the kernel had left out, in all, when the dump began.
    pub(super) missed_changes: u64,
    /// The pod's flows.
    pub(super) flows: Snapshot,
    /// The ports that the pod uses, if they were requested.
    pub(super) ports: Option<PortsInUse>,
    /// Why the pod may have connections that no dump shows.
    pub(super) forwards: Option<String>,
}

/// Begins a dump of the pod's flows, and applies its policy to them. The error is the reason of a failure.
/// `wants_ports`: the policy is not yet adapted to the ports that the pod uses.
pub(super) fn dump<K: Kernel>(
    kernel: Arc<K>,
    pod: &Arc<Pod>,
    policy: &Policy,
    wants_ports: bool,
) -> impl Future<Output = Result<Dumped, String>> + Send + use<K> {
    let (pod, mut policy) = (pod.clone(), policy.clone());
    // In a task of its own: a panic then fails the dump, which would otherwise never end.
    let dump = tokio::spawn(async move {
        match timeout(KERNEL_TIMEOUT, kernel.dump(&pod.scope)).await {
            Ok(Ok(dump)) => {
                let ports = wants_ports.then(|| PortsInUse::of(&dump.samples));
                // The machine does the same, and reports what is wrong.
                ports.iter().for_each(|used| drop(policy.fit_ports(used)));
                Ok(Dumped {
                    missed_changes: dump.missed_changes,
                    flows: Snapshot::new(
                        dump.taken_at,
                        &dump.samples,
                        policy.classify_options(),
                        |port| policy.holds_port(port),
                        |ip| pod.is_own_ip(ip),
                    )
                    .with_listeners(&dump.samples),
                    ports,
                    forwards: dump.forwards,
                })
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!(
                "no answer from the kernel within {KERNEL_TIMEOUT:?}"
            )),
        }
    });
    async move {
        dump.await
            .unwrap_or_else(|e| Err(format!("the dump panicked or was aborted: {e}")))
    }
}
