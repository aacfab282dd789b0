//! The agents of a cluster, found through its API server.

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
};

use super::ClusterFlags;

/// The label of the agents' pods (deploy/daemonset.yaml).
const AGENTS: &str = "app.kubernetes.io/name=ebb";

/// The agents that a command may ask, by node.
pub(super) struct Agents {
    client: Client,
    agents: Vec<RemoteAgent>,
}

/// The agent of one node.
pub(super) struct RemoteAgent {
    /// The node's name.
    pub(super) node: String,
    /// The agent's pod.
    pub(super) pod: String,
    /// The pods of its namespace.
    pub(super) api: Api<Pod>,
}

impl Agents {
    pub(super) async fn find(flags: &ClusterFlags) -> Result<Self> {
        let client = connect(flags).await?;
        let namespace = &flags.agent_namespace;
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let pods = api.list(&ListParams::default().labels(AGENTS)).await;
        let pods = pods.with_context(|| format!("listing the agents' pods in {namespace}"))?;
        let mut agents: Vec<_> = pods
            .into_iter()
            .filter(runs)
            .filter_map(|pod| {
                Some(RemoteAgent {
                    node: pod.spec?.node_name?,
                    pod: pod.metadata.name?,
                    api: api.clone(),
                })
            })
            .filter(|agent| flags.node.as_ref().is_none_or(|node| agent.node == *node))
            .collect();
        agents.sort_by(|a, b| a.node.cmp(&b.node));
        if agents.is_empty() {
            match &flags.node {
                Some(node) => bail!("no agent of ebb runs on node {node}"),
                None => bail!(
                    "no agent of ebb runs in namespace {namespace}: name its namespace with --agent-namespace, or \
                     install ebb"
                ),
            }
        }
        Ok(Self { client, agents })
    }

    pub(super) fn all(&self) -> &[RemoteAgent] {
        &self.agents
    }

    /// The agent, if there is only one.
    pub(super) fn only(&self) -> Result<&RemoteAgent> {
        match &self.agents[..] {
            [agent] => Ok(agent),
            agents => {
                let nodes: Vec<_> = agents.iter().map(|agent| agent.node.as_str()).collect();
                bail!("choose a node with --node: {}", nodes.join(", "))
            }
        }
    }

    /// The agent of the node of this pod: its whole name, or `NAMESPACE/NAME`. `None` if the API server knows no such
    /// pod.
    pub(super) async fn of_pod(&self, pod: &str) -> Result<Option<&RemoteAgent>> {
        let Some(found) = self.pod(pod).await? else {
            return Ok(None);
        };
        let node = found.spec.and_then(|spec| spec.node_name);
        let node = node.with_context(|| format!("pod {pod} is not on a node yet"))?;
        let agent = self.agents.iter().find(|agent| agent.node == node);
        let agent =
            agent.with_context(|| format!("no agent of ebb runs on {node}, the node of {pod}"))?;
        Ok(Some(agent))
    }

    /// The addresses of this pod, with commas between them. Agents of other nodes do not know its name.
    pub(super) async fn addresses_of_pod(&self, pod: &str) -> Result<String> {
        let found = self.pod(pod).await?.with_context(|| {
            format!(
                "--peer {pod}: no address, no network such as 10.0.0.0/8, and the API server knows no such pod; give \
                 its whole name, or NAMESPACE/NAME"
            )
        })?;
        let ips = found.status.and_then(|status| status.pod_ips);
        let ips: Vec<_> = ips.into_iter().flatten().map(|ip| ip.ip).collect();
        if ips.is_empty() {
            bail!("--peer {pod}: the pod has no address");
        }
        Ok(ips.join(","))
    }

