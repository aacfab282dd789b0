//! How a kubelet ends a pod (killPodWithSyncResult, killContainer).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_cri::v1 as cri;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{
    ContainerSpec, Kubelet, PreStop, REQUEST_TIMEOUT, StartedContainer, StartedPod, refused,
    seconds, within,
};
use crate::http;

/// The shortest timeout of StopContainer (minimumGracePeriodInSeconds).
const FLOOR: Duration = Duration::from_secs(2);

/// The result of stopping a pod.
#[derive(Debug)]
pub struct PodStop {
    /// Its containers, in the order in which they stopped.
    pub containers: Vec<StoppedContainer>,
    /// How long StopPodSandbox took, or why it failed.
    pub sandbox: Result<Duration>,
    /// How long everything took.
    pub took: Duration,
}

impl PodStop {
    /// The first failure, if any.
    pub fn error(&self) -> Option<&anyhow::Error> {
        let containers = self
            .containers
            .iter()
            .filter_map(|container| container.result.as_ref().err());
        containers.chain(self.sandbox.as_ref().err()).next()
    }
}

/// The result of stopping a container.
#[derive(Debug)]
pub struct StoppedContainer {
    /// The container's name.
    pub name: String,
    /// How long its preStop hook took and whether it failed, if it has one.
    pub pre_stop: Option<(Duration, Result<()>)>,
    /// The timeout of the StopContainer: what was left of the grace period.
    pub timeout: Duration,
    /// How long StopContainer took, or why it failed.
    pub result: Result<Duration>,
}

/// The stop order (terminationOrdering): a sidecar stops after all main containers, and after the sidecars that were
/// started later.
#[derive(Debug, Clone)]
struct StopOrder {
    /// For each container, those that it waits for.
    before: Arc<HashMap<String, Vec<String>>>,
    ended: Arc<watch::Sender<HashSet<String>>>,
}

impl StopOrder {
    fn new(pod: &StartedPod) -> Self {
        let runs = |name: &str| pod.containers.iter().any(|c| c.name == name);
        let specs: Vec<_> = pod
            .spec
            .containers
            .iter()
            .filter(|s| runs(&s.name))
            .collect();
        let before = specs.iter().enumerate().map(|(i, spec)| {
            let waits_for = |j: usize, other: &ContainerSpec| !other.sidecar || j > i;
            let others = specs.iter().enumerate();
            let others = others.filter(|(j, other)| spec.sidecar && waits_for(*j, other));
            (
                spec.name.clone(),
                others.map(|(_, s)| s.name.clone()).collect(),
            )
        });
        Self {
            before: Arc::new(before.collect()),
            ended: Arc::new(watch::Sender::new(HashSet::new())),
        }
    }

    /// Waits for the containers before `name`, but no longer than `left`. Returns the time waited, in whole seconds
    /// (waitForTurn).
    async fn wait_for_turn(&self, name: &str, left: Duration) -> Duration {
        let started = Instant::now();
        let before = self.before.get(name).map_or(&[][..], Vec::as_slice);
        let mut ended = self.ended.subscribe();
        let turn = ended.wait_for(|ended| before.iter().all(|name| ended.contains(name)));
        let _ = timeout(left, turn).await;
        Duration::from_secs(started.elapsed().as_secs())
    }

    fn ended(&self, name: &str) {
        self.ended.send_modify(|ended| {
            ended.insert(name.into());
        });
    }
}

impl Kubelet {
    /// Stops a pod as the kubelet does: all containers at once, each with its preStop hook and then StopContainer,
    /// sidecars in their order (`StopOrder`), then the sandbox, even if a container could not be stopped. The pod's
    /// resources stay until [`Self::remove`].
    pub async fn stop(&self, pod: &StartedPod, grace: Duration) -> PodStop {
        let started = Instant::now();
        let ordering = StopOrder::new(pod);
        let mut stopping = JoinSet::new();
        for container in &pod.containers {
            let (kubelet, pod, container) = (self.clone(), pod.clone(), container.clone());
            let ordering = ordering.clone();
            stopping.spawn(async move {
                let stopped = kubelet
                    .kill_container(&pod, &container, grace, &ordering)
                    .await;
                ordering.ended(&container.name);
                stopped
            });
        }
        let mut containers = Vec::new();
        while let Some(stopped) = stopping.join_next().await {
            containers.extend(stopped);
        }
        let sandbox = self.stop_sandbox(pod).await;
        PodStop {
            containers,
            sandbox,
            took: started.elapsed(),
        }
    }

