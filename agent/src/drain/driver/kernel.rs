//! What the driver asks of the kernel.

use std::{collections::HashSet, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    drain::{
        machine::Ends,
        policy::{Policy, Until},
    },
    flow::{Flow, Sample, Snapshot},
    ids::{SocketCookie, WatchId},
    kernel::{Look, LookUp, Tracker},
    pods::{Pod, Scope},
};

/// A look that takes longer has failed.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// The kernel can't be asked; the text says what was tried and why it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LookError(pub String);

/// What the driver needs of the kernel.
pub trait Kernel: Send + Sync + 'static {
    /// All TCP sockets of the pod.
    fn look(&self, scope: &Scope) -> impl Future<Output = Result<Look, LookError>> + Send;
    /// Closes those of these idle flows of the pod that have not moved since the look that showed them, and
    /// tells which. No more of them once the drain is `over`.
    fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> impl Future<Output = Result<Vec<SocketCookie>, LookError>> + Send;
    /// Those sockets of the watched pod that exist between these addresses, each by an exact lookup, and how
    /// many edges of the watch had been counted before.
    fn look_up(
        &self,
        scope: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> impl Future<Output = Result<LookUp, LookError>> + Send;
    /// From now on, edges of this scope are reported and counted, as those of this watch.
    fn watch(&self, scope: &Scope) -> Result<WatchId, LookError>;
    /// No more edges of this scope are needed.
    fn unwatch(&self, scope: &Scope);
}

impl Kernel for Tracker {
    async fn look(&self, scope: &Scope) -> Result<Look, LookError> {
        Self::look(self, scope).await.map_err(look_error)
    }

    async fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> Result<Vec<SocketCookie>, LookError> {
        Self::close_idle(self, scope, idle, over)
            .await
            .map_err(look_error)
    }

    async fn look_up(
        &self,
        scope: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> Result<LookUp, LookError> {
        Self::look_up(self, scope, flows).await.map_err(look_error)
    }

    fn watch(&self, scope: &Scope) -> Result<WatchId, LookError> {
        Self::watch(self, scope).map_err(look_error)
    }

    fn unwatch(&self, scope: &Scope) {
        Self::unwatch(self, scope);
    }
}

fn look_error(e: io::Error) -> LookError {
    LookError(e.to_string())
}

/// Begins lookups of these flows: how many edges had been counted before, and the flows that are still there,
/// as the pod's policy sees them. `None`: they failed, or only a walk can tell.
pub(super) fn look_up<K: Kernel>(
    kernel: Arc<K>,
    pod: &Arc<Pod>,
    policy: &Policy,
    flows: Vec<Ends>,
) -> impl Future<Output = Option<(u64, Snapshot)>> + Send + use<K> {
    let (pod, policy) = (pod.clone(), policy.clone());
    // In a task of its own, so that a panic is a failed look and not a look without end.
    let look = tokio::spawn(async move {
        let ends = flows.iter().map(|f| (f.local, f.remote)).collect();
        let found = timeout(LOOK_TIMEOUT, kernel.look_up(&pod.scope, ends));
        let mut found = found.await.ok()?.ok()?;
        // Addresses are used again: another socket means that this one is gone.
        let wanted: HashSet<_> = flows.iter().map(|f| f.cookie).collect();
        found.samples.retain(|s| wanted.contains(&s.cookie));
        if policy.until == Until::Idle && found.samples.iter().any(Sample::is_tie) {
            return None;
        }
        let flows = Snapshot::new(
            found.taken_at,
            &found.samples,
            policy.idle_after,
            |_| true,
            |ip| pod.has_to_itself(ip),
        );
        Some((found.edges, flows))
    });
    async move { look.await.ok().flatten() }
}

/// Begins a look at the pod's flows, as its policy sees them; the text says why it failed.
pub(super) fn look<K: Kernel>(
    kernel: Arc<K>,
    pod: &Arc<Pod>,
    policy: &Policy,
) -> impl Future<Output = Result<Snapshot, String>> + Send + use<K> {
    let (pod, policy) = (pod.clone(), policy.clone());
    // In a task of its own, so that a panic is a failed look and not a look without end.
    let look = tokio::spawn(async move {
        match timeout(LOOK_TIMEOUT, kernel.look(&pod.scope)).await {
            Ok(Ok(look)) => {
                let holds_port = |port| policy.holds_port(port);
                Ok(Snapshot::new(
                    look.taken_at,
                    &look.samples,
                    policy.idle_after,
                    holds_port,
                    |ip| pod.has_to_itself(ip),
                ))
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer from the kernel within {LOOK_TIMEOUT:?}")),
        }
    });
    async move {
        look.await
            .unwrap_or_else(|e| Err(format!("the look came to no end: {e}")))
    }
}
