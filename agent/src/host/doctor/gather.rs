//! Gathers the facts of the node. Nothing here fails: an error is a fact, too.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ebb_core::format::one_line;
use ebb_protocol::{
    client::AgentClient,
    views::{PodList, SCHEMA, VersionView},
};

use super::{
    Check, Diagnosis,
    checks::{NodeFacts, ProbeResult, checks},
};

use crate::{
    host::{
        install::PROXY_SOCKET,
        kubelet::{DEFAULT_ENDPOINT, RunningKubelet, clients_of, same_socket, well_known_runtime},
        state::InstallState,
    },
    kernel,
    linux::files::resolve_in,
    pods::cri::Cri,
};

/// The host, and where its sockets are.
#[derive(Clone, Debug)]
pub(crate) struct DoctorOptions {
    /// The host's root directory.
    pub(crate) root: PathBuf,
    /// The runtime's own socket; `None` to find it.
    pub(crate) runtime: Option<PathBuf>,
    /// The proxy's socket; `None` to find it.
    pub(crate) proxy: Option<PathBuf>,
    /// The mount of cgroup v2.
    pub(crate) cgroup_root: PathBuf,
}

/// The host's root directory as this process sees it: `/`, or, from a container that shares the host's processes, the
/// root of the host's first process. Its files need CAP_SYS_PTRACE.
pub(crate) fn host_root() -> PathBuf {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
    let of_host = PathBuf::from("/proc/1/root");
    match (namespace("1"), namespace("self")) {
        (Ok(host), Ok(own)) if host != own && of_host.join("proc/1").exists() => of_host,
        _ => "/".into(),
    }
}

impl DoctorOptions {
    /// The proxy's socket: from the flag, else from the installation, else the default.
    fn proxy(&self, state: Option<&InstallState>) -> PathBuf {
        let installed = state.map(|s| s.socket.clone());
        let socket = self.proxy.clone().or(installed);
        socket.unwrap_or_else(|| PROXY_SOCKET.into())
    }

    pub(super) fn runtime(&self) -> PathBuf {
        let state = InstallState::load(&self.root).ok().flatten();
        self.runtime_of(state.as_ref(), RunningKubelet::find(&self.root).as_ref())
    }

    fn runtime_of(
        &self,
        state: Option<&InstallState>,
        kubelet: Option<&RunningKubelet>,
    ) -> PathBuf {
        let proxy = self.proxy(state);
        let of_kubelet = kubelet.map(|k| k.endpoint.clone());
        self.runtime
            .clone()
            .or_else(|| of_kubelet.filter(|e| !same_socket(e, &proxy)))
            .or_else(|| state.map(|s| s.runtime.clone()))
            .or_else(|| well_known_runtime(&self.root))
            .unwrap_or_else(|| DEFAULT_ENDPOINT.into())
    }
}

pub(crate) async fn node(options: &DoctorOptions, agent: &AgentClient) -> Diagnosis {
    Diagnosis {
        schema: SCHEMA.into(),
        pod: None,
        checks: gather(options, agent).await,
    }
}

async fn gather(options: &DoctorOptions, agent: &AgentClient) -> Vec<Check> {
    let state = InstallState::load(&options.root).ok().flatten();
    let kubelet = RunningKubelet::find(&options.root);
    let runtime = options.runtime_of(state.as_ref(), kubelet.as_ref());
    let proxy = options.proxy(state.as_ref());
    let proxy_clients = clients_of(&options.root, &proxy).ok();
    let version: Result<VersionView, _> = agent.get_json("/v1/version").await;
    let pods: Option<PodList> = match &version {
        Ok(_) => agent.get_json("/v1/pods").await.ok(),
        Err(_) => None,
    };
    let untracked = pods.into_iter().flat_map(|list| list.pods);
    let untracked = untracked.filter_map(|p| Some((p.pod.to_string(), p.untracked?)));
    checks(&NodeFacts {
        kernel: kernel::release(),
        btf: kernel::check_support().map_err(|e| one_line(&e)),
        lockdown: fs::read_to_string(options.root.join("sys/kernel/security/lockdown")).ok(),
        capabilities: capabilities(),
        cgroup2: (
            options.cgroup_root.clone(),
            options.cgroup_root.join("cgroup.controllers").exists(),
        ),
        agent: version.map(|v| v.version).map_err(|e| one_line(&e)),
        untracked: untracked.collect(),
        kubelet: kubelet.map(|k| {
            let version = k.version(&options.root).map_err(|e| e.to_string());
            (k, version)
        }),
        runtime: (runtime.clone(), probe(&options.root, &runtime).await),
        proxy: match resolve_in(&options.root, &proxy).is_ok_and(|p| p.exists()) {
            true => (proxy.clone(), Some(probe(&options.root, &proxy).await)),
            false => (proxy, None),
        },
        proxy_clients,
    })
}

async fn probe(root: &Path, socket: &Path) -> ProbeResult {
    let path =
        resolve_in(root, socket).map_err(|e| format!("can't reach {}: {e}", socket.display()))?;
    match Cri::connect(&path).await {
        Ok(cri) => Ok(cri.runtime().to_owned()),
        Err(e) => Err(one_line(&e)),
    }
}

fn capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}
