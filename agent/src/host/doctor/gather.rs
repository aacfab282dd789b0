//! Asking the node. Everything here fails softly: what can't be had is a fact, too.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    Check, Diagnosis,
    checks::{Answer, Facts, checks},
};
use crate::{
    api::client::AgentClient,
    host::{
        files::followed,
        install::PROXY_SOCKET,
        kubelet::{DEFAULT_ENDPOINT, Kubelet, same_socket, well_known_runtime},
        state::State,
    },
    kernel,
    pods::cri::Cri,
    report::{
        text::one_line,
        view::{PodList, SCHEMA, VersionView},
    },
};

/// Where to ask.
#[derive(Clone, Debug)]
pub struct Where {
    /// The host's root directory.
    pub root: PathBuf,
    /// The runtime's own socket, where that is not to be found out.
    pub runtime: Option<PathBuf>,
    /// The proxy's socket, where that is not to be found out.
    pub proxy: Option<PathBuf>,
    /// The mount of cgroup v2.
    pub cgroup_root: PathBuf,
}

impl Where {
    /// The proxy's socket: by flag, by the installation, or the usual one.
    fn proxy(&self, state: Option<&State>) -> PathBuf {
        let installed = state.map(|s| s.socket.clone());
        let socket = self.proxy.clone().or(installed);
        socket.unwrap_or_else(|| PROXY_SOCKET.into())
    }

    /// The runtime's own socket.
    pub(super) fn runtime(&self) -> PathBuf {
        let state = State::load(&self.root).ok().flatten();
        self.runtime_of(state.as_ref(), Kubelet::find(&self.root).as_ref())
    }

    fn runtime_of(&self, state: Option<&State>, kubelet: Option<&Kubelet>) -> PathBuf {
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

/// Checks the node.
pub async fn node(at: &Where, agent: &AgentClient) -> Diagnosis {
    Diagnosis {
        schema: SCHEMA.into(),
        pod: None,
        checks: gather(at, agent).await,
    }
}

async fn gather(at: &Where, agent: &AgentClient) -> Vec<Check> {
    let state = State::load(&at.root).ok().flatten();
    let kubelet = Kubelet::find(&at.root);
    let runtime = at.runtime_of(state.as_ref(), kubelet.as_ref());
    let proxy = at.proxy(state.as_ref());
    let version: Result<VersionView, _> = agent.get_json("/v1/version").await;
    let pods: Option<PodList> = match &version {
        Ok(_) => agent.get_json("/v1/pods").await.ok(),
        Err(_) => None,
    };
    let untracked = pods.into_iter().flat_map(|list| list.pods);
    let untracked = untracked.filter_map(|p| Some((p.pod.to_string(), p.untracked?)));
    checks(&Facts {
        kernel: kernel::release(),
        btf: kernel::able().map_err(|e| one_line(&e.into())),
        capabilities: capabilities(),
        cgroup2: (
            at.cgroup_root.clone(),
            at.cgroup_root.join("cgroup.controllers").exists(),
        ),
        agent: version.map(|v| v.version).map_err(|e| one_line(&e.into())),
        untracked: untracked.collect(),
        kubelet: kubelet.map(|k| {
            let version = k.version(&at.root).map_err(|e| e.to_string());
            (k, version)
        }),
        runtime: (runtime.clone(), ask(&at.root, &runtime).await),
        proxy: match followed(&at.root, &proxy).is_ok_and(|p| p.exists()) {
            true => (proxy.clone(), Some(ask(&at.root, &proxy).await)),
            false => (proxy, None),
        },
    })
}

async fn ask(root: &Path, socket: &Path) -> Answer {
    let at =
        followed(root, socket).map_err(|e| format!("can't reach {}: {e}", socket.display()))?;
    match Cri::connect(&at).await {
        Ok(cri) => Ok(cri.runtime().to_owned()),
        Err(e) => Err(one_line(&e.into())),
    }
}

fn capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}
