//! The specs of pods and containers.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_cri::v1 as cri;

use super::{owned, seconds};
use crate::image;
use crate::parts::Parts;

/// The parts of a pod's spec that the kubelet uses.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// The pod's name.
    pub name: String,
    /// Its namespace; `default` unless set.
    pub namespace: String,
    /// Its UID; a random one unless set.
    pub uid: String,
    /// Its own labels.
    pub labels: HashMap<String, String>,
    /// Its annotations. The sandbox carries all of them.
    pub annotations: HashMap<String, String>,
    /// Whether it shares the node's network namespace.
    pub host_network: bool,
    /// Whether it sees all processes of the node.
    pub host_pid: bool,
    /// terminationGracePeriodSeconds; 30 s unless set.
    pub grace: Duration,
    /// Its containers, in the order of their start.
    pub containers: Vec<ContainerSpec>,
}

impl PodSpec {
    /// A pod without containers.
    pub fn new(name: &str) -> Self {
        let uid = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
        Self {
            name: name.into(),
            namespace: "default".into(),
            uid: uid.trim().into(),
            labels: HashMap::new(),
            annotations: HashMap::new(),
            host_network: false,
            host_pid: false,
            grace: Duration::from_secs(30),
            containers: Vec::new(),
        }
    }

    /// Adds a container.
    #[must_use]
    pub fn container(mut self, container: ContainerSpec) -> Self {
        self.containers.push(container);
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Lets the pod share the node's network namespace.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// Lets the pod see all processes of the node.
    #[must_use]
    pub fn host_pid(mut self) -> Self {
        self.host_pid = true;
        self
    }

    /// Sets the grace period.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// The pod's cgroup, in the CRI's form.
    pub(super) fn cgroup_parent(&self, kubepods: &str) -> String {
        format!("{kubepods}/pod{}", self.uid)
    }

    /// (generatePodSandboxConfig)
    pub(super) fn sandbox_config(&self, kubepods: &str, logs: &Path) -> cri::PodSandboxConfig {
        let mut labels = self.labels.clone();
        labels.extend(self.identity());
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: self.name.clone(),
                uid: self.uid.clone(),
                namespace: self.namespace.clone(),
                attempt: 0,
            }),
            // A host-network pod has the node's host name.
            hostname: if self.host_network {
                String::new()
            } else {
                self.name.clone()
            },
            log_directory: logs.display().to_string(),
            // Without this the runtime copies the machine's resolv.conf, which may lie in /run.
            dns_config: Some(cri::DnsConfig {
                servers: vec!["127.0.0.1".into()],
                ..Default::default()
            }),
            labels,
            annotations: self.annotations.clone(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent(kubepods),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(self.namespaces()),
                    // (HasPrivilegedContainer) The runtime allows privileged containers only in a privileged sandbox.
                    privileged: self.containers.iter().any(|c| c.security.privileged),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn namespaces(&self) -> cri::NamespaceOption {
        let network = if self.host_network {
            cri::NamespaceMode::Node
        } else {
            cri::NamespaceMode::Pod
        };
        let pid = if self.host_pid {
            cri::NamespaceMode::Node
        } else {
            cri::NamespaceMode::Container
        };
        cri::NamespaceOption {
            network: network.into(),
            pid: pid.into(),
            ..Default::default()
        }
    }

    fn identity(&self) -> HashMap<String, String> {
        owned(&[
            ("io.kubernetes.pod.name", &self.name),
            ("io.kubernetes.pod.namespace", &self.namespace),
            ("io.kubernetes.pod.uid", &self.uid),
        ])
    }
}

/// A preStop hook.
#[derive(Debug, Clone)]
pub enum PreStop {
    /// GETs this path from this port of the pod.
    HttpGet {
        /// The pod's port.
        port: u16,
        /// The path.
        path: String,
    },
    /// Runs a command in the container.
    Exec(Vec<String>),
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Its name within the pod.
    pub name: String,
    /// Its image.
    pub image: String,
    /// Command that replaces the image's entrypoint and arguments, unless empty.
    pub command: Vec<String>,
    /// Arguments that replace the image's own, unless empty.
    pub args: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Files or directories of the node to mount.
    pub mounts: Vec<Mount>,
    /// Its security context.
    pub security: Security,
    /// Ports that have a name.
    pub ports: Vec<(String, u16)>,
    /// preStop hook.
    pub pre_stop: Option<PreStop>,
    /// Whether it is a sidecar: an init container with restart policy Always, listed before the main containers.
    pub sidecar: bool,
}

/// A file or directory of the node that a container mounts.
#[derive(Debug, Clone)]
pub struct Mount {
    /// The path on the node.
    pub from: PathBuf,
    /// The path in the container.
    pub to: String,
    /// Whether the mount is read-only.
    pub read_only: bool,
    /// Whether mounts and unmounts below it propagate from the node to the container (`HostToContainer`).
    pub follows: bool,
}

/// A container's securityContext. The default is the runtime's, without seccomp.
#[derive(Debug, Clone, Default)]
pub struct Security {
    /// Whether it is privileged.
    pub privileged: bool,
    /// Whether its root file system is read-only.
    pub read_only_root: bool,
    /// Whether to use the runtime's default seccomp profile.
    pub seccomp_default: bool,
    /// Capabilities besides the runtime's defaults, without `CAP_`.
    pub add: Vec<String>,
    /// Default capabilities that it does not get; `ALL` is all of them.
    pub drop: Vec<String>,
    /// The user that it runs as; the image's user unless set.
    pub user: Option<i64>,
}

impl ContainerSpec {
    /// A container of any image.
    pub fn new(name: &str, image: &str) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            command: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
            mounts: Vec::new(),
            security: Security::default(),
            ports: Vec::new(),
            pre_stop: None,
            sidecar: false,
        }
    }

    /// A container that runs nginx ([`image::NGINX`]).
    pub fn nginx(name: &str) -> Self {
        Self::new(name, image::NGINX)
    }

    /// A container that runs a command of this machine, or of the unpacked parts, which are below `/parts`. Its image
    /// has this stop signal, one of [`image::STOP_SIGNALS`].
    pub fn host(name: &str, stop_signal: &str, command: &[&str]) -> Self {
        let parts = Parts::directory();
        let library = format!("/parts/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        let path = "/usr/bin:/usr/sbin:/parts/usr/bin:/parts/usr/sbin";
        let mut spec = Self::new(name, &image::host(stop_signal))
            .command(command)
            .env("PATH", path)
            .env(
                "LD_LIBRARY_PATH",
                &format!("{library}:{}", library.replace("/usr", "")),
            )
            .mount("/usr", "/usr")
            .mount(parts, "/parts");
        for mount in &mut spec.mounts {
            mount.read_only = true;
        }
        spec
    }

    /// A container that runs one of the programs of [`crate::fixture`], for instance
    /// `["serve", "--port", "8080"]`.
    pub fn fixture(name: &str, args: &[&str]) -> Self {
        let mut spec = Self::new(name, image::FIXTURE);
        spec.args = args.iter().map(ToString::to_string).collect();
        spec
    }

    /// Sets the user that it runs as.
    #[must_use]
    pub fn user(mut self, id: i64) -> Self {
        self.security.user = Some(id);
        self
    }

    /// Sets the command.
    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(ToString::to_string).collect();
        self
    }

    /// Mounts a file or directory of the node.
    #[must_use]
    pub fn mount(mut self, from: impl Into<PathBuf>, to: &str) -> Self {
        self.mounts.push(Mount {
            from: from.into(),
            to: to.into(),
            read_only: false,
            follows: false,
        });
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Names a port. An HTTP hook to this port then uses the name.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.into(), port));
        self
    }

    /// Sets the preStop hook.
    #[must_use]
    pub fn pre_stop(mut self, hook: PreStop) -> Self {
        self.pre_stop = Some(hook);
        self
    }

    /// Makes it a sidecar. That changes the stop order, not the calls to the runtime.
    #[must_use]
    pub fn sidecar(mut self) -> Self {
        self.sidecar = true;
        self
    }

    /// (generateContainerConfig)
    pub(super) fn config(&self, pod: &PodSpec, attempt: u32) -> cri::ContainerConfig {
        let mut labels = pod.identity();
        labels.extend(owned(&[("io.kubernetes.container.name", &self.name)]));
        let mut annotations = owned(&[
            (
                "io.kubernetes.pod.terminationGracePeriod",
                &seconds(pod.grace).to_string(),
            ),
            ("io.kubernetes.container.restartCount", &attempt.to_string()),
        ]);
        if let Some(hook) = &self.pre_stop {
            annotations.insert(
                "io.kubernetes.container.preStopHandler".into(),
                hook.to_json(&self.ports),
            );
        }
        if !self.ports.is_empty() {
            let ports = self.ports.iter().map(|(name, port)| {
                serde_json::json!({ "name": name, "containerPort": port, "protocol": "TCP" })
            });
            annotations.insert(
                "io.kubernetes.container.ports".into(),
                serde_json::Value::from_iter(ports).to_string(),
            );
        }
        let mounts = self.mounts.iter().map(|mount| cri::Mount {
            container_path: mount.to.clone(),
            host_path: mount.from.display().to_string(),
            readonly: mount.read_only,
            propagation: if mount.follows {
                cri::MountPropagation::PropagationHostToContainer.into()
            } else {
                cri::MountPropagation::PropagationPrivate.into()
            },
            ..Default::default()
        });
        let envs = self.env.iter().map(|(key, value)| cri::KeyValue {
            key: key.clone(),
            value: value.clone(),
        });
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: self.name.clone(),
                attempt,
            }),
            image: Some(cri::ImageSpec {
                image: self.image.clone(),
                ..Default::default()
            }),
            command: self.command.clone(),
            args: self.args.clone(),
            envs: envs.collect(),
            mounts: mounts.collect(),
            labels,
            annotations,
            log_path: format!("{}/{attempt}.log", self.name),
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(self.security.context(pod)),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

