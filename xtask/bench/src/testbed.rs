//! The node under measurement, its pods, and the scale of a run.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use ebb_testkit::{
    Node, http,
    kubelet::{ContainerSpec, Kubelet, PodSpec, StartedPod},
};
use k8s_cri::v1 as cri;
use tokio::runtime::Runtime;

use crate::ebb::AgentProcess;

/// The node's address on the pod network, which exists while a pod runs.
const NODE: [u8; 4] = [10, 88, 0, 1];

/// nginx's port. Nothing else on the machine uses it, so it identifies nginx's connections.
const NGINX_PORT: u16 = 18_473;

/// A common configuration of nginx: one worker, no access log, and no limit of requests per connection.
fn nginx_conf() -> String {
    format!(
        "keepalive_requests 1000000000;\nserver {{ listen {NGINX_PORT} backlog=4096; root /srv; }}\n"
    )
}

/// The size of each measurement.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// Pairs, or rounds, of measurements.
    pub(crate) pairs: usize,
    /// How long a measured load lasts, in whole seconds.
    pub(crate) window: Duration,
    /// Connections of the pod in `many`.
    pub(crate) many: usize,
    /// Other connections that are open while releases are measured.
    pub(crate) others: usize,
    /// Measured releases.
    pub(crate) releases: usize,
    /// Requests on kept connections.
    pub(crate) requests: usize,
    /// Calls of each CRI method per way and batch. There are as many batches as pairs.
    pub(crate) calls: usize,
    /// Containers in a list.
    pub(crate) containers: usize,
    /// Calls held at once.
    pub(crate) held: usize,
}

impl Scale {
    /// The numbers in the names of results, such as `list_100k`.
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
    /// Enough to test the bench.
    pub(crate) const QUICK: Self = Self {
        pairs: 1,
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
pub(crate) struct Testbed {
    pub(crate) runtime: Runtime,
    pub(crate) node: Node,
    pub(crate) kubelet: Kubelet,
    pub(crate) ebb: PathBuf,
    pub(crate) scale: Scale,
}

impl Testbed {
    pub(crate) fn start(ebb: &Path, scale: Scale) -> Result<Self> {
        let runtime = Runtime::new()?;
        let node = runtime.block_on(Node::start())?;
        // The client needs the runtime that drives its connection.
        let kubelet = runtime.block_on(async { node.kubelet() })?;
        Ok(Self {
            runtime,
            node,
            kubelet,
            ebb: ebb.to_owned(),
            scale,
        })
    }

    /// Starts an agent with an empty run directory, so that it continues no drain of an earlier one. A pod must run,
    /// because the node port is also on the pod network.
    pub(crate) fn agent(&self) -> Result<AgentProcess> {
        let address = self.node_port();
        fs::remove_dir_all(self.node.directory("ebb")?)?;
        let directory = self.node.directory("ebb")?;
        // A cgroup for the kubelet, as on every node, so that ebb checks for probes although none comes.
        let place = self.node.paths();
        fs::create_dir_all(place.cgroup("kubelet"))?;
        let kubelet = format!("/{}/kubelet", place.name());
        AgentProcess::start(
            &self.ebb,
            self.node.socket(),
            &directory,
            &kubelet,
            &[address],
        )
    }

    /// The address of the agent's node port for pods.
    pub(crate) fn node_port(&self) -> SocketAddr {
        SocketAddr::from((NODE, 9690))
    }

    /// Runs a pod with nginx and returns it with its server's address.
    pub(crate) fn nginx(&self) -> Result<(StartedPod, SocketAddr)> {
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

    pub(crate) fn run(&self, spec: &PodSpec) -> Result<StartedPod> {
        self.runtime.block_on(self.kubelet.run(spec))
    }

    pub(crate) fn until_open(&self, address: SocketAddr) -> Result<()> {
        let open = http::until_open(address, Duration::from_secs(20));
        Ok(self.runtime.block_on(open)?)
    }

    /// The pid of a pod's sandbox process, which identifies its network namespace.
    pub(crate) fn sandbox_pid(&self, pod: &StartedPod) -> Result<u32> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.sandbox_id.clone(),
            verbose: true,
        };
        let mut runtime = self.kubelet.runtime();
        let reply = self.runtime.block_on(runtime.pod_sandbox_status(request))?;
        let info = reply.into_inner().info;
        let info: serde_json::Value =
            serde_json::from_str(info.get("info").map_or("", String::as_str))?;
        let pid = info["pid"].as_u64().context("the runtime reports no pid")?;
        Ok(pid.try_into()?)
    }

    /// Stops and removes a pod.
    pub(crate) fn end(&self, pod: &StartedPod) -> Result<()> {
        self.runtime.block_on(async {
            let stop = self.kubelet.stop(pod, Duration::from_secs(1)).await;
            if let Some(e) = stop.error() {
                anyhow::bail!("stopping pod {}: {e:#}", pod.spec.name);
            }
            self.kubelet.remove(pod).await
        })
    }
}
