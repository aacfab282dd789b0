//! A pod that runs, or ran.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_cri::v1 as cri;

use super::PodSpec;

/// A pod that was started.
#[derive(Debug, Clone)]
pub struct Pod {
    /// What it shall be.
    pub spec: PodSpec,
    /// The id of its sandbox.
    pub sandbox_id: String,
    /// Its addresses, IPv4 first; none if it shares the node's network.
    pub ips: Vec<IpAddr>,
    /// Its containers, in the order they were started in.
    pub containers: Vec<Container>,
    pub(super) config: cri::PodSandboxConfig,
    pub(super) logs: PathBuf,
}

/// A container that was started.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its name within the pod.
    pub name: String,
    /// The runtime's id for it.
    pub id: String,
}

/// What a command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit status.
    pub status: i32,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Pod {
    /// The container of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn container(&self, name: &str) -> Result<&Container> {
        let found = self
            .containers
            .iter()
            .find(|container| container.name == name);
        found.with_context(|| format!("pod {} has no container {name}", self.spec.name))
    }

    /// A port of the pod at its IPv4 address; at 127.0.0.1 for a host-network pod.
    ///
    /// # Errors
    /// If it has no IPv4 address.
    pub fn v4(&self, port: u16) -> Result<SocketAddr> {
        self.address(port, IpAddr::is_ipv4, [127, 0, 0, 1].into())
    }

    /// A port of the pod at its IPv6 address; at ::1 for a host-network pod.
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
    pub fn container_cgroup(&self, container: &Container) -> PathBuf {
        self.cgroup().join(&container.id)
    }

    /// What a container has written so far, in the CRI's log format; empty if it wrote nothing.
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
