//! Pictures of what `ebb` shows on a terminal, for the documents.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb_testkit::{
    Node,
    clients::{ClientLoad, Clients},
    http,
    kubelet::{ContainerSpec, Kubelet, PodSpec, StartedPod},
    terminal::Terminal,
};
use tokio::{
    process::Command,
    time::{sleep, timeout},
};

use crate::{ebb::Ebb, say, scene, svg::svg};

/// The pod that is stopped.
const STOPPED: &str = "web-7f9c5d8b6d-x2x4q";

/// Pods that run meanwhile, each with so many clients that wait for a slow answer, and idle ones.
const OTHERS: [(&str, usize, usize); 4] = [
    ("api-5c8f7d9b4-k8s2p", 5, 14),
    ("checkout-6d4b8c7f5-q9wzn", 2, 3),
    ("reports-0", 1, 0),
    ("mailer-7b9d6c5f4-m4v7c", 0, 0),
];

/// The one of them that is stopped with a grace period that is too short for its clients.
const CUT: &str = "checkout-6d4b8c7f5-q9wzn";
const SHORT_GRACE: Duration = Duration::from_secs(9);

/// Documents with larger pictures load slowly.
const LARGEST: usize = 30_000;

const SOON: Duration = Duration::from_secs(15);

/// Runs a node and writes the pictures to `directory`.
pub(crate) async fn take(node: &Node, program: &Path, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    let mut ebb = Ebb::start(program, node).await?;
    let kubelet = node.kubelet_at(ebb.cri_socket())?;
    let mut clients = Clients::new();
    let mut cut = None;
    for (name, slow, idle) in OTHERS {
        let pod = other_pod(&kubelet, name).await?;
        busy(&mut clients, &pod, slow, idle)?;
        cut = (name == CUT).then_some(pod).or(cut);
    }
    clients.in_place().await;
    let top = Shot::start(&ebb, &["top", "-i", "500ms"], (112, 13))?;
    top.until(" 17 idle flows").await?;

    let pod = scene::pod(node, &kubelet, STOPPED).await?;
    let mut web = scene::clients(&pod).await?;
    scene::stale(&mut web, pod.v4(8080)?);
    let pictures = async {
        top.until("settling").await?;
        top.terminal.send("g")?;
        top.save(directory, "top").await?;
        // The connections of the pod, those with most bytes first.
        top.terminal.send("\rsssss")?;
        top.until("one-by-one").await?;
        top.save(directory, "flows").await?;
        top.terminal.send("q")?;
        let explain = Shot::start(&ebb, &["explain", STOPPED], (120, 50))?;
        explain.ended().await?.save(directory, "explain").await
    };
    let (stop, taken) = tokio::join!(kubelet.stop(&pod, scene::GRACE), pictures);
    taken?;
    if let Some(e) = stop.error() {
        bail!("stopping the pod failed: {e:#}");
    }
    web.finish().await;
    let cut = cut.context("no pod to cut off")?;
    if let Some(e) = kubelet.stop(&cut, SHORT_GRACE).await.error() {
        bail!("stopping {CUT} failed: {e:#}");
    }
    let drains = Shot::start(&ebb, &["drains"], (140, 40))?;
    drains.ended().await?.save(directory, "drains").await?;
    ebb.stop().await
}

/// A pod with a server and a sidecar. Without an API server, the stops of two containers show that a pod ends.
async fn other_pod(kubelet: &Kubelet, name: &str) -> Result<StartedPod> {
    let server = |name, port| ContainerSpec::fixture(name, &["serve", "--port", port]);
    let spec = PodSpec::new(name)
        .container(server("app", "8080"))
        .container(server("sidecar", "8081"));
    let pod = kubelet.run(&spec).await?;
    http::until_open(pod.v4(8080)?, SOON).await?;
    Ok(pod)
}

/// Starts clients that stay until the pictures are taken.
fn busy(clients: &mut Clients, pod: &StartedPod, slow: usize, idle: usize) -> Result<()> {
    let server = pod.v4(8080)?;
    clients.start(
        server,
        ClientLoad::Slow {
            path: "/slow?ms=60000".into(),
            clients: slow,
        },
    );
    clients.start(
        server,
        ClientLoad::Idle {
            path: "/".into(),
            quiet: Duration::from_secs(60),
            clients: idle,
        },
    );
    Ok(())
}

/// A command of ebb that runs in a terminal.
struct Shot {
    terminal: Terminal,
    command: String,
    child: tokio::process::Child,
}

impl Shot {
    fn start(ebb: &Ebb, verb: &[&str], (columns, rows): (u16, u16)) -> Result<Self> {
        let terminal = Terminal::open(columns, rows)?;
        let mut command = Command::from(terminal.command(ebb.program())?);
        command.args(verb).env("EBB_AGENT", ebb.agent_socket());
        Ok(Self {
            child: command.kill_on_drop(true).spawn()?,
            command: format!("ebb {}", verb.join(" ")),
            terminal,
        })
    }

    /// Waits until the screen shows this text.
    async fn until(&self, text: &str) -> Result<()> {
        let started = Instant::now();
        while !self.terminal.text().contains(text) {
            ensure!(
                started.elapsed() < SOON,
                "{} did not show {text}:\n{}",
                self.command,
                self.terminal.text()
            );
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Waits until the command has ended.
    async fn ended(mut self) -> Result<Self> {
        let status = timeout(SOON, self.child.wait()).await;
        let status = status.with_context(|| format!("{} did not end", self.command))??;
        ensure!(status.success(), "{}: {status}", self.command);
        Ok(self)
    }

    async fn save(&self, directory: &Path, name: &str) -> Result<()> {
        // What was written last may still be on its way.
        sleep(Duration::from_millis(200)).await;
        let picture = svg(&self.command, &self.terminal.screen());
        ensure!(
            picture.len() < LARGEST,
            "{name}.svg has {} bytes",
            picture.len()
        );
        let path = directory.join(name).with_extension("svg");
        fs::write(&path, picture)?;
        say(&format!("{} is in {}", self.command, path.display()));
        Ok(())
    }
}
