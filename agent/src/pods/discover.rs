//! Builds the pods from the runtime's lists, and finds where their sockets are.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::PathBuf,
    time::Duration,
};

use ebb_core::{
    format::one_line,
    ids::{CgroupId, ContainerId, NetnsInode, PodName, PodUid, SandboxId},
    scope::Scope,
};
use futures_util::{StreamExt, stream};
use k8s_cri::v1::{self, ContainerState};
use tracing::debug;

use super::{
    Container, Pod,
    cgroup::container_cgroups,
    cri::{Cri, CriError},
    hook::{sleeps, wait_port},
    info::{Info, SandboxFacts, parse_info, sandbox_facts},
    workload::workload,
};
use crate::linux::netns::Netns;

/// Labels and annotations that the kubelet puts on sandboxes and containers
/// (`pkg/kubelet/types/labels.go`; `pkg/kubelet/kuberuntime/labels.go`).
const POD_NAME: &str = "io.kubernetes.pod.name";
const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";
const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
pub(crate) const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
pub(crate) const PORTS: &str = "io.kubernetes.container.ports";

/// How many status calls run at once, so that a stuck shim does not delay the others.
const STATUSES_AT_ONCE: usize = 8;

/// Where to look up namespaces and cgroups on this node.
#[derive(Clone, Debug)]
pub struct NodePaths {
    /// The network namespace that host-network pods share.
    pub host_netns: NetnsInode,
    /// `/proc` of the node's PID namespace.
    pub proc: PathBuf,
    /// The mount of cgroup v2.
    pub cgroup_root: PathBuf,
}

/// Lists the pods of a node. Caches what does not change during the life of a sandbox or container, so that a list
/// normally takes two calls to the runtime.
#[derive(Debug)]
pub(super) struct Discovery {
    cri: Cri,
    node: NodePaths,
    sandboxes: HashMap<SandboxId, CachedSandbox>,
    containers: HashMap<ContainerId, Info>,
}

#[derive(Debug)]
struct CachedSandbox {
    facts: SandboxFacts,
    /// Set if the sandbox has a process. That lives as long as the sandbox is ready, so the scope does not change.
    netns: Option<Scope>,
}

/// A listed sandbox that belongs to a pod.
struct ListedSandbox {
    id: SandboxId,
    name: PodName,
    workload: Option<String>,
    created_at: i64,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

impl Discovery {
    pub(super) fn new(cri: Cri, node: NodePaths) -> Self {
        Self {
            cri,
            node,
            sandboxes: HashMap::new(),
            containers: HashMap::new(),
        }
    }

    /// All pods with a ready sandbox. A pod whose sockets ebb can't find is [`Scope::Untracked`].
    ///
    /// # Errors
    /// [`CriError`] if a list call fails.
    pub(super) async fn list(&mut self) -> Result<Vec<Pod>, CriError> {
        let (sandboxes, containers) =
            tokio::try_join!(self.cri.ready_sandboxes(), self.cri.containers())?;
        let sandboxes = newest_of_each_pod(sandboxes);
        self.drop_removed(&sandboxes, &containers);
        let mut failed = self.fetch_new_statuses(&sandboxes).await;

        let mut of_sandbox: HashMap<String, Vec<v1::Container>> = HashMap::new();
        for container in containers {
            of_sandbox
                .entry(container.pod_sandbox_id.clone())
                .or_default()
                .push(container);
        }
        let mut pods = Vec::with_capacity(sandboxes.len());
        for sandbox in sandboxes {
            let mut own = of_sandbox.remove(sandbox.id.as_str()).unwrap_or_default();
            own.sort_by_key(|c| c.created_at);
            let containers: Vec<Container> = own.into_iter().map(container).collect();
            let scope = match failed.remove(&sandbox.id) {
                Some(StatusFailure::NotFound) => continue,
                Some(StatusFailure::Error(why)) => Scope::Untracked(why),
                None => self.scope(&sandbox.id, &containers).await,
            };
            let ips = self
                .sandboxes
                .get(&sandbox.id)
                .map_or(Vec::new(), |k| k.facts.ips.clone());
            pods.push(Pod {
                name: sandbox.name,
                sandbox: sandbox.id,
                scope,
                ips,
                workload: sandbox.workload,
                labels: sandbox.labels,
                annotations: sandbox.annotations,
                containers,
            });
        }
        Ok(pods)
    }