    /// Calls StopContainer with the kubelet's RPC deadline, again if the container exits meanwhile. Returns how long it
    /// took.
    ///
    /// # Errors
    /// The runtime's error, unless the container is unknown.
    pub async fn stop_container(
        &self,
        container: &StartedContainer,
        timeout: Duration,
    ) -> Result<Duration> {
        let started = Instant::now();
        let request = cri::StopContainerRequest {
            container_id: container.id.clone(),
            timeout: seconds(timeout),
        };
        loop {
            let request = within(REQUEST_TIMEOUT + timeout, request.clone());
            match self.runtime().stop_container(request).await {
                // containerd 1.6 says this if the container exits at that moment. The kubelet repeats a stop that failed.
                Err(status) if status.message().contains("ttrpc: closed") => {}
                Err(status) if status.code() != tonic::Code::NotFound => {
                    return Err(refused("StopContainer")(status));
                }
                _ => return Ok(started.elapsed()),
            }
        }
    }

    /// Calls StopPodSandbox. Returns how long it took.
    ///
    /// # Errors
    /// The runtime's error.
    pub async fn stop_sandbox(&self, pod: &StartedPod) -> Result<Duration> {
        let started = Instant::now();
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod.sandbox_id.clone(),
        };
        let reply = self
            .runtime()
            .stop_pod_sandbox(within(REQUEST_TIMEOUT, request))
            .await;
        reply.map_err(refused("StopPodSandbox"))?;
        Ok(started.elapsed())
    }

    /// Removes a pod's containers, sandbox and cgroup.
    ///
    /// # Errors
    /// The runtime's error.
    pub async fn remove(&self, pod: &StartedPod) -> Result<()> {
        for container in &pod.containers {
            let request = cri::RemoveContainerRequest {
                container_id: container.id.clone(),
            };
            let reply = self
                .runtime()
                .remove_container(within(REQUEST_TIMEOUT, request))
                .await;
            reply.map_err(refused("RemoveContainer"))?;
        }
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: pod.sandbox_id.clone(),
        };
        let reply = self
            .runtime()
            .remove_pod_sandbox(within(REQUEST_TIMEOUT, request))
            .await;
        reply.map_err(refused("RemovePodSandbox"))?;
        // The kubelet removes the pod's own cgroup. It may be gone, or busy for a moment.
        let _ = fs::remove_dir(pod.cgroup());
        Ok(())
    }

    async fn kill_container(
        &self,
        pod: &StartedPod,
        container: &StartedContainer,
        grace: Duration,
        ordering: &StopOrder,
    ) -> StoppedContainer {
        let spec = pod
            .spec
            .containers
            .iter()
            .find(|spec| spec.name == container.name);
        let hook = spec
            .and_then(|spec| spec.pre_stop.as_ref())
            .filter(|_| !grace.is_zero());
        let mut left = grace;
        let mut pre_stop = None;
        if let Some(hook) = hook {
            let started = Instant::now();
            // The kubelet waits for the hook no longer than the grace period; the hook itself runs on.
            let (kubelet, pod, container, hook) =
                (self.clone(), pod.clone(), container.clone(), hook.clone());
            let run = async move { kubelet.run_hook(&pod, &container, &hook, grace).await };
            let result = match timeout(grace, tokio::spawn(run)).await {
                Ok(ended) => ended.map_err(Into::into).flatten(),
                Err(_) => Err(anyhow::anyhow!("took longer than {grace:?}")),
            };
            // Whole seconds, as in the kubelet.
            left = left.saturating_sub(Duration::from_secs(started.elapsed().as_secs()));
            pre_stop = Some((started.elapsed(), result));
        }
        let waited = ordering.wait_for_turn(&container.name, left).await;
        let left = left.saturating_sub(waited).max(FLOOR);
        let result = self.stop_container(container, left).await;
        StoppedContainer {
            name: container.name.clone(),
            pre_stop,
            timeout: left,
            result,
        }
    }

    async fn run_hook(
        &self,
        pod: &StartedPod,
        container: &StartedContainer,
        hook: &PreStop,
        grace: Duration,
    ) -> Result<()> {
        match hook {
            PreStop::HttpGet { port, path } => {
                // Without `host` in the hook the kubelet uses the pod's address, and a host-network pod has none.
                let ip = pod.ips.first();
                let ip =
                    ip.ok_or_else(|| anyhow::anyhow!("failed to find networking container"))?;
                let address = SocketAddr::new(*ip, *port);
                http::get(address, path).await?;
            }
            PreStop::Exec(command) => {
                let command: Vec<&str> = command.iter().map(String::as_str).collect();
                let output = self.exec(container, &command, grace).await?;
                if output.status != 0 {
                    anyhow::bail!("exited with {}", output.status);
                }
            }
        }
        Ok(())
    }
}
