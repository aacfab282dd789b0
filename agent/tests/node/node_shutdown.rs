//! A node's shutdown ends pods without deleting them. The bus is a real one; a script stands in for systemd-logind.

use std::{path::Path, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use ebb_core::drain_report::ReleaseReason;
use libtest_mimic::Trial;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{sleep, timeout},
};

use crate::{
    kube::Cluster,
    peer::Peer,
    scene::{SECOND, SOON, Scene, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial(
        "while_the_node_shuts_down_the_only_container_of_a_pod_is_held",
        shutdown,
    )]
}

/// The configuration of a bus on which everything is allowed.
const BUS: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path=SOCKET</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>"#;

/// A bus with a stand-in for systemd-logind.
struct Logind {
    _bus: Child,
    _script: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Logind {
    async fn start(directory: &Path, socket: &Path) -> Result<Self> {
        let config = directory.join("bus.conf");
        let text = BUS.replace("SOCKET", &socket.display().to_string());
        std::fs::write(&config, text)?;
        let mut bus = Command::new("/usr/bin/dbus-daemon")
            .args(["--nofork", "--print-address"])
            .arg(format!("--config-file={}", config.display()))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting dbus-daemon: run `cargo xtask setup`")?;
        let address = bus.stdout.take().context("no standard output")?;
        let mut address = BufReader::new(address).lines();
        let address = timeout(SOON, address.next_line()).await??;
        let mut script = Command::new("/usr/bin/python3")
            .args(["-c", include_str!("logind.py")])
            .env("DBUS_SYSTEM_BUS_ADDRESS", address.context("no address")?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting python3")?;
        let output = script.stdout.take().context("no standard output")?;
        let mut logind = Self {
            _bus: bus,
            input: script.stdin.take().context("no standard input")?,
            _script: script,
            output: BufReader::new(output).lines(),
        };
        logind.says("ready").await?;
        Ok(logind)
    }

    async fn says(&mut self, what: &str) -> Result<()> {
        let line = timeout(SOON, self.output.next_line()).await??;
        ensure!(line.as_deref() == Some(what), "{line:?}, not {what}");
        Ok(())
    }

    async fn prepares_for_shutdown(&mut self) -> Result<()> {
        self.input.write_all(b"true\n").await?;
        self.says("set").await
    }
}

async fn shutdown(scene: Scene) -> Result<()> {
    let directory = scene.directory("bus")?;
    let socket = directory.join("socket");
    let mut logind = Logind::start(&directory, &socket).await?;
    let flag = socket.display().to_string();
    let c = Cluster::start(scene, &["--dbus-socket", &flag]).await?;
    let before = c.serve("before-shutdown").await?;
    c.is_not_held(&before, "app", "not-deleting").await?;

    let pod = c.serve("at-shutdown").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    logind.prepares_for_shutdown().await?;
    let kubelet = c.kubelet()?;
    let container = pod.containers[0].clone();
    let stopping =
        tokio::spawn(async move { kubelet.stop_container(&container, 30 * SECOND).await });
    c.agent.until_draining("at-shutdown").await?;
    sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(peer);
    stopping.await??;
    let report = c.agent.drain("at-shutdown").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let stops = c.stops(&pod).await?;
    let held = stops.first().context("the stop is not listed")?;
    ensure!(
        held.held && held.evidence.as_deref() == Some("node-shutdown"),
        "{held:?}"
    );
    let text = c.agent.query(&["explain", &pod.spec.uid]).await?;
    ensure!(text.contains("the node is shutting down"), "{text}");
    Ok(())
}
