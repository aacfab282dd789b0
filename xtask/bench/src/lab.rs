//! Where it is measured: a node, pods on it, and how much of everything.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use ebb_node::{
    Node, http,
    kubelet::{ContainerSpec, Kubelet, Pod, PodSpec},
};
use k8s_cri::v1 as cri;
use tokio::runtime::Runtime;

use crate::ebb::Agent;

/// The node's own address on the pod network, once there is a pod.
const NODE: [u8; 4] = [10, 88, 0, 1];

/// nginx's port: one by which its connections can be told from all others of the machine.
const NGINX_PORT: u16 = 18_473;

/// nginx as it is often run: one worker, no access log, and connections kept for as many requests as come.
fn nginx_conf() -> String {
    format!(
        "keepalive_requests 1000000000;\nserver {{ listen {NGINX_PORT} backlog=4096; root /srv; }}\n"
    )
}

/// How much of everything.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    /// Pairs of measurements.
    pub(crate) pairs: usize,
    /// How long a load lasts that is measured, in whole seconds.
    pub(crate) window: Duration,
    /// Connections where many are wanted.
    pub(crate) many: usize,
    /// Other connections while releases are measured.
    pub(crate) others: usize,
    /// Releases.
    pub(crate) releases: usize,
    /// Requests on connections that are kept.
    pub(crate) requests: usize,
    /// Calls of each CRI method each way, in each batch; there are as many batches as pairs.
    pub(crate) calls: usize,
    /// Containers in a list.
    pub(crate) containers: usize,
    /// Calls held at once.
    pub(crate) held: usize,
}

impl Extent {
    /// What the figures are named after.
    pub(crate) const FULL: Self = Self {
        pairs: 11,
        window: Duration::from_secs(2),
        many: 100_000,
        others: 10_000,
        releases: 100,
        requests: 20_000,
        calls: 1_000,
        containers: 200,
        held: 500,
    };
    /// Enough to see that everything is measured.
    pub(crate) const QUICK: Self = Self {
        pairs: 3,
        window: Duration::from_secs(1),
        many: 2_000,
        others: 200,
        releases: 3,
        requests: 500,
        calls: 50,
        containers: 5,
        held: 20,
    };
}

/// A node under measurement.
pub(crate) struct Lab {
    pub(crate) runtime: Runtime,
    pub(crate) node: Node,
    pub(crate) kubelet: Kubelet,
    pub(crate) ebb: PathBuf,
    pub(crate) extent: Extent,
}

impl Lab {
    /// Starts a node.
    pub(crate) fn start(ebb: &Path, extent: Extent) -> Result<Self> {
        let runtime = Runtime::new()?;
        let node = runtime.block_on(Node::start())?;
        // Its connection lives on this runtime.
        let kubelet = runtime.block_on(async { node.kubelet() })?;
        Ok(Self {
            runtime,
            node,
            kubelet,
            ebb: ebb.to_owned(),
            extent,
        })
    }

    /// Starts an agent. A pod must run: its node port is also on the pod network.
    pub(crate) fn agent(&self) -> Result<Agent> {
        let address = self.node_port();
        let directory = self.node.directory("ebb")?;
        // As on every node, the kubelet has a cgroup; that no probe comes from it does not make ebb cheaper.
        let place = self.node.place();
        fs::create_dir_all(place.cgroup("kubelet"))?;
        let kubelet = format!("/{}/kubelet", place.name());
        Agent::start(
            &self.ebb,
            self.node.socket(),
            &directory,
            &kubelet,
            &[address],
        )
    }

    /// The agent's node port as pods reach it.
    pub(crate) fn node_port(&self) -> SocketAddr {
        SocketAddr::from((NODE, 9690))
    }

    /// Runs a pod with nginx and returns it with its address.
    pub(crate) fn nginx(&self) -> Result<(Pod, SocketAddr)> {
        let conf = self.node.directory("nginx-conf")?;
        let files = self.node.directory("nginx-files")?;
        fs::write(conf.join("default.conf"), nginx_conf())?;
        fs::write(files.join("index.html"), "hello\n")?;
        let container = ContainerSpec::nginx("nginx")
            .mount(&conf, "/etc/nginx/conf.d")
            .mount(&files, "/srv");
        let pod = self.run(&PodSpec::new("nginx").container(container))?;
        let address = pod.v4(NGINX_PORT)?;
        self.until_open(address)?;
        Ok((pod, address))
    }

    pub(crate) fn run(&self, spec: &PodSpec) -> Result<Pod> {
        self.runtime.block_on(self.kubelet.run(spec))
    }

    pub(crate) fn until_open(&self, address: SocketAddr) -> Result<()> {
        let open = http::until_open(address, Duration::from_secs(20));
        Ok(self.runtime.block_on(open)?)
    }

    /// The pid of a pod's own process, by which its network namespace is found.
    pub(crate) fn sandbox_pid(&self, pod: &Pod) -> Result<u32> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.sandbox_id.clone(),
            verbose: true,
        };
        let mut runtime = self.kubelet.runtime();
        let reply = self.runtime.block_on(runtime.pod_sandbox_status(request))?;
        let info = reply.into_inner().info;
        let info: serde_json::Value =
            serde_json::from_str(info.get("info").map_or("", String::as_str))?;
        let pid = info["pid"].as_u64().context("the runtime tells no pid")?;
        Ok(pid.try_into()?)
    }

    /// Stops and removes a pod.
    pub(crate) fn end(&self, pod: &Pod) -> Result<()> {
        self.runtime.block_on(async {
            let stop = self.kubelet.stop(pod, Duration::from_secs(1)).await;
            if let Some(e) = stop.error() {
                anyhow::bail!("stopping pod {}: {e:#}", pod.spec.name);
            }
            self.kubelet.remove(pod).await
        })
    }
}
