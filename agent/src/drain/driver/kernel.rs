//! What the driver asks of the kernel.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    drain::policy::Policy,
    flow::{Flow, Snapshot},
    ids::SocketCookie,
    kernel::Look,
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
    /// tells which.
    fn close_idle(
        &self,
        scope: &Scope,
        idle: Vec<Flow>,
    ) -> impl Future<Output = Result<Vec<SocketCookie>, LookError>> + Send;
    /// From now on, edges of this scope are reported.
    fn watch(&self, scope: &Scope) -> Result<(), LookError>;
    /// No more edges of this scope are needed.
    fn unwatch(&self, scope: &Scope);
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