    fn drop_removed(&mut self, sandboxes: &[ListedSandbox], containers: &[v1::Container]) {
        let ids: HashSet<&SandboxId> = sandboxes.iter().map(|s| &s.id).collect();
        self.sandboxes.retain(|id, _| ids.contains(id));
        let ids: HashSet<&str> = containers.iter().map(|c| c.id.as_str()).collect();
        self.containers.retain(|id, _| ids.contains(id.as_str()));
    }

    /// Gets the status of every sandbox that is not cached. Failures are not cached, so the next list tries again.
    async fn fetch_new_statuses(
        &mut self,
        listed: &[ListedSandbox],
    ) -> HashMap<SandboxId, StatusFailure> {
        let new = listed
            .iter()
            .filter(|s| !self.sandboxes.contains_key(&s.id))
            .map(|s| s.id.clone());
        let new: Vec<SandboxId> = new.collect();
        let cri = &self.cri;
        let answers: Vec<_> = stream::iter(new)
            .map(|id| async move {
                let answer = cri.sandbox_status(&id).await;
                (id, answer)
            })
            .buffer_unordered(STATUSES_AT_ONCE)
            .collect()
            .await;
        let mut failed = HashMap::new();
        for (id, answer) in answers {
            match answer {
                Ok(Some(answer)) => match sandbox_facts(&answer) {
                    Ok(facts) => drop(
                        self.sandboxes
                            .insert(id, CachedSandbox { facts, netns: None }),
                    ),
                    Err(e) => drop(failed.insert(id, StatusFailure::Error(one_line(&e)))),
                },
                Ok(None) => drop(failed.insert(id, StatusFailure::NotFound)),
                Err(e) => drop(failed.insert(id, StatusFailure::Error(one_line(&e)))),
            }
        }
        failed
    }

    async fn scope(&mut self, sandbox: &SandboxId, containers: &[Container]) -> Scope {
        let Some(known) = self.sandboxes.get(sandbox) else {
            return Scope::Untracked("the runtime does not know its sandbox".into());
        };
        if let Some(scope) = &known.netns {
            return scope.clone();
        }
        let SandboxFacts {
            pid,
            host_network,
            hidden,
            ..
        } = &known.facts;
        if let Some(why) = hidden {
            return Scope::Untracked(why.clone());
        }
        if *host_network {
            return self.host_scope(containers).await;
        }
        let (pid, of_sandbox) = match pid {
            Some(pid) => (*pid, true),
            None => match self.pid_of_a_container(containers).await {
                Ok(pid) => (pid, false),
                Err(why) => return Scope::Untracked(why),
            },
        };
        let link = self.node.proc.join(pid.to_string()).join("ns/net");
        let inode = match Netns::inode_at(&link) {
            Ok(inode) => inode,
            Err(e) => return Scope::Untracked(format!("cannot look up {}: {e}", link.display())),
        };
        // The pod's processes are in the host's namespace, even if its spec asks for another.
        if inode == self.node.host_netns {
            return self.host_scope(containers).await;
        }
        let scope = Scope::Netns { inode, pid };
        if of_sandbox && let Some(known) = self.sandboxes.get_mut(sandbox) {
            known.netns = Some(scope.clone());
        }
        scope
    }

    /// The process of a running container, for a sandbox without one (CRI-O without infra containers).
    async fn pid_of_a_container(&mut self, containers: &[Container]) -> Result<u32, String> {
        for container in containers.iter().filter(|c| c.running) {
            if let Some(Info { pid: Some(pid), .. }) = self.container_info(&container.id).await? {
                return Ok(pid);
            }
        }
        Err("its sandbox has no process, and no container of it runs".into())
    }

    async fn host_scope(&mut self, containers: &[Container]) -> Scope {
        let mut ids = Vec::new();
        for container in containers.iter().filter(|c| c.running) {
            match self.cgroups_of(&container.id).await {
                Ok(mut own) => ids.append(&mut own),
                Err(why) => return Scope::Untracked(why),
            }
        }
        Scope::HostNetwork(ids)
    }

