//! From the runtime's lists to pods and where their sockets are.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::PathBuf,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use k8s_cri::v1::{self, ContainerState};
use tracing::debug;

use super::{
    Container, Pod, Scope,
    cgroup::container_cgroups,
    cri::{Cri, CriError},
    hook::wait_port,
    info::{Info, SandboxFacts, parse_info, sandbox_facts},
};
use crate::{
    ids::{CgroupId, ContainerId, NetnsInode, PodName, PodUid, SandboxId},
    kernel::Netns,
};

/// Labels and annotations that the kubelet puts on sandboxes and containers
/// (`pkg/kubelet/types/labels.go`; `pkg/kubelet/kuberuntime/labels.go`).
const POD_NAME: &str = "io.kubernetes.pod.name";
const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";
const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
const PORTS: &str = "io.kubernetes.container.ports";

/// How many statuses are asked for at once: enough to hide a stuck shim behind the others.
const STATUSES_AT_ONCE: usize = 8;

/// Where this node keeps what is looked up.
#[derive(Clone, Debug)]
pub struct Node {
    /// The network namespace that host-network pods share.
    pub host_netns: NetnsInode,
    /// `/proc` of the node's PID namespace.
    pub proc: PathBuf,
    /// The mount of cgroup v2.
    pub cgroup_root: PathBuf,
}

/// Lists the pods of a node. Remembers what does not change in a sandbox's or a container's life, so that
/// in the normal case a look costs the runtime two calls.
#[derive(Debug)]
pub struct Discovery {
    cri: Cri,
    node: Node,
    sandboxes: HashMap<SandboxId, Known>,
    containers: HashMap<ContainerId, Info>,
}

#[derive(Debug)]
struct Known {
    facts: SandboxFacts,
    /// Found by the sandbox's own process, which lives as long as the sandbox is ready.
    netns: Option<Scope>,
}

/// A sandbox of the list, told to be a pod's.
struct Listed {
    id: SandboxId,
    name: PodName,
    created_at: i64,
    annotations: BTreeMap<String, String>,
}

impl Discovery {
    /// Starts with nothing known.
    pub fn new(cri: Cri, node: Node) -> Self {
        Self {
            cri,
            node,
            sandboxes: HashMap::new(),
            containers: HashMap::new(),
        }
    }

    /// All pods with a ready sandbox. A pod of which something can't be found out is
    /// [`Scope::Untracked`].
    ///
    /// # Errors
    /// [`CriError`] if the runtime can't be asked for its lists.
    pub async fn list(&mut self) -> Result<Vec<Pod>, CriError> {
        let (sandboxes, containers) =
            tokio::try_join!(self.cri.ready_sandboxes(), self.cri.containers())?;
        let sandboxes = newest_of_each_pod(sandboxes);
        self.forget_all_but(&sandboxes, &containers);
        let mut untold = self.ask_for_new(&sandboxes).await;

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
            let scope = match untold.remove(&sandbox.id) {
                Some(Untold::Gone) => continue,
                Some(Untold::Why(why)) => Scope::Untracked(why),
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
                annotations: sandbox.annotations,
                containers,
            });
        }
        Ok(pods)
    }

    fn forget_all_but(&mut self, sandboxes: &[Listed], containers: &[v1::Container]) {
        let ids: HashSet<&SandboxId> = sandboxes.iter().map(|s| &s.id).collect();
        self.sandboxes.retain(|id, _| ids.contains(id));
        let ids: HashSet<&str> = containers.iter().map(|c| c.id.as_str()).collect();
        self.containers.retain(|id, _| ids.contains(id.as_str()));
    }

    /// Asks for the status of every sandbox not known yet. Failures are not remembered, so that the next
    /// look tries again.
    async fn ask_for_new(&mut self, listed: &[Listed]) -> HashMap<SandboxId, Untold> {
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
        let mut untold = HashMap::new();
        for (id, answer) in answers {
            match answer {
                Ok(Some(answer)) => match sandbox_facts(&answer) {
                    Ok(facts) => drop(self.sandboxes.insert(id, Known { facts, netns: None })),
                    Err(e) => drop(untold.insert(id, Untold::Why(chain(&e)))),
                },
                Ok(None) => drop(untold.insert(id, Untold::Gone)),
                Err(e) => drop(untold.insert(id, Untold::Why(chain(&e)))),
            }
        }
        untold
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
        // It does not matter what was asked for: this is where the processes are.
        if inode == self.node.host_netns {
            return self.host_scope(containers).await;
        }
        let scope = Scope::Netns { inode, pid };
        if of_sandbox && let Some(known) = self.sandboxes.get_mut(sandbox) {
            known.netns = Some(scope.clone());
        }
        scope
    }

    /// A process of the pod where the sandbox has none (CRI-O without infra containers).
    async fn pid_of_a_container(&mut self, containers: &[Container]) -> Result<u32, String> {
        for container in containers.iter().filter(|c| c.running) {
            if let Some(Info { pid: Some(pid), .. }) = self.container_info(&container.id).await? {
                return Ok(pid);
            }
        }
        Err("its sandbox has no process, and none of its containers runs".into())
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

    /// None if the container has gone.
    async fn cgroups_of(&mut self, id: &ContainerId) -> Result<Vec<CgroupId>, String> {
        let Some(info) = self.container_info(id).await? else {
            return Ok(Vec::new());
        };
        let (id, node) = (id.clone(), self.node.clone());
        let look = move || {
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
        match tokio::task::spawn_blocking(look).await {
            Ok(found) => found.map_err(|e| chain(&e)),
            Err(e) => Err(format!("cannot look up the cgroups of its containers: {e}")),
        }
    }

    async fn container_info(&mut self, id: &ContainerId) -> Result<Option<Info>, String> {
        if let Some(info) = self.containers.get(id) {
            return Ok(Some(info.clone()));
        }
        let Some(answer) = self.cri.container_status(id).await.map_err(|e| chain(&e))? else {
            return Ok(None);
        };
        if answer
            .status
            .as_ref()
            .is_some_and(|s| s.state() != ContainerState::ContainerRunning)
        {
            return Ok(None);
        }
        let info = parse_info(&answer.info).map_err(|e| chain(&e))?;
        self.containers.insert(id.clone(), info.clone());
        Ok(Some(info))
    }
}

/// Why nothing is known of a sandbox.
enum Untold {
    Gone,
    Why(String),
}

/// A pod whose sandbox died gets a new one under the same UID; the old one may be listed for a while.
fn newest_of_each_pod(sandboxes: Vec<v1::PodSandbox>) -> Vec<Listed> {
    let mut newest: BTreeMap<PodUid, Listed> = BTreeMap::new();
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

fn listed(sandbox: v1::PodSandbox) -> Option<Listed> {
    let mut labels = sandbox.labels;
    let metadata = sandbox.metadata.unwrap_or_default();
    let uid = labels.remove(POD_UID).unwrap_or(metadata.uid);
    if uid.is_empty() {
        debug!(
            sandbox = sandbox.id,
            "passing over a sandbox without a pod UID"
        );
        return None;
    }
    Some(Listed {
        id: SandboxId::new(sandbox.id),
        name: PodName {
            uid: PodUid::new(uid),
            namespace: labels.remove(POD_NAMESPACE).unwrap_or(metadata.namespace),
            name: labels.remove(POD_NAME).unwrap_or(metadata.name),
        },
        created_at: sandbox.created_at,
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
    }
}

/// An error and its causes on one line.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

#[cfg(test)]
mod tests;
