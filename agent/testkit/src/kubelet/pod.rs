//! A started pod and its containers.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_cri::v1 as cri;

use super::PodSpec;

/// A pod that was started.
#[derive(Debug, Clone)]
pub struct StartedPod {
    /// Its spec.
    pub spec: PodSpec,
    /// The id of its sandbox.
    pub sandbox_id: String,
    /// Its addresses, IPv4 first; empty if it shares the node's network.
    pub ips: Vec<IpAddr>,
    /// Its containers, in the order of their start.
    pub containers: Vec<StartedContainer>,
    pub(super) config: cri::PodSandboxConfig,
    pub(super) logs: PathBuf,
}

/// A container that was started.
#[derive(Debug, Clone)]
pub struct StartedContainer {
    /// Its name within the pod.
    pub name: String,
    /// Its CRI id.
    pub id: String,
}

/// The result of a command.
#[derive(Debug, Clone)]
pub struct ExecOutput {
    /// Its exit status.
    pub status: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl StartedPod {
    /// The container with this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn container(&self, name: &str) -> Result<&StartedContainer> {
        let found = self
            .containers
            .iter()
            .find(|container| container.name == name);
        found.with_context(|| format!("pod {} has no container {name}", self.spec.name))
    }

    /// A port of the pod on its IPv4 address, or on 127.0.0.1 for a host-network pod.
    ///
    /// # Errors
    /// If it has no IPv4 address.
    pub fn v4(&self, port: u16) -> Result<SocketAddr> {
        self.address(port, IpAddr::is_ipv4, [127, 0, 0, 1].into())
    }

    /// A port of the pod on its IPv6 address, or on ::1 for a host-network pod.
    ///
    /// # Errors
    /// If it has no IPv6 address, as on machines without IPv6.
    pub fn v6(&self, port: u16) -> Result<SocketAddr> {
        self.address(port, IpAddr::is_ipv6, std::net::Ipv6Addr::LOCALHOST.into())
    }

    /// The directory, inside the sandbox, of the pod's cgroup.
    pub fn cgroup(&self) -> PathBuf {
        let parent = self
            .config
            .linux
            .as_ref()
            .map_or("", |linux| &linux.cgroup_parent);
        PathBuf::from(format!("/sys/fs/cgroup{parent}"))
    }

    /// The directory, inside the sandbox, of a container's cgroup.
    pub fn container_cgroup(&self, container: &StartedContainer) -> PathBuf {
        self.cgroup().join(&container.id)
    }

    /// A container's log so far, in the CRI's log format.
    pub fn log(&self, container: &str) -> String {
        let mut files: Vec<_> = self
            .logs
            .join(container)
            .read_dir()
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        files.sort_by_key(fs::DirEntry::file_name);
        files
            .iter()
            .filter_map(|file| fs::read_to_string(file.path()).ok())
            .collect()
    }

    fn address(&self, port: u16, family: fn(&IpAddr) -> bool, local: IpAddr) -> Result<SocketAddr> {
        if self.spec.host_network {
            return Ok(SocketAddr::new(local, port));
        }
        let ip = self.ips.iter().copied().find(family);
        let ip = ip.with_context(|| format!("pod {} has only {:?}", self.spec.name, self.ips))?;
        Ok(SocketAddr::new(ip, port))
    }
}