    /// The pod of this name, or `NAMESPACE/NAME`.
    async fn pod(&self, pod: &str) -> Result<Option<Pod>> {
        let (pods, name): (Api<Pod>, _) = match pod.split_once('/') {
            Some((namespace, name)) => (Api::namespaced(self.client.clone(), namespace), name),
            None => (Api::all(self.client.clone()), pod),
        };
        let named = ListParams::default().fields(&format!("metadata.name={name}"));
        let found = pods.list(&named).await;
        let found = found.with_context(|| format!("asking the API server for pod {pod}"))?;
        let mut found = found.items;
        match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => {
                let namespaces = found.iter().filter_map(|p| p.metadata.namespace.as_deref());
                let names: Vec<_> = namespaces.map(|ns| format!("  {ns}/{name}")).collect();
                bail!(
                    "more than one pod is called {name}; give NAMESPACE/NAME of one of them:\n{}",
                    names.join("\n")
                )
            }
        }
    }
}

fn runs(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
}

async fn connect(flags: &ClusterFlags) -> Result<Client> {
    let options = KubeConfigOptions {
        context: flags.context.clone(),
        ..KubeConfigOptions::default()
    };
    let config = match &flags.kubeconfig {
        None => Config::from_kubeconfig(&options).await,
        Some(path) => {
            let file = Kubeconfig::read_from(path)
                .with_context(|| format!("can't use the kubeconfig {}", path.display()))?;
            Config::from_custom_kubeconfig(file, &options).await
        }
    };
    let config = config.context("can't use the kubeconfig; name another one with --kubeconfig")?;
    Ok(Client::try_from(config)?)
}

#[cfg(test)]
mod tests {
    use ebb_testkit::{api_server::ApiServer, kubelet::PodSpec};

    use super::*;

    /// The agents of two nodes, and a pod `web-0` in a namespace of each.
    async fn cluster() -> (ApiServer, Agents) {
        let api = ApiServer::start(([127, 0, 0, 1], 0).into()).await.unwrap();
        for (namespace, node) in [("shop", "node-a"), ("test", "node-b")] {
            let mut agent =
                PodSpec::new(&format!("ebb-{node}")).label("app.kubernetes.io/name", "ebb");
            agent.namespace = "ebb-system".into();
            api.create(&agent, node);
            let mut pod = PodSpec::new("web-0");
            pod.namespace = namespace.into();
            api.create(&pod, node);
            if namespace == "shop" {
                assert!(api.set_addresses(&pod, &["10.0.0.7", "fd00::7"]));
            }
        }
        let directory = tempfile::TempDir::new().unwrap();
        let kubeconfig = directory.path().join("kubeconfig");
        api.kubeconfig(&kubeconfig).unwrap();
        let flags = ClusterFlags {
            kubeconfig: Some(kubeconfig),
            agent_namespace: "ebb-system".into(),
            ..ClusterFlags::default()
        };
        (api, Agents::find(&flags).await.unwrap())
    }

    #[tokio::test]
    async fn of_two_pods_with_one_name_the_namespace_chooses() {
        let (_api, agents) = cluster().await;
        for (pod, node) in [("shop/web-0", "node-a"), ("test/web-0", "node-b")] {
            let agent = agents.of_pod(pod).await.unwrap().unwrap();
            assert_eq!(agent.node, node);
        }
        let why = agents.of_pod("web-0").await.err().unwrap().to_string();
        assert!(
            why.ends_with("give NAMESPACE/NAME of one of them:\n  shop/web-0\n  test/web-0"),
            "{why}"
        );
        assert!(agents.of_pod("else/web-0").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_peer_on_any_node_is_known_by_its_addresses() {
        let (_api, agents) = cluster().await;
        let addresses = agents.addresses_of_pod("shop/web-0").await.unwrap();
        assert_eq!(addresses, "10.0.0.7,fd00::7");
        for (pod, why) in [
            ("test/web-0", "has no address"),
            ("shop/web", "knows no such pod"),
            ("web-0", "more than one pod"),
        ] {
            let said = agents.addresses_of_pod(pod).await.unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
        }
    }
}
