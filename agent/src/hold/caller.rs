//! Who is calling? Answered by the kernel, not by the caller.
//!
//! A connection to the node port has its other end in the network namespace of whoever made it. The pod is
//! the one in whose namespace the kernel finds exactly that socket; a pod on the host network is the one in
//! whose cgroup the socket was made. An address alone proves nothing: it only says where to look first.
//!
//! A connection to a port inside a pod is for that pod. It has to come from the pod itself or from the node,
//! where the kubelet is: others could otherwise begin a pod's drain from afar.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::Semaphore, time::sleep};

use super::shares::{Share, Shares};
use crate::{
    agent::Agent,
    ids::{CgroupId, PodUid},
    pods::{Pod, Scope, kubepods::Kubepods, table::PodTable},
};

/// Both ends of a connection, as this agent's socket has them.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The caller's.
    pub remote: SocketAddr,
    /// The agent's.
    pub local: Option<SocketAddr>,
}

impl Ends {
    /// IPv4 in IPv6 becomes IPv4, which is how the kernel's tables have it.
    pub fn new(remote: SocketAddr, local: Option<SocketAddr>) -> Self {
        let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
        Self {
            remote: plain(remote),
            local: local.map(plain),
        }
    }
}

/// How many callers of one address may be looked for or wait for that, at the node port; and at the wait port of
/// each pod. The kubelet has the node's address at all of them, and its callers are as many as pods are stopped at
/// once.
const LOOKUPS_EACH: usize = 64;

/// How many are looked for at a time: each takes a thread for a moment.
const LOOKUPS_AT_ONCE: usize = 4;

/// How many of one address may be looked for beyond what is known of the pods, or wait for that.
const STRANGERS_EACH: usize = 4;

/// How long a caller whose address no known pod has waits for a list of the runtime that is newer than its call.
const LISTED_WITHIN: Duration = Duration::from_secs(1);

/// How long the next caller waits after one that was looked for everywhere and found nowhere.
const AFTER_A_STRANGER: Duration = Duration::from_millis(100);

/// Bounds what callers can make the agent do before it knows who they are.
#[derive(Debug)]
pub struct Lookups {
    each: Arc<Shares<IpAddr>>,
    /// By the pod whose wait port it is, and the caller.
    at_ports: Arc<Shares<(PodUid, IpAddr)>>,
    /// For those whose address is a pod's or the node's.
    known: Semaphore,
    /// For those who are looked for in every pod: one at a time.
    strangers: Semaphore,
    /// Those who are no known pod.
    strangers_each: Arc<Shares<IpAddr>>,
    /// The same, of all addresses.
    unknown: Arc<Shares<()>>,
    kubepods: Arc<Kubepods>,
}

impl Lookups {
    /// `kubepods` tells the node's own processes from those of pods.
    pub fn new(kubepods: Kubepods) -> Self {
        Self {
            each: Arc::new(Shares::new(LOOKUPS_EACH)),
            at_ports: Arc::new(Shares::new(LOOKUPS_EACH)),
            known: Semaphore::new(LOOKUPS_AT_ONCE),
            strangers: Semaphore::new(1),
            strangers_each: Arc::new(Shares::new(STRANGERS_EACH)),
            unknown: Arc::new(Shares::new(LOOKUPS_EACH)),
            kubepods: Arc::new(kubepods),
        }
    }

    /// Has a caller at the wait port of a pod looked for when it is its turn.
    async fn at_port<T>(
        &self,
        pod: &PodUid,
        caller: IpAddr,
        look: impl Future<Output = T>,
    ) -> Result<T, TooMany> {
        let share = self.at_ports.take((pod.clone(), caller));
        let _share = share.ok_or(TooMany(caller))?;
        let _turn = self.known.acquire().await;
        Ok(look.await)
    }

    /// A place among those whose pod is not known.
    fn place(&self, caller: IpAddr) -> Result<(Share<IpAddr>, Share<()>), TooMany> {
        let own = self.strangers_each.take(caller);
        own.zip(self.unknown.take(())).ok_or(TooMany(caller))
    }

    /// Has a caller looked for everywhere when it is its turn. Nobody else is for a while if it is not found.
    async fn everywhere<T>(&self, look: impl Future<Output = Option<T>>) -> Option<T> {
        let _turn = self.strangers.acquire().await;
        let found = look.await;
        if found.is_none() {
            sleep(AFTER_A_STRANGER).await;
        }
        found
    }
}

