//! What each trial uses: the node, a directory, pods and timeouts.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use ebb_testkit::{
    Node, http,
    kubelet::{ContainerSpec, Kubelet, PodSpec, StartedPod},
    proc_net,
};
use libtest_mimic::Trial;
use tokio::{
    runtime::Runtime,
    sync::{OnceCell, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Instant, sleep, timeout},
};

use crate::ALONE;

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// How long to wait for what happens soon. Generous, because many trials share few cores.
pub(crate) const SOON: Duration = Duration::from_secs(15);

/// The longest that a trial may take.
const LONGEST: Duration = Duration::from_secs(120);

/// The node's own address on the pod network.
pub(crate) const NODE_V4: &str = "10.88.0.1";
pub(crate) const NODE_V6: &str = "fd00:ebb::1";

/// The kubelet's cgroup, by which agents find it.
pub(crate) const KUBELET: &str = "kubelet.service";

/// The path of the fixture inside its containers.
pub(crate) const FIXTURE: &str = "/usr/bin/ebb-fixture";

/// The context of a trial that shares the node with others.
pub(crate) struct Scene {
    pub(crate) node: RwLockReadGuard<'static, Node>,
    directory: PathBuf,
}

/// The context of a trial that has the node to itself, and may stop containerd.
pub(crate) struct ExclusiveScene {
    pub(crate) node: RwLockWriteGuard<'static, Node>,
    pub(crate) directory: PathBuf,
}

/// Makes a trial of an async function.
pub(crate) fn trial<F>(name: &'static str, f: impl FnOnce(Scene) -> F + Send + 'static) -> Trial
where
    F: Future<Output = Result<()>>,
{
    Trial::test(name, move || {
        run_trial(name, async move |directory| {
            let node = node().await?.read().await;
            with_time_limit(f(Scene { node, directory })).await
        })
    })
}

/// Makes a trial of an async function that needs the node to itself.
pub(crate) fn trial_alone<F>(
    name: &'static str,
    f: impl FnOnce(ExclusiveScene) -> F + Send + 'static,
) -> Trial
where
    F: Future<Output = Result<()>>,
{
    Trial::test(name, move || {
        run_trial(name, async move |directory| {
            let node = node().await?.write().await;
            with_time_limit(f(ExclusiveScene { node, directory })).await
        })
    })
    .with_kind(ALONE)
}

fn run_trial(
    name: &str,
    f: impl AsyncFnOnce(PathBuf) -> Result<()>,
) -> Result<(), libtest_mimic::Failed> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| Runtime::new().expect("a tokio runtime"));
    let place = ebb_testkit::sandbox::paths()?;
    // Short: the path of a socket has 108 bytes at most.
    static TRIALS: AtomicU16 = AtomicU16::new(0);
    let number = TRIALS.fetch_add(1, Ordering::Relaxed).to_string();
    let directory = place.directory().join("trials").join(number);
    std::fs::create_dir_all(&directory)?;
    let started = Instant::now();
    let result = runtime.block_on(f(directory.clone()));
    if std::env::var_os("EBB_TEST_TIMES").is_some() {
        eprintln!("{:6.1} s  {name}", started.elapsed().as_secs_f64());
    }
    result.map_err(|e| format!("{e:#}\n{}", logs(&directory)).into())
}

/// Starts the node for the first trial that needs it.
async fn node() -> Result<&'static RwLock<Node>> {
    static NODE: OnceCell<RwLock<Node>> = OnceCell::const_new();
    NODE.get_or_try_init(async || {
        let node = Node::start().await?;
        // Every node has a kubelet's cgroup, and an agent that finds none logs it.
        std::fs::create_dir_all(node.paths().cgroup(KUBELET))?;
        Ok(RwLock::new(node))
    })
    .await
}

async fn with_time_limit(trial: impl Future<Output = Result<()>>) -> Result<()> {
    timeout(LONGEST, trial)
        .await
        .with_context(|| format!("the trial took longer than {LONGEST:?}"))?
}

/// What the agents and proxies of a trial have logged.
fn logs(directory: &Path) -> String {
    let mut files: Vec<_> = directory
        .read_dir()
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .collect();
    files.sort();
    let text = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        format!("-- {}\n{text}", path.display())
    };
    files.iter().map(text).collect()
}

/// A port of the node that no other trial uses, below the kernel's ephemeral ports.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Waits until `f` returns `Some`. An error of `f` is returned at once.
pub(crate) async fn eventually<T>(
    what: &str,
    mut f: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = f().await? {
            return Ok(found);
        }
        if started.elapsed() > SOON {
            bail!("not within {SOON:?}: {what}");
        }
        sleep(Duration::from_millis(50)).await;
    }
}

impl Scene {
    /// A new directory of the trial.
    pub(crate) fn directory(&self, name: &str) -> Result<PathBuf> {
        directory(&self.directory, name)
    }

    /// A kubelet that talks straight to the runtime.
    pub(crate) fn kubelet(&self) -> Result<Kubelet> {
        self.node.kubelet()
    }

    /// Runs a pod and waits until its servers listen. Names are shared by all trials.
    pub(crate) async fn run(&self, spec: PodSpec) -> Result<StartedPod> {
        run(&self.node, spec).await
    }

    /// Runs a pod with one server, on port 8080.
    pub(crate) async fn serve(&self, name: &str) -> Result<StartedPod> {
        self.run(PodSpec::new(name).container(server("app", 8080)))
            .await
    }

    /// containerd's log, which shows the calls that have reached it.
    pub(crate) fn containerd_log(&self) -> Result<String> {
        let path = self.node.paths().directory().join("containerd/log");
        Ok(std::fs::read_to_string(path)?)
    }

    /// The timeouts, in seconds, of the StopContainer calls that containerd has received for a container.
    pub(crate) fn stop_timeouts(&self, container: &str) -> Result<Vec<u64>> {
        let log = self.containerd_log()?;
        let calls = log
            .lines()
            .filter(|line| line.contains("StopContainer for") && line.contains(container))
            .filter_map(|line| line.split_once("with timeout "))
            .filter_map(|(_, rest)| rest.split(' ').next()?.parse().ok());
        Ok(calls.collect())
    }
}

pub(crate) fn directory(parent: &Path, name: &str) -> Result<PathBuf> {
    let path = parent.join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("can't make {}", path.display()))?;
    Ok(path)
}

/// Runs a pod and waits until its servers listen and the connections of that check are gone.
pub(crate) async fn run(node: &Node, spec: PodSpec) -> Result<StartedPod> {
    let kubelet = node.kubelet()?;
    let pod = kubelet.run(&spec).await?;
    for container in &spec.containers {
        let port = container.args.iter().skip_while(|a| *a != "--port").nth(1);
        let Some(port) = port else { continue };
        let port = port.parse()?;
        http::until_open(pod.v4(port)?, SOON).await?;
        let pid = kubelet.pid(pod.container(&container.name)?).await?;
        eventually("the check's connection is gone", async || {
            Ok(proc_net::is_quiet(pid, port)?.then_some(()))
        })
        .await?;
    }
    Ok(pod)
}

/// A container with the fixture's server.
pub(crate) fn server(name: &str, port: u16) -> ContainerSpec {
    ContainerSpec::fixture(name, &["serve", "--port", &port.to_string()])
}

/// A container whose server accepts a connection only when the one before is closed.
pub(crate) fn queue(name: &str, port: u16) -> ContainerSpec {
    ContainerSpec::fixture(
        name,
        &["serve", "--port", &port.to_string(), "--one-by-one"],
    )
}
