//! A kubelet's CRI calls.
//!
//! The endpoint is a parameter, so the same calls go to the runtime or to a proxy in front of it. Names in
//! parentheses are functions of the kubelet's pkg/kubelet/kuberuntime.

mod pod;
mod spec;
mod stop;

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_cri::v1 as cri;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::time::sleep;
use tonic::Request;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::sandbox;

pub use pod::{ExecOutput, StartedContainer, StartedPod};
pub use spec::{ContainerSpec, Mount, PodSpec, PreStop, Security};
pub use stop::{PodStop, StoppedContainer};

/// The kubelet's runtimeRequestTimeout, its deadline for calls without another one.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// The kubelet's limit for a message; tonic's own is 4 MiB.
const MESSAGE_LIMIT: usize = 16 << 20;

/// A kubelet's connection to a CRI endpoint. Clones share it. It reconnects when the endpoint is back.
#[derive(Debug, Clone)]
pub struct Kubelet {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    kubepods: String,
    logs: PathBuf,
}

impl Kubelet {
    /// A kubelet that calls the unix socket `endpoint`, which need not exist yet.
    ///
    /// # Errors
    /// If the process is not in a sandbox, whose cgroups and directory pods use.
    pub fn new(endpoint: &Path) -> Result<Self> {
        let paths = sandbox::paths()?;
        // Kubelets from 1.31 on send this authority.
        let channel = Endpoint::from_shared(format!("unix://{}", endpoint.display()))?
            .origin(Uri::from_static("http://localhost"))
            .connect_lazy();
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_LIMIT),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT),
            kubepods: paths.kubepods(),
            logs: paths.directory().join("pods"),
        })
    }

    /// The raw CRI client, for calls that have no method here.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        self.runtime.clone()
    }

    /// The raw CRI client of the image service.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        self.images.clone()
    }

    /// Whether runtime and pod network are ready.
    ///
    /// # Errors
    /// If the endpoint does not answer.
    pub async fn is_ready(&self) -> Result<bool> {
        let request = within(Duration::from_secs(5), cri::StatusRequest::default());
        let status = self
            .runtime()
            .status(request)
            .await
            .map_err(refused("Status"))?
            .into_inner();
        Ok(status
            .status
            .is_some_and(|status| status.conditions.iter().all(|condition| condition.status)))
    }

    /// Waits until the runtime knows an image, at most ten seconds.
    ///
    /// # Errors
    /// If it does not.
    pub async fn until_image(&self, name: &str) -> Result<()> {
        for _ in 0..500 {
            let image = cri::ImageSpec {
                image: name.into(),
                ..Default::default()
            };
            let request = cri::ImageStatusRequest {
                image: Some(image),
                verbose: false,
            };
            let reply = self
                .images()
                .image_status(within(REQUEST_TIMEOUT, request))
                .await;
            if reply
                .map_err(refused("ImageStatus"))?
                .into_inner()
                .image
                .is_some()
            {
                return Ok(());
            }
            sleep(Duration::from_millis(20)).await;
        }
        bail!("the runtime does not know the image {name}")
    }

    /// Starts a pod: the sandbox, then each container in turn (SyncPod). When it returns, the addresses are known,
    /// but the programs may not listen yet (see [`crate::http::until_open`]).
    ///
    /// # Errors
    /// The first call that failed. What earlier calls made stays, as with a real kubelet.
    pub async fn run(&self, spec: &PodSpec) -> Result<StartedPod> {
        let logs = self
            .logs
            .join(format!("{}_{}_{}", spec.namespace, spec.name, spec.uid));
        fs::create_dir_all(&logs)?;
        let config = spec.sandbox_config(&self.kubepods, &logs);
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        // The kubelet doubles its timeout for this one call (remote_runtime.go, RunPodSandbox).
        let reply = self
            .runtime()
            .run_pod_sandbox(within(REQUEST_TIMEOUT * 2, request))
            .await;
        let sandbox_id = reply
            .map_err(refused("RunPodSandbox"))?
            .into_inner()
            .pod_sandbox_id;
        let ips = self.addresses(&sandbox_id).await?;
        let mut pod = StartedPod {
            spec: spec.clone(),
            config,
            sandbox_id,
            ips,
            logs,
            containers: Vec::new(),
        };
        for container in &spec.containers {
            let id = self.start_container(&pod, container, 0).await?;
            pod.containers.push(StartedContainer {
                name: container.name.clone(),
                id,
            });
        }
        Ok(pod)
    }

    /// Starts a container again after it has stopped, as by the restart policy.
    ///
    /// # Errors
    /// If the pod has no such container or a call fails.
    pub async fn restart(&self, pod: &mut StartedPod, name: &str, attempt: u32) -> Result<()> {
        let spec = pod
            .spec
            .containers
            .iter()
            .find(|spec| spec.name == name)
            .cloned();
        let spec = spec.with_context(|| format!("the pod has no container {name}"))?;
        let id = self.start_container(pod, &spec, attempt).await?;
        pod.containers.retain(|container| container.name != name);
        pod.containers.push(StartedContainer {
            name: name.into(),
            id,
        });
        Ok(())
    }

    async fn start_container(
        &self,
        pod: &StartedPod,
        spec: &ContainerSpec,
        attempt: u32,
    ) -> Result<String> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.sandbox_id.clone(),
            config: Some(spec.config(&pod.spec, attempt)),
            sandbox_config: Some(pod.config.clone()),
        };
        fs::create_dir_all(pod.logs.join(&spec.name))?;
        let reply = self
            .runtime()
            .create_container(within(REQUEST_TIMEOUT, request))
            .await;
        let container_id = reply
            .map_err(refused("CreateContainer"))?
            .into_inner()
            .container_id;
        let request = cri::StartContainerRequest {
            container_id: container_id.clone(),
        };
        let reply = self
            .runtime()
            .start_container(within(REQUEST_TIMEOUT, request))
            .await;
        reply
            .map_err(refused("StartContainer"))
            .with_context(|| format!("container {}", spec.name))?;
        Ok(container_id)
    }

    /// Runs a command in a container for at most `limit`; zero is no limit.
    ///
    /// # Errors
    /// If it can't be started or takes longer. A non-zero exit status is not an error.
    pub async fn exec(
        &self,
        container: &StartedContainer,
        command: &[&str],
        limit: Duration,
    ) -> Result<ExecOutput> {
        let request = cri::ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: seconds(limit),
        };
        // (ExecSync) A call without a limit has no RPC deadline.
        let request = if limit.is_zero() {
            Request::new(request)
        } else {
            within(limit + REQUEST_TIMEOUT, request)
        };
        let reply = self
            .runtime()
            .exec_sync(request)
            .await
            .map_err(refused("ExecSync"))?
            .into_inner();
        Ok(ExecOutput {
            status: reply.exit_code,
            stdout: reply.stdout,
            stderr: reply.stderr,
        })
    }

    /// The pid of a container's first process, in the sandbox's PID namespace.
    ///
    /// # Errors
    /// If the container is unknown or the runtime does not report the pid.
    pub async fn pid(&self, container: &StartedContainer) -> Result<u32> {
        let request = cri::ContainerStatusRequest {
            container_id: container.id.clone(),
            verbose: true,
        };
        let reply = self
            .runtime()
            .container_status(within(REQUEST_TIMEOUT, request))
            .await;
        let info = reply.map_err(refused("ContainerStatus"))?.into_inner().info;
        let info: serde_json::Value =
            serde_json::from_str(info.get("info").map_or("", String::as_str))?;
        let pid = info["pid"]
            .as_u64()
            .context("the runtime does not report the pid")?;
        Ok(pid.try_into()?)
    }

    /// A container's state in the runtime.
    ///
    /// # Errors
    /// If the container is unknown.
    pub async fn status(&self, container: &StartedContainer) -> Result<cri::ContainerStatus> {
        let request = cri::ContainerStatusRequest {
            container_id: container.id.clone(),
            verbose: false,
        };
        let reply = self
            .runtime()
            .container_status(within(REQUEST_TIMEOUT, request))
            .await;
        reply
            .map_err(refused("ContainerStatus"))?
            .into_inner()
            .status
            .context("an empty status")
    }

    async fn addresses(&self, sandbox_id: &str) -> Result<Vec<IpAddr>> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: sandbox_id.into(),
            ..Default::default()
        };
        let reply = self
            .runtime()
            .pod_sandbox_status(within(REQUEST_TIMEOUT, request))
            .await;
        let status = reply
            .map_err(refused("PodSandboxStatus"))?
            .into_inner()
            .status;
        let Some(network) = status.and_then(|status| status.network) else {
            return Ok(Vec::new());
        };
        std::iter::once(network.ip)
            .chain(network.additional_ips.into_iter().map(|further| further.ip))
            .filter(|ip| !ip.is_empty())
            .map(|ip| ip.parse().with_context(|| format!("{ip:?} is no address")))
            .collect()
    }
}

/// A request with its deadline in the `grpc-timeout` header.
fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

fn refused(call: &'static str) -> impl Fn(tonic::Status) -> anyhow::Error {
    move |status| anyhow::anyhow!("{call}: {:?}: {}", status.code(), status.message())
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

fn owned(map: &[(&str, &str)]) -> HashMap<String, String> {
    map.iter()
        .map(|(key, value)| ((*key).into(), (*value).into()))
        .collect()
}
