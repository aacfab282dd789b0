//! Identifies the pod of a caller by its socket, not by what the caller sends.
//!
//! The other end of a connection to the node port is in the network namespace of the process that opened it. The
//! resolver finds the pod whose namespace has exactly that socket, or the pod on the host network in whose cgroup the
//! socket was created. An address alone proves nothing: it only decides which namespace is searched first.
//!
//! A connection to a port inside a pod is for that pod. It must come from the pod itself or from the node, where the
//! kubelet is. Otherwise another host could start the pod's drain.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ebb_core::{
    ids::{CgroupId, PodUid},
    scope::Scope,
};
use tokio::{sync::Semaphore, time::sleep};

use super::keyed_semaphore::{KeyedSemaphore, Permit};
use crate::{
    kernel::Tracker,
    pods::{Pod, kubepods::KubepodsCgroup, store::Pods, table::PodTable},
};

/// Both ends of a connection, from the agent's socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Endpoints {
    /// The caller's address.
    pub(super) remote: SocketAddr,
    /// The agent's address.
    local: Option<SocketAddr>,
}

impl Endpoints {
    /// Maps IPv4-mapped IPv6 addresses to IPv4, as in the kernel's tables.
    pub(super) fn new(remote: SocketAddr, local: Option<SocketAddr>) -> Self {
        let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
        Self {
            remote: plain(remote),
            local: local.map(plain),
        }
    }
}

/// How many callers from one address may be resolved or wait for that, at the node port and at the wait port of each
/// pod. The kubelet calls all of these from the node's address, once per pod that is being stopped.
const CALLERS_PER_ADDRESS: usize = 64;

/// How many callers are resolved at a time: each takes a thread for a short time.
const RESOLVED_AT_ONCE: usize = 4;

/// How many callers from one address that belong to no known pod may be resolved or wait for that.
const UNKNOWN_PER_ADDRESS: usize = 4;

/// How long a caller from an unknown address waits for a list of pods that is newer than its call.
const LISTED_WITHIN: Duration = Duration::from_secs(1);

/// How long the next search of all pods waits after one without a result.
const AFTER_NOT_FOUND: Duration = Duration::from_millis(100);

/// Finds the pods of callers, and limits the work that callers can cause before they are identified.
pub(crate) struct PeerResolver {
    tracker: Tracker,
    pods: Arc<Pods>,
    limits: PeerLimits,
    kubepods: Arc<KubepodsCgroup>,
}

/// Limits of the work for callers.
#[derive(Debug)]
struct PeerLimits {
    per_address: Arc<KeyedSemaphore<IpAddr>>,
    /// By the pod of the wait port, and the caller.
    per_wait_port: Arc<KeyedSemaphore<(PodUid, IpAddr)>>,
    /// Lookups in one namespace.
    lookups: Semaphore,
    /// Searches of every pod: one at a time.
    searches: Semaphore,
    unknown_per_address: Arc<KeyedSemaphore<IpAddr>>,
    /// Unknown callers from all addresses.
    unknown: Arc<KeyedSemaphore<()>>,
}

impl PeerLimits {
    fn new() -> Self {
        Self {
            per_address: Arc::new(KeyedSemaphore::new(CALLERS_PER_ADDRESS)),
            per_wait_port: Arc::new(KeyedSemaphore::new(CALLERS_PER_ADDRESS)),
            lookups: Semaphore::new(RESOLVED_AT_ONCE),
            searches: Semaphore::new(1),
            unknown_per_address: Arc::new(KeyedSemaphore::new(UNKNOWN_PER_ADDRESS)),
            unknown: Arc::new(KeyedSemaphore::new(CALLERS_PER_ADDRESS)),
        }
    }

    /// Runs the lookup of a caller at the wait port of a pod, within the limits.
    async fn at_wait_port<T>(
        &self,
        pod: &PodUid,
        caller: IpAddr,
        lookup: impl Future<Output = T>,
    ) -> Result<T, TooManyCallers> {
        let permit = self.per_wait_port.try_acquire((pod.clone(), caller));
        let _permit = permit.ok_or(TooManyCallers(caller))?;
        let _turn = self.lookups.acquire().await;
        Ok(lookup.await)
    }

    /// Permits for a caller that belongs to no known pod.
    fn for_unknown(&self, caller: IpAddr) -> Result<(Permit<IpAddr>, Permit<()>), TooManyCallers> {
        let own = self.unknown_per_address.try_acquire(caller);
        own.zip(self.unknown.try_acquire(()))
            .ok_or(TooManyCallers(caller))
    }

