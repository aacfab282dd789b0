//! Checks of the configuration at the start: values that are well formed, and wrong on this node.

use std::{fs, os::unix::net::UnixStream, path::Path, sync::Arc};

use ebb_core::socket_path;
use rustix::net::sockopt::socket_peercred;
use tokio::sync::watch;

use super::start::StartError;
use crate::{
    linux::cgroups::is_cgroup2,
    pods::{kube::KubePods, table::PodTable},
};

/// The name of the proxy's process (`/proc/PID/comm`).
const PROXY: &str = "ebb-cri-proxy";

/// Refuses the CRI proxy's own socket as `--cri-socket`. The agent must reach the runtime also while the proxy is away,
/// and without the proxy's log of its calls.
///
/// # Errors
///
/// [`StartError::CriIsProxy`]
pub(super) fn cri_socket(path: &Path) -> Result<(), StartError> {
    if socket_path::is_proxy(path) || is_served_by_proxy(path) {
        return Err(StartError::CriIsProxy {
            socket: path.to_owned(),
        });
    }
    Ok(())
}

/// Whether the process that listens at the socket is the proxy. Not if systemd made the socket: then systemd's process
/// is the one that the kernel reports (`unix_listen` in net/unix/af_unix.c).
fn is_served_by_proxy(path: &Path) -> bool {
    let peer = UnixStream::connect(path).and_then(|s| Ok(socket_peercred(s)?));
    let comm = peer
        .and_then(|peer| fs::read_to_string(format!("/proc/{}/comm", peer.pid.as_raw_nonzero())));
    comm.is_ok_and(|comm| comm.trim_end() == PROXY)
}

/// Warns if `--cgroup-root` is not cgroup v2.
pub(super) fn cgroup_root(root: &Path) {
    if !is_cgroup2(root) {
        tracing::warn!(
            "--cgroup-root {} is not a mount of cgroup v2: ebb can't see the connections of pods on the host network, \
             nor tell the kubelet's probes from connections",
            root.display()
        );
    }
}

/// Warns once if the API server knows no pod of the node `name` although the runtime has some: the name is probably
/// wrong, and then ebb learns of no deletion. Ends when that is known.
pub(super) async fn node_name(
    name: String,
    mut kube: watch::Receiver<Arc<KubePods>>,
    mut pods: watch::Receiver<Arc<PodTable>>,
) {
    if kube.wait_for(|kube| kube.synced).await.is_err()
        || pods.wait_for(|table| !table.is_empty()).await.is_err()
    {
        return;
    }
    // The list of the runtime may be newer than that of the API server by a moment.
    if tokio::time::timeout(LATE, kube.wait_for(|kube| !kube.pods.is_empty()))
        .await
        .is_err()
    {
        tracing::warn!(
            "the API server knows no pod on a node called {name:?}, and the container runtime has {}: set --node-name \
             or NODE_NAME to this node's name in the cluster (spec.nodeName); until then ebb learns of no deletion",
            pods.borrow().len()
        );
    }
}

/// By how much the API server's list of pods may be behind the runtime's.
const LATE: std::time::Duration = std::time::Duration::from_secs(5);