    /// Empty if the container does not run any more.
    async fn cgroups_of(&mut self, id: &ContainerId) -> Result<Vec<CgroupId>, String> {
        let Some(info) = self.container_info(id).await? else {
            return Ok(Vec::new());
        };
        let (id, node) = (id.clone(), self.node.clone());
        let read = move || {
            let proc_cgroup = info.pid.and_then(|pid| {
                fs::read_to_string(node.proc.join(pid.to_string()).join("cgroup")).ok()
            });
            container_cgroups(
                &node.cgroup_root,
                &id,
                proc_cgroup.as_deref(),
                info.cgroups_path.as_deref(),
            )
        };
        match tokio::task::spawn_blocking(read).await {
            Ok(found) => found.map_err(|e| one_line(&e)),
            Err(e) => Err(format!("cannot look up the cgroups of its containers: {e}")),
        }
    }

    async fn container_info(&mut self, id: &ContainerId) -> Result<Option<Info>, String> {
        if let Some(info) = self.containers.get(id) {
            return Ok(Some(info.clone()));
        }
        let Some(answer) = self
            .cri
            .container_status(id)
            .await
            .map_err(|e| one_line(&e))?
        else {
            return Ok(None);
        };
        if answer
            .status
            .as_ref()
            .is_some_and(|s| s.state() != ContainerState::ContainerRunning)
        {
            return Ok(None);
        }
        let info = parse_info(&answer.info).map_err(|e| one_line(&e))?;
        self.containers.insert(id.clone(), info.clone());
        Ok(Some(info))
    }
}

/// Why there is no status of a sandbox.
enum StatusFailure {
    NotFound,
    Error(String),
}

/// A pod whose sandbox died gets a new one under the same UID; the runtime may list the old one for a while.
fn newest_of_each_pod(sandboxes: Vec<v1::PodSandbox>) -> Vec<ListedSandbox> {
    let mut newest: BTreeMap<PodUid, ListedSandbox> = BTreeMap::new();
    for sandbox in sandboxes {
        let Some(listed) = listed(sandbox) else {
            continue;
        };
        match newest.get(&listed.name.uid) {
            Some(other) if other.created_at >= listed.created_at => {}
            _ => drop(newest.insert(listed.name.uid.clone(), listed)),
        }
    }
    newest.into_values().collect()
}

fn listed(sandbox: v1::PodSandbox) -> Option<ListedSandbox> {
    let mut labels = sandbox.labels;
    let metadata = sandbox.metadata.unwrap_or_default();
    let uid = labels.remove(POD_UID).unwrap_or(metadata.uid);
    if uid.is_empty() {
        debug!(sandbox = sandbox.id, "ignoring a sandbox without a pod UID");
        return None;
    }
    let name = labels.remove(POD_NAME).unwrap_or(metadata.name);
    Some(ListedSandbox {
        id: SandboxId::new(sandbox.id),
        workload: workload(&name, &labels),
        name: PodName {
            uid: PodUid::new(uid),
            namespace: labels.remove(POD_NAMESPACE).unwrap_or(metadata.namespace),
            name,
        },
        created_at: sandbox.created_at,
        labels: labels.into_iter().collect(),
        annotations: sandbox.annotations.into_iter().collect(),
    })
}

fn container(mut container: v1::Container) -> Container {
    let running = container.state() == ContainerState::ContainerRunning;
    let grace = container
        .annotations
        .get(POD_GRACE)
        .and_then(|g| g.parse().ok());
    let annotation = |name| container.annotations.get(name).map(String::as_str);
    let wait_port =
        annotation(PRE_STOP).map_or(Ok(None), |hook| wait_port(hook, annotation(PORTS)));
    let pre_stop_sleep = annotation(PRE_STOP).map(sleeps).unwrap_or_default();
    Container {
        id: ContainerId::new(container.id),
        name: container
            .labels
            .remove(CONTAINER_NAME)
            .or(container.metadata.map(|m| m.name))
            .unwrap_or_default(),
        running,
        grace: grace.map(Duration::from_secs),
        wait_port,
        pre_stop_sleep,
    }
}

#[cfg(test)]
mod tests;
