//! Runs `ebb agent`, `ebb-cri-proxy` and the other verbs of `ebb` as processes.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb_core::drain_report::Report;
use ebb_protocol::views::{DrainList, Explanation, FlowList, FlowView, PodList, PodView};
use ebb_testkit::{api_server::ApiServer, helpers::beside, http, kubelet::Kubelet};
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::{
    scene::{ExclusiveScene, SOON, Scene, directory, eventually, free_port},
    schema,
};

/// The real binary.
pub(crate) const EBB: &str = env!("CARGO_BIN_EXE_ebb");

/// The node's name in the cluster.
pub(crate) const NODE_NAME: &str = "node-1";

/// A running agent. Dropping it kills it.
pub(crate) struct Agent {
    child: Child,
    pub(crate) run: PathBuf,
    /// Its node port.
    pub(crate) port: u16,
}

/// A running CRI proxy. Dropping it kills it.
pub(crate) struct Proxy {
    child: Child,
    /// The socket it listens on.
    pub(crate) socket: PathBuf,
}

impl Scene {
    /// Starts an agent with a run directory of its own and waits until it answers.
    pub(crate) async fn agent(&self, flags: &[&str]) -> Result<Agent> {
        self.agent_in("ebb", flags).await
    }

    /// Starts an agent in this run directory.
    pub(crate) async fn agent_in(&self, run: &str, flags: &[&str]) -> Result<Agent> {
        Agent::start(self.node.socket(), &self.directory(run)?, flags).await
    }

    /// Starts an agent that uses this API server, which need not answer yet.
    pub(crate) async fn agent_with_api(&self, api: &ApiServer, flags: &[&str]) -> Result<Agent> {
        Agent::start_with_api(api, self.node.socket(), &self.directory("ebb")?, flags).await
    }

    /// Starts a proxy that asks `agent`.
    pub(crate) async fn proxy(&self, agent: &Agent) -> Result<Proxy> {
        Proxy::start(self.node.socket(), agent).await
    }

    /// A kubelet whose calls go through `proxy`.
    pub(crate) fn kubelet_at(&self, proxy: &Proxy) -> Result<Kubelet> {
        self.node.kubelet_at(&proxy.socket)
    }
}

impl ExclusiveScene {
    /// Starts an agent in this run directory.
    pub(crate) async fn agent_in(&self, run: &str, flags: &[&str]) -> Result<Agent> {
        Agent::start(self.node.socket(), &directory(&self.directory, run)?, flags).await
    }

    /// Starts an agent that uses this API server.
    pub(crate) async fn agent_with_api(&self, api: &ApiServer, flags: &[&str]) -> Result<Agent> {
        let run = directory(&self.directory, "ebb")?;
        Agent::start_with_api(api, self.node.socket(), &run, flags).await
    }

    /// Starts an agent and a proxy.
    pub(crate) async fn ebb(&self, flags: &[&str]) -> Result<(Agent, Proxy)> {
        let run = directory(&self.directory, "ebb")?;
        let agent = Agent::start(self.node.socket(), &run, flags).await?;
        let proxy = Proxy::start(self.node.socket(), &agent).await?;
        Ok((agent, proxy))
    }
}

impl Agent {
    async fn start(cri: &Path, run: &Path, flags: &[&str]) -> Result<Self> {
        Self::start_as(agent(cri, run), run, flags).await
    }

    async fn start_with_api(
        api: &ApiServer,
        cri: &Path,
        run: &Path,
        flags: &[&str],
    ) -> Result<Self> {
        let config = run.with_extension("kubeconfig");
        api.kubeconfig(&config)?;
        let mut command = agent_with(&["--kube", "auto"], cri, run);
        command
            .env("KUBECONFIG", config)
            .env("NODE_NAME", NODE_NAME);
        command.env_remove("KUBERNETES_SERVICE_HOST");
        Self::start_as(command, run, flags).await
    }

    async fn start_as(mut command: Command, run: &Path, flags: &[&str]) -> Result<Self> {
        let port = free_port();
        command
            .args(["--http", &format!("0.0.0.0:{port}")])
            .args(flags);
        let mut agent = Self {
            child: spawn(command, &log(run, "agent"))?,
            run: run.into(),
            port,
        };
        eventually("the agent answers", async || {
            if let Some(status) = agent.child.try_wait()? {
                bail!("the agent ended at its start with {status}");
            }
            Ok(agent.query(&["drains"]).await.ok())
        })
        .await?;
        Ok(agent)
    }

