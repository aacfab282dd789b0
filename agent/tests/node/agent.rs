//! `ebb agent`, `ebb cri-proxy` and the other verbs, as processes.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb::{
    drain::report::Report,
    report::view::{AuditView, DrainList, Explanation, FlowList, FlowView, PodList, PodView},
};
use ebb_node::{api_server::ApiServer, http, kubelet::Kubelet};
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::scene::{Alone, SOON, Scene, directory, eventually, free_port};

/// The real binary.
pub(crate) const EBB: &str = env!("CARGO_BIN_EXE_ebb");

/// The node's name in the cluster.
pub(crate) const NODE_NAME: &str = "node-1";

/// A running agent. Dropping it kills it.
pub(crate) struct Agent {
    child: Child,
    /// Its run directory.
    pub(crate) run: PathBuf,
    /// Its node port.
    pub(crate) port: u16,
}

/// A running CRI proxy. Dropping it kills it.
pub(crate) struct Proxy {
    child: Child,
    /// Where it listens.
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

    /// Starts an agent that uses this API server, which need not be there.
    pub(crate) async fn agent_of(&self, api: &ApiServer, flags: &[&str]) -> Result<Agent> {
        Agent::start_of(api, self.node.socket(), &self.directory("ebb")?, flags).await
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

impl Alone {
    /// Starts an agent in this run directory.
    pub(crate) async fn agent_in(&self, run: &str, flags: &[&str]) -> Result<Agent> {
        Agent::start(self.node.socket(), &directory(&self.directory, run)?, flags).await
    }

    /// Starts an agent that uses this API server.
    pub(crate) async fn agent_of(&self, api: &ApiServer, flags: &[&str]) -> Result<Agent> {
        let run = directory(&self.directory, "ebb")?;
        Agent::start_of(api, self.node.socket(), &run, flags).await
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

    async fn start_of(api: &ApiServer, cri: &Path, run: &Path, flags: &[&str]) -> Result<Self> {
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

    /// Its pid.
    pub(crate) fn pid(&self) -> Result<u32> {
        self.child.id().context("the agent has ended")
    }

    /// Its unix socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    /// Its log file.
    pub(crate) fn log(&self) -> PathBuf {
        log(&self.run, "agent")
    }

    /// Ends it with SIGTERM and waits for its end, which must be a good one.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.has_no_drift().await?;
        ensure!(end(&mut self.child, Signal::TERM).await?.success());
        Ok(())
    }

    /// Demands that its counters agree with the kernel's tables, and always have.
    pub(crate) async fn has_no_drift(&self) -> Result<()> {
        let found: AuditView = self.json(&["audit"]).await?;
        ensure!(found.audit.drift == 0, "{found:?}");
        let drift = self.metric("ebb_accounting_drift_total").await?;
        ensure!(drift == 0, "{drift} flows of drift since its start");
        Ok(())
    }

    /// Ends it with SIGKILL.
    pub(crate) async fn kill(mut self) -> Result<()> {
        end(&mut self.child, Signal::KILL).await.map(drop)
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// What a verb prints.
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

    async fn json<T: DeserializeOwned>(&self, verb: &[&str]) -> Result<T> {
        let text = self.query(&[verb, &["-o", "json"]].concat()).await?;
        serde_json::from_str(&text).with_context(|| format!("ebb {verb:?} says {text}"))
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
        // Audited by itself at its end, and once more here.
        if drains[0].reason.is_some() {
            self.has_no_drift().await?;
        }
        Ok(drains.remove(0))
    }

    /// Waits until the drain that `begun` tells of is held by one call again. It has to be the same one: begun then,
    /// and with the deadline it had.
    pub(crate) async fn until_resumed(&self, pod: &str, begun: &Report) -> Result<()> {
        eventually("a call joins the drain", async || {
            Ok((self.drain(pod).await?.holds == 1).then_some(()))
        })
        .await?;
        let report = self.drain(pod).await?;
        ensure!(
            report.started_at == begun.started_at && report.deadline_ms == begun.deadline_ms,
            "{begun:?}\n{report:?}"
        );
        Ok(())
    }

    /// What it knows of a pod and its stops.
    pub(crate) async fn explain(&self, pod: &str) -> Result<Explanation> {
        self.json(&["explain", pod]).await
    }

    /// Waits until a drain of the pod is under way and has had its first look.
    pub(crate) async fn until_draining(&self, pod: &str) -> Result<Report> {
        eventually("the drain begins", async || {
            let drains = self.drains(pod).await?;
            let begun = drains.into_iter().find(|r| r.reason.is_none());
            Ok(begun.filter(|r| r.flows_at_start.is_some()))
        })
        .await
    }

    /// A GET of its node port from the node itself.
    pub(crate) async fn get(&self, path: &str) -> Result<http::Reply> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        Ok(http::get(address, path).await?)
    }

    /// The value of a metric, by its name and labels as in the exposition.
    pub(crate) async fn metric(&self, name: &str) -> Result<i64> {
        let text = self.get("/metrics").await?.body;
        let text = std::str::from_utf8(&text)?;
        let value = text.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix(' ')?;
            rest.trim().parse().ok()
        });
        value.with_context(|| format!("no metric {name} in:\n{text}"))
    }

    /// Likewise, of a counter that is there only from the first time on that it counts something.
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
            // The socket itself may be one that a killed proxy has left.
            Ok(UnixStream::connect(&proxy.socket).ok())
        })
        .await?;
        Ok(proxy)
    }

    /// Ends it with SIGKILL. Its socket stays behind.
    pub(crate) async fn kill(mut self) -> Result<()> {
        end(&mut self.child, Signal::KILL).await.map(drop)
    }

    /// How many files and sockets it has open.
    pub(crate) fn open_files(&self) -> Result<usize> {
        let pid = self.child.id().context("the proxy has ended")?;
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    }

    /// Ends it with SIGTERM and waits for its end, which must be a good one.
    pub(crate) async fn stop(mut self) -> Result<()> {
        ensure!(end(&mut self.child, Signal::TERM).await?.success());
        Ok(())
    }
}

