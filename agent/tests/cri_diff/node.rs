//! A node with one of Debian's containerds, `ebb` on it, and the comparison.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb_testkit::{Node, helpers::beside, parts::Parts};
use k8s_cri::v1::VersionRequest;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::sleep,
};

use crate::{
    canon::canonical,
    client::{self, Recording},
    foreign,
    script::{self, Step},
};

const EBB: &str = env!("CARGO_BIN_EXE_ebb");

const SOON: Duration = Duration::from_secs(15);

/// Starts a node with a release's containerd, which must be of this version.
pub(crate) async fn start(release: &str, version: &str) -> Result<Node> {
    let parts = match release {
        "bookworm" => Parts::find()?,
        later => Parts::with_containerd_of(later)?,
    };
    let node = Node::start_with(parts).await?;
    let request = VersionRequest::default();
    let reply = node.kubelet()?.runtime().version(request).await?;
    let found = reply.into_inner().runtime_version;
    ensure!(
        found.trim_start_matches('v').starts_with(version),
        "containerd {found} is not {version}"
    );
    Ok(node)
}

/// The client that runs the script.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stack {
    /// A client that records HTTP/2 as it is.
    Http2,
    /// gRPC's C core.
    GrpcCore,
}

impl Stack {
    async fn run(self, script: &[Step], socket: &Path) -> Result<Recording> {
        match self {
            Self::Http2 => client::run(script, socket).await,
            Self::GrpcCore => foreign::run(script, socket).await,
        }
    }
}

/// Runs the script directly and through a proxy, and fails with the first line that differs.
pub(crate) async fn compare(node: &Node, stack: Stack) -> Result<()> {
    let script = &script::script()?;
    let socket = directory(node)?.join("cri.sock");
    let _proxy = proxy(node, &socket, Path::new("/nowhere/agent.sock")).await?;
    // A run beforehand, so that both compared runs start alike: containerd 1.7 loses the first event after a subscriber
    // has gone, because its one channel of events still has that subscriber as a reader.
    stack.run(script, node.socket()).await?;
    let direct = stack.run(script, node.socket()).await.context("directly")?;
    let proxied = stack
        .run(script, &socket)
        .await
        .context("through the proxy")?;
    ensure!(direct.outcomes.len() == script.len() && proxied.outcomes.len() == script.len());
    let direct = canonical(script, &direct)?;
    let proxied = canonical(script, &proxied)?;
    if let Some(file) = std::env::var_os("EBB_CRI_DIFF_LOG") {
        std::fs::write(file, direct.join("\n"))?;
    }
    // Enough calls must succeed, or errors alone are compared.
    let good = |lines: &[String]| {
        let good = |l: &&String| l.contains("grpc-status=0") || l.contains(": status OK ");
        lines.iter().filter(good).count()
    };
    ensure!(good(&direct) > script.len() / 3, "{direct:#?}");
    for (left, right) in direct.iter().zip(&proxied) {
        ensure!(left == right, "{}", difference(left, right));
    }
    ensure!(direct.len() == proxied.len(), "{direct:#?}\n{proxied:#?}");
    Ok(())
}

/// The part of two lines from where they differ.
fn difference(left: &str, right: &str) -> String {
    let same = left.chars().zip(right.chars()).take_while(|(l, r)| l == r);
    let from = same.count().saturating_sub(80);
    let part = |line: &str| line.chars().skip(from).take(240).collect::<String>();
    let name: String = left.chars().take(60).collect();
    format!(
        "{name}\ndirectly\n  … {}\nand through the proxy\n  … {}",
        part(left),
        part(right)
    )
}

/// A directory for sockets and logs.
pub(crate) fn directory(node: &Node) -> Result<PathBuf> {
    let directory = node.paths().directory().join("ebb");
    std::fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// Starts `ebb-cri-proxy`.
pub(crate) async fn proxy(node: &Node, socket: &Path, agent: &Path) -> Result<Child> {
    let mut command = without_input(&beside(EBB, "ebb-cri-proxy"));
    command.arg("--listen").arg(socket);
    command.arg("--runtime").arg(node.socket());
    let mut child = command.arg("--agent").arg(agent).spawn()?;
    until_served(&mut child, socket).await?;
    Ok(child)
}

/// Starts `ebb agent`.
pub(crate) async fn agent(node: &Node, run: &Path) -> Result<Child> {
    let mut command = without_input(Path::new(EBB));
    command.args(["agent", "--kube", "off", "--quiet", "300ms"]);
    command.args(["--http", "127.0.0.1:19690", "--cri-socket"]);
    command.arg(node.socket()).arg("--run-dir").arg(run);
    let mut child = command.spawn()?;
    until_served(&mut child, &run.join("agent.sock")).await?;
    Ok(child)
}

fn without_input(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.kill_on_drop(true);
    // Its log on standard error is part of a failed trial's output.
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

async fn until_served(child: &mut Child, socket: &Path) -> Result<()> {
    let started = Instant::now();
    while UnixStream::connect(socket).await.is_err() {
        if let Some(status) = child.try_wait()? {
            bail!("ebb ended at its start ({status})");
        }
        ensure!(
            started.elapsed() < SOON,
            "{} is not served",
            socket.display()
        );
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