    pub(crate) fn pid(&self) -> Result<u32> {
        self.child.id().context("the agent has ended")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    pub(crate) fn log(&self) -> PathBuf {
        log(&self.run, "agent")
    }

    /// Ends it with SIGTERM and requires that it exits with status 0.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.counted_every_change().await?;
        ensure!(end(&mut self.child, Signal::TERM).await?.success());
        Ok(())
    }

    /// Requires that its BPF programs have counted every change.
    async fn counted_every_change(&self) -> Result<()> {
        let lost = self
            .metric("ebb_kernel_losses_total{kind=\"count\"}")
            .await?;
        ensure!(lost == 0, "{lost} changes not counted");
        Ok(())
    }

    /// Kills it with SIGKILL.
    pub(crate) async fn kill(mut self) -> Result<()> {
        end(&mut self.child, Signal::KILL).await.map(drop)
    }

    pub(crate) fn runs(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Runs a verb that must succeed, and returns what it prints.
    pub(crate) async fn query(&self, verb: &[&str]) -> Result<String> {
        let out = self.verb(verb).await?;
        if !out.status.success() {
            bail!(
                "ebb {verb:?}: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        Ok(String::from_utf8(out.stdout)?)
    }

    /// Runs a verb that talks to this agent.
    pub(crate) async fn verb(&self, verb: &[&str]) -> Result<Output> {
        let mut command = Command::new(EBB);
        command.args(verb).arg("--agent").arg(self.socket());
        Ok(command.output().await?)
    }

    /// Runs a verb that must succeed, and reads the document that it prints.
    pub(crate) async fn json<T: DeserializeOwned>(&self, verb: &[&str]) -> Result<T> {
        let text = self.query(&[verb, &["-o", "json"]].concat()).await?;
        schema::parse(&text).with_context(|| format!("ebb {verb:?}"))
    }

    /// All flows of a pod, outbound ones too.
    pub(crate) async fn flows(&self, pod: &str) -> Result<Vec<FlowView>> {
        let list: FlowList = self.json(&["flows", pod, "--all"]).await?;
        ensure!(list.untracked.is_empty(), "untracked: {:?}", list.untracked);
        Ok(list.flows)
    }

    /// All pods of that name.
    pub(crate) async fn pods(&self, name: &str) -> Result<Vec<PodView>> {
        let list: PodList = self.json(&["pods"]).await?;
        let pods = list.pods.into_iter();
        Ok(pods.filter(|p| p.pod.name == name).collect())
    }

    /// The one pod of that name.
    pub(crate) async fn pod(&self, name: &str) -> Result<PodView> {
        let mut pods = self.pods(name).await?;
        ensure!(pods.len() == 1, "{} pods are called {name}", pods.len());
        Ok(pods.remove(0))
    }

    /// The drains of a pod, newest first.
    pub(crate) async fn drains(&self, pod: &str) -> Result<Vec<Report>> {
        let list: DrainList = self.json(&["drains"]).await?;
        let drains = list.drains.into_iter();
        Ok(drains.filter(|r| r.pod.name == pod).collect())
    }

    /// The one drain of a pod.
    pub(crate) async fn drain(&self, pod: &str) -> Result<Report> {
        let mut drains = self.drains(pod).await?;
        ensure!(drains.len() == 1, "{pod} has {} drains", drains.len());
        Ok(drains.remove(0))
    }

    /// Waits until one call holds the drain of the report `begun` again. Requires that the drain's start is the same as
    /// before, and that its deadline is no later. The call's own deadline may be a little earlier than the first one,
    /// because an agent counts what is left of the grace period from the time at which it begins the hold.
    pub(crate) async fn until_resumed(&self, pod: &str, begun: &Report) -> Result<()> {
        let report = self.until_held_by(pod, 1).await?;
        let moved_ms = begun.deadline_ms.checked_sub(report.deadline_ms);
        ensure!(
            report.started_at == begun.started_at && moved_ms.is_some_and(|ms| ms < 500),
            "{begun:?}\n{report:?}"
        );
        Ok(())
    }

    pub(crate) async fn explain(&self, pod: &str) -> Result<Explanation> {
        self.json(&["explain", pod]).await
    }

    /// Waits until the pod has a running drain whose first dump is done.
    pub(crate) async fn until_draining(&self, pod: &str) -> Result<Report> {
        eventually("the drain begins", async || {
            let drains = self.drains(pod).await?;
            let begun = drains.into_iter().find(|r| r.reason.is_none());
            Ok(begun.filter(|r| r.flows_at_start.is_some()))
        })
        .await
    }

    /// Waits until this many calls hold the pod's only drain.
    pub(crate) async fn until_held_by(&self, pod: &str, calls: u32) -> Result<Report> {
        eventually(&format!("{calls} calls hold {pod}"), async || {
            let report = self.drain(pod).await?;
            Ok((report.holds == calls).then_some(report))
        })
        .await
    }

    /// Sends a GET to its node port from the node itself.
    pub(crate) async fn get(&self, path: &str) -> Result<http::HttpReply> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        Ok(http::get(address, path).await?)
    }

    /// The value of a metric, by its name and labels as `/metrics` prints them.
    pub(crate) async fn metric(&self, name: &str) -> Result<i64> {
        let text = self.get("/metrics").await?.body;
        let text = std::str::from_utf8(&text)?;
        let value = text.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix(' ')?;
            rest.trim().parse().ok()
        });
        value.with_context(|| format!("no metric {name} in:\n{text}"))
    }