impl Security {
    /// (determineEffectiveSecurityContext)
    fn context(&self, pod: &PodSpec) -> cri::LinuxContainerSecurityContext {
        let profile = if self.seccomp_default {
            cri::security_profile::ProfileType::RuntimeDefault
        } else {
            cri::security_profile::ProfileType::Unconfined
        };
        cri::LinuxContainerSecurityContext {
            namespace_options: Some(pod.namespaces()),
            privileged: self.privileged,
            readonly_rootfs: self.read_only_root,
            run_as_user: self.user.map(|value| cri::Int64Value { value }),
            seccomp: Some(cri::SecurityProfile {
                profile_type: profile.into(),
                ..Default::default()
            }),
            capabilities: Some(cri::Capability {
                add_capabilities: self.add.clone(),
                drop_capabilities: self.drop.clone(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

impl PreStop {
    /// The handler as Kubernetes writes it into the container's annotation.
    fn to_json(&self, ports: &[(String, u16)]) -> String {
        match self {
            Self::HttpGet { port, path } => {
                let name = ports.iter().find(|(_, number)| number == port);
                let port = name.map_or_else(
                    || (*port).into(),
                    |(name, _)| serde_json::Value::from(name.as_str()),
                );
                serde_json::json!({ "httpGet": { "path": path, "port": port, "scheme": "HTTP" } })
            }
            Self::Exec(command) => serde_json::json!({ "exec": { "command": command } }),
        }
        .to_string()
    }
}