    /// Runs a search of all pods, one at a time. After a search without a result, the next one waits.
    async fn search<T>(&self, search: impl Future<Output = Option<T>>) -> Option<T> {
        let _turn = self.searches.acquire().await;
        let found = search.await;
        if found.is_none() {
            sleep(AFTER_NOT_FOUND).await;
        }
        found
    }
}

/// Too many callers from this address are being resolved.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("too many requests at a time from {0}; try again later")]
pub(super) struct TooManyCallers(IpAddr);

/// Whether the caller's socket is in the host's namespace, and in which cgroup it was created.
enum OnHost {
    Yes(Option<CgroupId>),
    No,
    Unknown,
}

impl PeerResolver {
    /// `kubepods` distinguishes the node's own processes from those of pods.
    pub(crate) fn new(tracker: Tracker, pods: Arc<Pods>, kubepods: KubepodsCgroup) -> Self {
        Self {
            tracker,
            pods,
            limits: PeerLimits::new(),
            kubepods: Arc::new(kubepods),
        }
    }

    /// The pod that opened the connection; `None` if no pod of this node did.
    pub(super) async fn pod_of(&self, ends: Endpoints) -> Result<Option<Arc<Pod>>, TooManyCallers> {
        let caller = ends.remote.ip();
        let permit = self.limits.per_address.try_acquire(caller);
        let _permit = permit.ok_or(TooManyCallers(caller))?;
        let Some(local) = ends.local else {
            return Ok(None);
        };
        let remote = ends.remote;
        {
            let _turn = self.limits.lookups.acquire().await;
            let table = self.pods.latest();
            match self.on_host(remote, local).await {
                OnHost::Yes(cgroup) => {
                    if let Some(pod) = of_cgroup(&table, cgroup) {
                        return Ok(Some(pod));
                    }
                }
                OnHost::Unknown => return Ok(None),
                // Every namespace has 127.0.0.1, so the same tuple may be a connection within a pod.
                OnHost::No if caller.is_loopback() => return Ok(None),
                OnHost::No => {
                    if let Some(pod) = table.by_ip(caller)
                        && self.has(pod, remote, local).await
                    {
                        return Ok(Some(Arc::clone(pod)));
                    }
                }
            }
        }
        let _permits = self.limits.for_unknown(caller)?;
        // A caller can have another address than its pod's only by masquerading, and then it has the node's. For any
        // other address ebb does not search every pod, because any host could cause that work.
        Ok(if is_the_nodes(caller) {
            let search = self.search_all_pods(remote, local);
            self.limits.search(search).await
        } else {
            self.newer_pod_of(remote, local).await
        })
    }

    /// The pod of this address that opened the connection, from a newer list of pods. Callers share one list per
    /// [`LISTED_WITHIN`].
    async fn newer_pod_of(&self, remote: SocketAddr, local: SocketAddr) -> Option<Arc<Pod>> {
        sleep(LISTED_WITHIN).await;
        let table = self.pods.recent(LISTED_WITHIN).await.ok()?;
        let pod = table.by_ip(remote.ip())?;
        let _turn = self.limits.lookups.acquire().await;
        let found = self.has(pod, remote, local).await;
        found.then(|| Arc::clone(pod))
    }

    async fn search_all_pods(&self, remote: SocketAddr, local: SocketAddr) -> Option<Arc<Pod>> {
        // The pod may be newer than the last list.
        let table = self.pods.refresh().await.ok()?;
        match self.on_host(remote, local).await {
            OnHost::Yes(cgroup) => return of_cgroup(&table, cgroup),
            OnHost::Unknown => return None,
            OnHost::No => {}
        }
        for pod in table.iter() {
            if self.has(pod, remote, local).await {
                return Some(Arc::clone(pod));
            }
        }
        None
    }

    /// Whether the caller at a port inside `pod` is the pod itself, or a process of the node outside all pods.
    pub(super) async fn may_wait_for(
        &self,
        pod: &Pod,
        ends: Endpoints,
    ) -> Result<bool, TooManyCallers> {
        let caller = ends.remote.ip();
        let Some(local) = ends.local else {
            return Ok(false);
        };
        // Only the pod itself can send from a loopback address in its namespace.
        if caller.is_loopback() {
            return Ok(true);
        }
        let lookup = async {
            match self.on_host(ends.remote, local).await {
                OnHost::Yes(cgroup) => self.is_in_no_pod(cgroup).await,
                OnHost::Unknown => false,
                OnHost::No => self.has(pod, ends.remote, local).await,
            }
        };
        let limits = &self.limits;
        limits.at_wait_port(&pod.name.uid, caller, lookup).await
    }