/// Too many callers of that address are being looked for.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("too many requests at a time from {0}")]
pub struct TooMany(pub IpAddr);

/// The pod that made the connection; `None` if no pod of this node did.
///
/// # Errors
///
/// [`TooMany`].
pub async fn pod_of(agent: &Agent, ends: Ends) -> Result<Option<Arc<Pod>>, TooMany> {
    let caller = ends.remote.ip();
    let _share = agent.lookups.each.take(caller).ok_or(TooMany(caller))?;
    let Some(local) = ends.local else {
        return Ok(None);
    };
    let remote = ends.remote;
    {
        let _turn = agent.lookups.known.acquire().await;
        let table = agent.pods.latest();
        match on_host(agent, remote, local).await {
            OnHost::Yes(cgroup) => {
                if let Some(pod) = of_cgroup(&table, cgroup) {
                    return Ok(Some(pod));
                }
            }
            OnHost::Unknown => return Ok(None),
            // Addresses such as 127.0.0.1 are in every namespace, so the same four numbers may name a connection
            // of a pod with itself.
            OnHost::No if caller.is_loopback() => return Ok(None),
            OnHost::No => {
                if let Some(pod) = table.by_ip(caller)
                    && has(agent, pod, remote, local).await
                {
                    return Ok(Some(Arc::clone(pod)));
                }
            }
        }
    }
    let _place = agent.lookups.place(caller)?;
    // Only masquerading on the way leaves a pod with another address than its own, and the address is the node's then.
    // A visit to every pod is not for whoever can reach the port.
    Ok(if is_the_nodes(caller) {
        let look = look_everywhere(agent, remote, local);
        agent.lookups.everywhere(look).await
    } else {
        newer_pod_of(agent, remote, local).await
    })
}

/// The pod of this address that made the connection, if the pod is newer than the last look at the runtime. However
/// many ask, the runtime is asked once in a while.
async fn newer_pod_of(agent: &Agent, remote: SocketAddr, local: SocketAddr) -> Option<Arc<Pod>> {
    sleep(LISTED_WITHIN).await;
    let table = agent.pods.recent(LISTED_WITHIN).await.ok()?;
    let pod = table.by_ip(remote.ip())?;
    let _turn = agent.lookups.known.acquire().await;
    let found = has(agent, pod, remote, local).await;
    found.then(|| Arc::clone(pod))
}

async fn look_everywhere(agent: &Agent, remote: SocketAddr, local: SocketAddr) -> Option<Arc<Pod>> {
    // The pod may be newer than the last look.
    let table = agent.pods.refresh().await.ok()?;
    match on_host(agent, remote, local).await {
        OnHost::Yes(cgroup) => return of_cgroup(&table, cgroup),
        OnHost::Unknown => return None,
        OnHost::No => {}
    }
    for pod in table.iter() {
        if has(agent, pod, remote, local).await {
            return Some(Arc::clone(pod));
        }
    }
    None
}

