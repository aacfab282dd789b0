//! Which pod is calling? Answered by the kernel, not by the caller.
//!
//! A connection to the node port has its other end in the network namespace of whoever made it. The pod is
//! the one in whose namespace the kernel finds exactly that socket; a pod on the host network is the one in
//! whose cgroup the socket was made. An address alone proves nothing: it only says where to look first.

use std::{net::SocketAddr, sync::Arc};

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::TcpListener;

use crate::{
    agent::Agent,
    pods::{Pod, Scope, table::PodTable},
};

/// Both ends of a connection, as this agent's socket has them.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The caller's.
    pub remote: SocketAddr,
    /// The agent's.
    pub local: Option<SocketAddr>,
}

impl Connected<IncomingStream<'_, TcpListener>> for Ends {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self {
            remote: plain(*stream.remote_addr()),
            local: stream.io().local_addr().ok().map(plain),
        }
    }
}

/// IPv4 in IPv6 as IPv4, which is how the kernel's tables have it.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The pod that made the connection; `None` if no pod of this node did.
pub async fn pod_of(agent: &Agent, ends: Ends) -> Option<Arc<Pod>> {
    let local = ends.local?;
    if let Some(pod) = among(agent, &agent.pods.latest(), ends.remote, local).await {
        return Some(pod);
    }
    // The pod may be newer than the last look at the runtime.
    let table = agent.pods.refresh().await.ok()?;
    among(agent, &table, ends.remote, local).await
}

async fn among(
    agent: &Agent,
    table: &PodTable,
    remote: SocketAddr,
    local: SocketAddr,
) -> Option<Arc<Pod>> {
    // Addresses such as 127.0.0.1 are in every namespace, so the same four numbers may name a connection of
    // a pod with itself. One that the host's namespace has is the host's, and then only cgroups tell whose.
    if let Some(socket) = agent.tracker.find_on_host(remote, local).await.ok()? {
        let cgroup = socket.cgroup?;
        let owner = table
            .iter()
            .find(|p| matches!(&p.scope, Scope::HostNetwork(cgroups) if cgroups.contains(&cgroup)));
        return owner.cloned();
    }
    if remote.ip().is_loopback() {
        return None;
    }
    let by_address = table.by_ip(remote.ip());
    let others = table.iter().filter(|_| by_address.is_none());
    for pod in by_address.into_iter().chain(others) {
        if matches!(pod.scope, Scope::Netns { .. })
            && let Ok(Some(_)) = agent.tracker.find(&pod.scope, remote, local).await
        {
            return Some(Arc::clone(pod));
        }
    }
    None
}