    /// Whether this cgroup, of a process on the host network, belongs to no pod. A pod can be newer than the last list,
    /// and can create cgroups below its own.
    async fn is_in_no_pod(&self, cgroup: Option<CgroupId>) -> bool {
        if of_cgroup(&self.pods.latest(), cgroup).is_some() {
            return false;
        }
        let kubepods = Arc::clone(&self.kubepods);
        if let Some(cgroup) = cgroup
            && kubepods.is_known_outside(cgroup)
        {
            return true;
        }
        // If the runtime does not answer, the last list and the path of the cgroup decide.
        if let Ok(table) = self.pods.refresh().await
            && of_cgroup(&table, cgroup).is_some()
        {
            return false;
        }
        let outside = tokio::task::spawn_blocking(move || kubepods.is_outside(cgroup));
        outside.await.unwrap_or(false)
    }

    async fn on_host(&self, remote: SocketAddr, local: SocketAddr) -> OnHost {
        match self.tracker.find_on_host(remote, local).await {
            Ok(Some(socket)) => OnHost::Yes(socket.cgroup),
            Ok(None) => OnHost::No,
            Err(_) => OnHost::Unknown,
        }
    }

    /// Whether the caller's socket is in the pod's own namespace.
    async fn has(&self, pod: &Pod, remote: SocketAddr, local: SocketAddr) -> bool {
        matches!(pod.scope, Scope::Netns { .. })
            && matches!(
                self.tracker.find(&pod.scope, remote, local).await,
                Ok(Some(_))
            )
    }
}

/// Whether the host has this address; the agent runs in the host's network namespace. With
/// `net.ipv4.ip_nonlocal_bind`, this is true of every address.
fn is_the_nodes(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

/// The pod on the host network that this cgroup belongs to.
fn of_cgroup(table: &PodTable, cgroup: Option<CgroupId>) -> Option<Arc<Pod>> {
    let cgroup = cgroup?;
    let owner = table
        .iter()
        .find(|p| matches!(&p.scope, Scope::HostNetwork(cgroups) if cgroups.contains(&cgroup)));
    owner.cloned()
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::time::Instant;

    use super::*;

    const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    async fn slow_lookup() {
        sleep(Duration::from_millis(5)).await;
    }

    #[tokio::test]
    async fn the_kubelet_is_resolved_at_every_pod_however_many_are_stopped_at_once() {
        let limits = PeerLimits::new();
        let calls = (0..4 * CALLERS_PER_ADDRESS).map(|n| {
            let pod = PodUid::new(format!("u{n}"));
            let limits = &limits;
            async move { limits.at_wait_port(&pod, NODE, slow_lookup()).await.is_ok() }
        });
        assert!(join_all(calls).await.into_iter().all(|answered| answered));
    }

    #[tokio::test]
    async fn the_callers_from_one_address_at_one_pod_are_limited() {
        let (limits, pod) = (PeerLimits::new(), PodUid::new("u1"));
        let calls =
            (0..2 * CALLERS_PER_ADDRESS).map(|_| limits.at_wait_port(&pod, NODE, slow_lookup()));
        let answered = join_all(calls).await.into_iter().filter(Result::is_ok);
        assert_eq!(answered.count(), CALLERS_PER_ADDRESS);
    }

    #[test]
    fn unknown_callers_from_one_address_leave_permits_to_others() {
        let limits = PeerLimits::new();
        let mut permits: Vec<_> = (0..UNKNOWN_PER_ADDRESS)
            .map(|_| limits.for_unknown(NODE).unwrap())
            .collect();
        assert!(limits.for_unknown(NODE).is_err());
        let other = IpAddr::from([192, 0, 2, 1]);
        assert!(limits.for_unknown(other).is_ok());
        permits.pop();
        assert!(limits.for_unknown(NODE).is_ok());
    }

    #[tokio::test]
    async fn the_next_search_waits_after_one_without_a_result() {
        let limits = PeerLimits::new();
        let search = |found: Option<()>| limits.search(std::future::ready(found));
        let begun = Instant::now();
        let found = join_all([None, Some(()), None].map(search)).await;
        assert_eq!(found, [None, Some(()), None]);
        assert!(
            begun.elapsed() >= 2 * AFTER_NOT_FOUND,
            "{:?}",
            begun.elapsed()
        );
    }

    #[test]
    fn only_addresses_of_this_namespace_are_the_nodes() {
        assert!(is_the_nodes("127.0.0.1".parse().unwrap()));
        // Addresses for documentation (RFC 5737, RFC 3849).
        assert!(!is_the_nodes("192.0.2.1".parse().unwrap()));
        assert!(!is_the_nodes("2001:db8::1".parse().unwrap()));
    }
}
