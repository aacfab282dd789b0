//! The proxies that run on this host.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use ebb_protocol::{
    proxy_metrics::{PROXY_METRICS_PATH, ProxyMetrics},
    views::ProxyVersion,
};
use http::Request;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::UnixStream, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    kubelet::{RunningKubelet, run_version, same_socket},
    state::InstallState,
};
use crate::linux::files::resolve_in;

/// The name of the proxy's process.
const NAME: &str = "ebb-cri-proxy";

/// The proxies in the processes below `root`, by process id. Asks their running program, because the file on the disk
/// may be newer.
pub(crate) fn running(root: &Path) -> Vec<ProxyVersion> {
    let processes = root.join("proc");
    let entries = fs::read_dir(&processes).into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let comm = fs::read_to_string(processes.join(pid.to_string()).join("comm"));
            comm.is_ok_and(|comm| comm.trim_end() == NAME)
        })
        .collect();
    pids.sort_unstable();
    let version = |pid: u32| match run_version(&processes.join(pid.to_string()).join("exe")) {
        Ok(text) => ProxyVersion {
            pid,
            version: text.trim().strip_prefix(NAME).map(|v| v.trim().to_owned()),
            error: None,
        },
        Err(e) => ProxyVersion {
            pid,
            version: None,
            error: Some(format!("its version is unknown: {e}")),
        },
    };
    pids.into_iter().map(version).collect()
}

/// The name of the proxy's socket in ebb's run directory.
const SOCKET: &str = "cri.sock";

/// How long the proxy may take to answer with its metrics, all in all.
const METRICS_WITHIN: Duration = Duration::from_millis(500);

/// The longest answer. Its labels have fixed sets of values.
const LONGEST_METRICS: usize = 256 << 10;

/// Where the proxy of the host below `root` listens: as installed, else in ebb's run directory.
fn socket(root: &Path, run_dir: &Path) -> PathBuf {
    let installed = InstallState::load(root).ok().flatten();
    installed.map_or_else(|| run_dir.join(SOCKET), |state| state.socket)
}

/// The proxy's socket as this process sees it, if it exists.
pub(crate) fn find_socket(root: &Path, run_dir: &Path) -> Option<PathBuf> {
    let path = resolve_in(root, &socket(root, run_dir)).ok();
    path.filter(|path| path.exists())
}

/// Whether the kubelet of the host below `root` is configured to use the proxy. `None` if there is no kubelet, or this
/// process can't read its configuration.
pub(crate) fn is_used_by_kubelet(root: &Path, run_dir: &Path) -> Option<bool> {
    let kubelet = RunningKubelet::find(root).filter(|kubelet| kubelet.unread.is_none())?;
    Some(same_socket(&kubelet.endpoint, &socket(root, run_dir)))
}

/// The metrics of the proxy that listens at `socket`.
pub(crate) async fn metrics(socket: &Path) -> Result<ProxyMetrics> {
    let answer = timeout(METRICS_WITHIN, get_metrics(socket)).await;
    answer.context("the proxy does not answer in time")?
}

async fn get_metrics(socket: &Path) -> Result<ProxyMetrics> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    // The reader of the reply gets the connection's error.
    let _connection = AbortOnDropHandle::new(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let request = Request::get(format!("http://localhost{PROXY_METRICS_PATH}"));
    let reply = sender
        .send_request(request.body(Empty::<Bytes>::new())?)
        .await?;
    // A proxy of an older version forwards the request, and the runtime refuses it.
    ensure!(
        reply.status().is_success(),
        "the proxy answers {}",
        reply.status()
    );
    let body = Limited::new(reply.into_body(), LONGEST_METRICS).collect();
    let body = body.await.map_err(io::Error::other)?;
    Ok(serde_json::from_slice(&body.to_bytes())?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A host with a kubelet of this command line.
    fn host(cmdline: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for pid in ["1", "7"] {
            let process = root.path().join("proc").join(pid);
            fs::create_dir_all(process.join("ns")).unwrap();
            symlink("mnt:[1]", process.join("ns/mnt")).unwrap();
            fs::write(
                process.join("comm"),
                ["systemd\n", "kubelet\n"][usize::from(pid == "7")],
            )
            .unwrap();
            fs::write(process.join("cmdline"), cmdline).unwrap();
        }
        root
    }

    #[test]
    fn the_kubelet_uses_the_proxy_if_its_endpoint_is_the_proxys_socket() {
        let used = |cmdline: &str| {
            let root = host(cmdline);
            is_used_by_kubelet(root.path(), Path::new("/run/ebb"))
        };
        let flag = "kubelet\0--container-runtime-endpoint=unix://";
        assert_eq!(used(&format!("{flag}/var/run/ebb/cri.sock\0")), Some(true));
        assert_eq!(
            used(&format!("{flag}/run/containerd/containerd.sock\0")),
            Some(false)
        );
        assert_eq!(used("kubelet\0"), Some(false));
        assert_eq!(
            used("kubelet\0--config=/nowhere\0"),
            None,
            "it can't be read"
        );
        let nowhere = tempfile::tempdir().unwrap();
        assert_eq!(
            is_used_by_kubelet(nowhere.path(), Path::new("/run/ebb")),
            None
        );
    }

    #[tokio::test]
    async fn a_proxy_that_does_not_answer_is_given_up_soon() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join(SOCKET);
        assert_eq!(find_socket(Path::new("/"), directory.path()), None);
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(
            find_socket(Path::new("/"), directory.path()),
            Some(socket.clone())
        );
        let started = std::time::Instant::now();
        assert!(metrics(&socket).await.is_err());
        assert!(
            started.elapsed() < 4 * METRICS_WITHIN,
            "{:?}",
            started.elapsed()
        );
    }
}
