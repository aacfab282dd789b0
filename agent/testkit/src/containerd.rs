//! containerd, with all its state inside the sandbox.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::kubelet::Kubelet;
use crate::parts::Parts;
use crate::sandbox::SandboxPaths;
use crate::{helpers, image, runc};

/// The socket of the node's containerd: the path of real nodes, in the sandbox's own `/run`.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

const START_WITHIN: Duration = Duration::from_secs(30);
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// A running (or stopped) containerd.
#[derive(Debug)]
pub struct Containerd {
    parts: Parts,
    directory: PathBuf,
    child: Option<Child>,
}

impl Containerd {
    /// Writes the configuration, starts containerd and waits until the CRI reports runtime and network as ready.
    ///
    /// # Errors
    /// If it exits or is not ready in time. The error includes the end of its log.
    pub async fn start(parts: &Parts, paths: &SandboxPaths) -> Result<Self> {
        let directory = paths.directory().join("containerd");
        fs::create_dir_all(directory.join("cni"))?;
        let runc = runc_for_this_machine(parts, &directory)?;
        fs::write(
            directory.join("config.toml"),
            configuration(&directory, &runc, parts),
        )?;
        fs::write(
            directory.join("cni/10-ebb-node.conflist"),
            network().to_string(),
        )?;
        let mut containerd = Self {
            parts: parts.clone(),
            directory,
            child: None,
        };
        containerd.resume().await?;
        Ok(containerd)
    }

    /// Starts containerd again after [`Self::stop`] or [`Self::kill`]. Its pods have run on.
    ///
    /// # Errors
    /// As for [`Self::start`]. If it already runs, nothing happens.
    pub async fn resume(&mut self) -> Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        let log = File::options().create(true).append(true).open(self.log())?;
        let child = Command::new(self.parts.containerd())
            .arg("--config")
            .arg(self.directory.join("config.toml"))
            .env("PATH", self.parts.path_variable())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("can't start {}", self.parts.containerd().display()))?;
        self.child = Some(child);
        self.until_ready()
            .await
            .with_context(|| format!("containerd's log:\n{}", self.log_tail()))
    }

    /// Stops containerd with SIGTERM. Pods run on, under their shims.
    ///
    /// # Errors
    /// If it does not exit within ten seconds.
    pub async fn stop(&mut self) -> Result<ExitStatus> {
        self.end(Signal::TERM).await
    }

    /// Kills containerd, as a crash would.
    ///
    /// # Errors
    /// If it was not running.
    pub async fn kill(&mut self) -> Result<ExitStatus> {
        self.end(Signal::KILL).await
    }

    /// The CRI socket.
    pub fn socket(&self) -> &Path {
        Path::new(SOCKET)
    }

    /// containerd's log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// The pid, in the sandbox's PID namespace, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Imports the images of an archive from [`image`].
    pub(crate) async fn import(&self, archive: &Path) -> Result<()> {
        let output = Command::new(self.parts.ctr())
            .args([
                "--address",
                SOCKET,
                "--namespace",
                "k8s.io",
                "images",
                "import",
                "--digests=false",
            ])
            .arg(archive)
            .output()
            .await
            .with_context(|| format!("can't start {}", self.parts.ctr().display()))?;
        if !output.status.success() {
            bail!(
                "can't import images: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    async fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        let mut child = self.child.take().context("containerd is not running")?;
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        if let Some(pid) = pid {
            kill_process(pid, signal)?;
        }
        let status = timeout(STOP_WITHIN, child.wait())
            .await
            .context("containerd does not exit")??;
        Ok(status)
    }

    async fn until_ready(&mut self) -> Result<()> {
        let kubelet = Kubelet::new(self.socket())?;
        let started = Instant::now();
        loop {
            if let Some(status) = self
                .child
                .as_mut()
                .and_then(|child| child.try_wait().transpose())
            {
                self.child = None;
                bail!("containerd exited at its start ({})", status?);
            }
            match kubelet.is_ready().await {
                Ok(true) => return Ok(()),
                Ok(false) | Err(_) if started.elapsed() < START_WITHIN => {}
                Ok(false) => bail!("containerd's network is not ready after {START_WITHIN:?}"),
                Err(error) => return Err(error.context("containerd does not answer")),
            }
            sleep(Duration::from_millis(30)).await;
        }
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

/// runc itself if cgroup2 has a cpu controller, else a wrapper (see [`crate::runc`]).
fn runc_for_this_machine(parts: &Parts, directory: &Path) -> Result<PathBuf> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .context("cgroup2 is not at /sys/fs/cgroup")?;
    if controllers
        .split_whitespace()
        .any(|controller| controller == "cpu")
    {
        return Ok(parts.runc());
    }
    let bin = directory.join("bin");
    fs::create_dir_all(&bin)?;
    symlink(std::env::current_exe()?, bin.join(helpers::RUNC))?;
    symlink(parts.runc(), bin.join(runc::REAL))?;
    Ok(bin.join(helpers::RUNC))
}

/// Two settings are for machines that restrict even root: a container's OOM score adjustment is never below
/// containerd's own, and hugetlb may be missing.
fn configuration(directory: &Path, runc: &Path, parts: &Parts) -> String {
    let directory = directory.display();
    let cni = parts.cni_plugins();
    format!(
        r#"version = 2
root = "{directory}/root"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
address = "{SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
disable_apparmor = true
tolerate_missing_hugetlb_controller = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni}"
conf_dir = "{directory}/cni"
"#,
        pause = image::PAUSE,
        runc = runc.display(),
        cni = cni.display(),
    )
}

/// A bridge between pods and node. No masquerading, because it needs iptables and no other network can be reached.
/// Hairpin mode is the kubelet's setting, and makes the plugin turn off IPv6 duplicate address detection, which takes
/// more than a second per pod.
fn network() -> serde_json::Value {
    let mut ranges = vec![json!([{ "subnet": "10.88.0.0/24" }])];
    let mut routes = vec![json!({ "dst": "0.0.0.0/0" })];
    if Path::new("/proc/sys/net/ipv6").is_dir() {
        ranges.push(json!([{ "subnet": "fd00:ebb::/64" }]));
        routes.push(json!({ "dst": "::/0" }));
    }
    json!({
        "cniVersion": "0.4.0",
        "name": "ebb-node",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": "/run/cni/networks",
                "ranges": ranges,
                "routes": routes,
            },
        }],
    })
}