    /// The value of a counter; 0 as long as `/metrics` does not print it.
    pub(crate) async fn counted(&self, family: &str, labels: &str) -> Result<i64> {
        let text = self.get("/metrics").await?.body;
        let text = std::str::from_utf8(&text)?;
        let name = format!("{family}{{{labels}}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name));
        Ok(value.map_or(Ok(0), |value| value.trim().parse())?)
    }
}

impl Proxy {
    async fn start(cri: &Path, agent: &Agent) -> Result<Self> {
        Self::at(cri, &agent.run, &agent.socket()).await
    }

    /// Starts one in this run directory that asks the agent at `agent`.
    pub(crate) async fn at(cri: &Path, run: &Path, agent: &Path) -> Result<Self> {
        let socket = run.join("cri.sock");
        let command = proxy(cri, &socket, agent);
        let proxy = Self {
            child: spawn(command, &log(run, "proxy"))?,
            socket,
        };
        eventually("the proxy listens", async || {
            // The path alone proves nothing: a killed proxy leaves its socket behind.
            Ok(UnixStream::connect(&proxy.socket).ok())
        })
        .await?;
        Ok(proxy)
    }

    /// Kills it with SIGKILL. Its socket stays behind.
    pub(crate) async fn kill(mut self) -> Result<()> {
        end(&mut self.child, Signal::KILL).await.map(drop)
    }

    /// How many files and sockets it has open.
    pub(crate) fn open_files(&self) -> Result<usize> {
        let pid = self.child.id().context("the proxy has ended")?;
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    }

    /// Ends it with SIGTERM and requires that it exits with status 0.
    pub(crate) async fn stop(mut self) -> Result<()> {
        ensure!(end(&mut self.child, Signal::TERM).await?.success());
        Ok(())
    }
}

/// The command of an agent that uses no API server.
pub(crate) fn agent(cri: &Path, run: &Path) -> Command {
    agent_with(&["--kube", "off"], cri, run)
}

/// The command of an agent with these flags for its API server.
pub(crate) fn agent_with(kube: &[&str], cri: &Path, run: &Path) -> Command {
    let mut command = Command::new(EBB);
    command.arg("agent").args(kube);
    command.arg("--cri-socket").arg(cri);
    command.arg("--run-dir").arg(run);
    command
}

/// The command of a proxy.
pub(crate) fn proxy(cri: &Path, listen: &Path, agent: &Path) -> Command {
    let mut command = Command::new(beside(EBB, "ebb-cri-proxy"));
    command.arg("--listen").arg(listen);
    command.arg("--runtime").arg(cri).arg("--agent").arg(agent);
    command
}

/// A log file beside the run directory, in which only the agent writes.
fn log(run: &Path, what: &str) -> PathBuf {
    run.with_extension(format!("{what}.log"))
}

fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    let command = command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.stderr(log).kill_on_drop(true).spawn();
    child.with_context(|| format!("starting {}", command.as_std().get_program().display()))
}

async fn end(child: &mut Child, signal: Signal) -> Result<ExitStatus> {
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    kill_process(pid.context("it has ended by itself")?, signal)?;
    let status = timeout(SOON, child.wait()).await;
    Ok(status.context("it does not end")??)
}

/// Awaits a future and measures how long it takes.
pub(crate) async fn timed<T>(f: impl Future<Output = T>) -> (T, Duration) {
    let started = std::time::Instant::now();
    let out = f.await;
    (out, started.elapsed())
}