/// Whether this is an address of the network that the agent is in, which is the host's. Where
/// `net.ipv4.ip_nonlocal_bind` is set, every address is.
fn is_the_nodes(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

/// Whether who calls at a port inside `pod` is the pod itself or a process of the node that is in no pod.
///
/// # Errors
///
/// [`TooMany`].
pub async fn may_wait_for(agent: &Agent, pod: &Pod, ends: Ends) -> Result<bool, TooMany> {
    let caller = ends.remote.ip();
    let Some(local) = ends.local else {
        return Ok(false);
    };
    // Nobody else can send from there.
    if caller.is_loopback() {
        return Ok(true);
    }
    let look = async {
        match on_host(agent, ends.remote, local).await {
            OnHost::Yes(cgroup) => is_in_no_pod(agent, cgroup).await,
            OnHost::Unknown => false,
            OnHost::No => has(agent, pod, ends.remote, local).await,
        }
    };
    agent.lookups.at_port(&pod.name.uid, caller, look).await
}

/// Whether a process of the host's network whose sockets are made in this cgroup is in no pod. A pod can be newer than
/// the last look at the runtime, and make cgroups below its own.
async fn is_in_no_pod(agent: &Agent, cgroup: Option<CgroupId>) -> bool {
    if of_cgroup(&agent.pods.latest(), cgroup).is_some() {
        return false;
    }
    let kubepods = Arc::clone(&agent.lookups.kubepods);
    if let Some(cgroup) = cgroup
        && kubepods.is_known_outside(cgroup)
    {
        return true;
    }
    // Without the runtime, the last list and the cgroups' places have to do.
    if let Ok(table) = agent.pods.refresh().await
        && of_cgroup(&table, cgroup).is_some()
    {
        return false;
    }
    let outside = tokio::task::spawn_blocking(move || kubepods.is_outside(cgroup));
    outside.await.unwrap_or(false)
}

/// Whether a connection is in the host's namespace.
enum OnHost {
    Yes(Option<CgroupId>),
    No,
    Unknown,
}

async fn on_host(agent: &Agent, remote: SocketAddr, local: SocketAddr) -> OnHost {
    match agent.tracker.find_on_host(remote, local).await {
        Ok(Some(socket)) => OnHost::Yes(socket.cgroup),
        Ok(None) => OnHost::No,
        Err(_) => OnHost::Unknown,
    }
}

/// The pod on the host network that this cgroup is of.
fn of_cgroup(table: &PodTable, cgroup: Option<CgroupId>) -> Option<Arc<Pod>> {
    let cgroup = cgroup?;
    let owner = table
        .iter()
        .find(|p| matches!(&p.scope, Scope::HostNetwork(cgroups) if cgroups.contains(&cgroup)));
    owner.cloned()
}

/// Whether the connection is in the pod's own namespace.
async fn has(agent: &Agent, pod: &Pod, remote: SocketAddr, local: SocketAddr) -> bool {
    matches!(pod.scope, Scope::Netns { .. })
        && matches!(
            agent.tracker.find(&pod.scope, remote, local).await,
            Ok(Some(_))
        )
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::time::Instant;

    use super::*;

    const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    fn lookups() -> Lookups {
        Lookups::new(Kubepods::new("/nowhere".into()))
    }

    /// A lookup that takes its time.
    async fn slow() {
        sleep(Duration::from_millis(5)).await;
    }

    #[tokio::test]
    async fn the_kubelet_is_heard_at_every_pod_however_many_are_stopped_at_once() {
        let lookups = lookups();
        let calls = (0..4 * LOOKUPS_EACH).map(|n| {
            let pod = PodUid::new(format!("u{n}"));
            let lookups = &lookups;
            async move { lookups.at_port(&pod, NODE, slow()).await.is_ok() }
        });
        assert!(join_all(calls).await.into_iter().all(|heard| heard));
    }

    #[tokio::test]
    async fn one_address_at_one_pod_has_only_so_many_lookups() {
        let (lookups, pod) = (lookups(), PodUid::new("u1"));
        let calls = (0..2 * LOOKUPS_EACH).map(|_| lookups.at_port(&pod, NODE, slow()));
        let heard = join_all(calls).await.into_iter().filter(Result::is_ok);
        assert_eq!(heard.count(), LOOKUPS_EACH);
    }

    #[test]
    fn strangers_of_one_address_leave_places_to_others() {
        let lookups = lookups();
        let mut places: Vec<_> = (0..STRANGERS_EACH)
            .map(|_| lookups.place(NODE).unwrap())
            .collect();
        assert!(lookups.place(NODE).is_err());
        let other = IpAddr::from([192, 0, 2, 1]);
        assert!(lookups.place(other).is_ok());
        places.pop();
        assert!(lookups.place(NODE).is_ok());
    }

    #[tokio::test]
    async fn who_was_looked_for_everywhere_and_found_nowhere_is_followed_by_a_pause() {
        let lookups = lookups();
        let look = |found: Option<()>| lookups.everywhere(std::future::ready(found));
        let begun = Instant::now();
        let found = join_all([None, Some(()), None].map(look)).await;
        assert_eq!(found, [None, Some(()), None]);
        assert!(
            begun.elapsed() >= 2 * AFTER_A_STRANGER,
            "{:?}",
            begun.elapsed()
        );
    }

    #[test]
    fn only_addresses_of_this_network_are_the_nodes() {
        assert!(is_the_nodes("127.0.0.1".parse().unwrap()));
        // For documentation alone (RFC 5737, RFC 3849).
        assert!(!is_the_nodes("192.0.2.1".parse().unwrap()));
        assert!(!is_the_nodes("2001:db8::1".parse().unwrap()));
    }
}