/// The command of an agent that uses no API server.
pub(crate) fn agent(cri: &Path, run: &Path) -> Command {
    agent_with(&["--kube", "off"], cri, run)
}

/// The command of an agent that finds its API server as these flags say.
pub(crate) fn agent_with(kube: &[&str], cri: &Path, run: &Path) -> Command {
    let mut command = Command::new(EBB);
    command.arg("agent").args(kube);
    command.arg("--cri-socket").arg(cri);
    command.arg("--run-dir").arg(run);
    command
}

/// The command of a proxy.
pub(crate) fn proxy(cri: &Path, listen: &Path, agent: &Path) -> Command {
    let mut command = Command::new(EBB);
    command.arg("cri-proxy").arg("--listen").arg(listen);
    command.arg("--runtime").arg(cri).arg("--agent").arg(agent);
    command
}

/// Beside the run directory, which is the agent's alone.
fn log(run: &Path, what: &str) -> PathBuf {
    run.with_extension(format!("{what}.log"))
}

fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    let command = command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.stderr(log).kill_on_drop(true).spawn();
    child.with_context(|| format!("starting {EBB}"))
}

async fn end(child: &mut Child, signal: Signal) -> Result<ExitStatus> {
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    kill_process(pid.context("it has ended by itself")?, signal)?;
    let status = timeout(SOON, child.wait()).await;
    Ok(status.context("it does not end")??)
}

/// How long a future takes, beside what it gives.
pub(crate) async fn timed<T>(f: impl Future<Output = T>) -> (T, Duration) {
    let started = std::time::Instant::now();
    let out = f.await;
    (out, started.elapsed())
}
