//! Runs ebb, and queries it by its command line.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb_testkit::Node;
use serde_json::Value;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::{sleep, timeout},
};

/// The agent and the proxy.
pub(crate) struct Ebb {
    program: PathBuf,
    agent_socket: PathBuf,
    cri_socket: PathBuf,
    agent: Child,
    proxy: Child,
}

impl Ebb {
    /// Starts both and waits until they answer.
    pub(crate) async fn start(program: &Path, node: &Node) -> Result<Self> {
        let run = node.directory("ebb")?;
        let agent_socket = run.join("agent.sock");
        let cri_socket = run.join("cri.sock");
        let mut agent = Command::new(program);
        agent
            .arg("agent")
            .arg("--cri-socket")
            .arg(node.socket())
            .arg("--run-dir")
            .arg(&run)
            .args(["--kube", "off"]);
        let mut proxy = Command::new(program.with_file_name("ebb-cri-proxy"));
        proxy
            .arg("--listen")
            .arg(&cri_socket)
            .arg("--runtime")
            .arg(node.socket())
            .arg("--agent")
            .arg(&agent_socket);
        let ebb = Self {
            agent: spawn(&mut agent)?,
            proxy: spawn(&mut proxy)?,
            program: program.to_owned(),
            agent_socket,
            cri_socket,
        };
        let started = Instant::now();
        while ebb.query(&["pods"]).await.is_err()
            || UnixStream::connect(&ebb.cri_socket).await.is_err()
        {
            ensure!(
                started.elapsed() < Duration::from_secs(10),
                "ebb did not start; its log is above"
            );
            sleep(Duration::from_millis(50)).await;
        }
        Ok(ebb)
    }

    /// The proxy's CRI socket.
    pub(crate) fn cri_socket(&self) -> &Path {
        &self.cri_socket
    }

    /// The `ebb` binary.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// The agent's socket.
    pub(crate) fn agent_socket(&self) -> &Path {
        &self.agent_socket
    }

    /// The output of `ebb VERB…`, indented.
    pub(crate) async fn table(&self, verb: &[&str]) -> Result<String> {
        let text = self.query(verb).await?;
        Ok(text.lines().map(|line| format!("    {line}\n")).collect())
    }

    /// ebb's report of a pod's drain.
    pub(crate) async fn report(&self, pod: &str) -> Result<Value> {
        let document: Value = serde_json::from_str(&self.query(&["drains", "-o", "json"]).await?)?;
        let drains = document["drains"]
            .as_array()
            .context("`ebb drains` lists no drains")?;
        let report = drains.iter().find(|r| r["pod"]["name"] == pod);
        report
            .cloned()
            .with_context(|| format!("`ebb drains` has no report of {pod}"))
    }

    /// Stops both by SIGTERM.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        for child in [&mut self.proxy, &mut self.agent] {
            let pid = child.id().context("ebb ended by itself")?;
            let status = Command::new("kill").arg(pid.to_string()).status().await?;
            ensure!(status.success(), "can't send SIGTERM to {pid}");
            let status = timeout(Duration::from_secs(5), child.wait())
                .await
                .context("ebb did not stop within 5 s of SIGTERM")??;
            ensure!(status.success(), "ebb stopped with {status}");
        }
        Ok(())
    }

    async fn query(&self, verb: &[&str]) -> Result<String> {
        let out = Command::new(&self.program)
            .args(verb)
            .arg("--agent")
            .arg(&self.agent_socket)
            .output()
            .await?;
        if !out.status.success() {
            bail!("{}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8(out.stdout)?)
    }
}

fn spawn(command: &mut Command) -> Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // The demo shows the drain's report instead of the log.
        .env("EBB_LOG", "warn")
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {}", command.as_std().get_program().display()))
}
