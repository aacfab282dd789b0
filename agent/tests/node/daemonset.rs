//! deploy/daemonset.yaml as a kubelet would run it: its image, arguments, capabilities and mounts.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb_core::{
    drain_report::ReleaseReason,
    notification::{SignalOutcome, SignalReport},
};
use ebb_protocol::views::{Diagnosis, DrainList, FlowList, NodeDocuments, PodList};
use ebb_testkit::{
    api_server::{ApiServer, ApiVerb},
    http,
    kubelet::{ContainerSpec, Mount, PodSpec, Security, StartedPod},
    terminal::Terminal,
};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, EnvVar, Volume},
};
use libtest_mimic::Trial;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

use crate::{
    agent::{NODE_NAME, Proxy},
    hold::stop,
    peer::Peer,
    scene::{
        ExclusiveScene, NODE_V4, SECOND, SOON, directory, eventually, free_port, run, server,
        trial_alone,
    },
};

/// A privileged port, which a pod may declare too.
const WAIT_PORT: u16 = 690;

const NOBODY: i64 = 65_534;

pub(crate) fn trials() -> Vec<Trial> {
    // They need the node to themselves, because every other agent would listen on the wait port of their pod.
    vec![
        trial_alone(
            "the_daemonset_holds_pods_with_only_the_capabilities_and_mounts_it_names",
            daemonset,
        ),
        trial_alone("the_privileged_daemonset_holds_pods", privileged),
    ]
}

/// An API server with TLS and authentication, and the service account that its pods use.
struct SecuredCluster {
    api: ApiServer,
    account: PathBuf,
}

impl SecuredCluster {
    async fn start(scene: &ExclusiveScene) -> Result<Self> {
        let account = directory(&scene.directory, "serviceaccount")?;
        let address = ([127, 0, 0, 1], free_port()).into();
        let api = ApiServer::start_secured(address).await?;
        api.service_account(&account)?;
        Ok(Self { api, account })
    }

    /// Mounts the service account and sets the server's address, as the kubelet does for every pod.
    fn with_service_account(&self, mut agent: PodSpec) -> PodSpec {
        let container = agent.containers.remove(0);
        let at = self.api.address();
        let mut container = container
            .env("KUBERNETES_SERVICE_HOST", &at.ip().to_string())
            .env("KUBERNETES_SERVICE_PORT", &at.port().to_string());
        container.mounts.push(Mount {
            from: self.account.clone(),
            to: "/var/run/secrets/kubernetes.io/serviceaccount".into(),
            read_only: true,
            follows: false,
        });
        agent.container(container)
    }
}

async fn privileged(scene: ExclusiveScene) -> Result<()> {
    let kubelet = scene.node.kubelet()?;
    let spec = PodSpec::new("under-privileged")
        .annotation("ebb.dev/quiet", "300ms")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = run(&scene.node, spec).await?;
    let mut document: Value = serde_saphyr::from_str(&manifest("daemonset.yaml")?)?;
    let component: Value =
        serde_saphyr::from_str(&manifest("components/privileged/kustomization.yaml")?)?;
    let patch = component["patches"][0]["patch"]
        .as_str()
        .context("no patch")?;
    let patch: json_patch::Patch = serde_saphyr::from_str(patch)?;
    json_patch::patch(&mut document, &patch)?;
    let daemonset: DaemonSet = serde_json::from_value(document)?;
    let image = scene.import_ebb(&daemonset).await?;
    let spec = pod_of(&daemonset, &image)?;
    ensure!(spec.containers[0].security.privileged);
    let agent = kubelet.run(&spec).await?;
    until_ready(&agent).await?;
    let proxy = Proxy::at(
        scene.node.socket(),
        &directory(&scene.directory, "proxy")?,
        Path::new("/run/ebb/agent.sock"),
    )
    .await?;
    let mut slow = Peer::asking(pod.v4(8080)?, "/slow?ms=2000").await?;
    let stopping = stop(scene.node.kubelet_at(&proxy.socket)?, &pod, 20 * SECOND);
    slow.answer("slow\n").await?;
    drop(slow);
    let stopped = stopping.await?;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    let drains: DrainList = query(&scene, &agent, &["drains"]).await?;
    let report = drains.drains.first().context("no drain")?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let stopped = kubelet.stop(&agent, 10 * SECOND).await;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    Ok(())
}

async fn until_ready(agent: &StartedPod) -> Result<()> {
    eventually("the agent is ready", async || {
        let ready = http::get(([127, 0, 0, 1], 9690).into(), "/readyz").await;
        Ok(ready.is_ok_and(|r| r.status == 200).then_some(()))
    })
    .await
    .with_context(|| logs(agent))
}

/// With an API server, a deleted pod of one container is held and gets an Event about its drain. The agent connects
/// by TLS and with the token.
async fn writes_an_event(
    scene: &ExclusiveScene,
    cluster: &SecuredCluster,
    agent: &StartedPod,
    proxy: &Proxy,
) -> Result<()> {
    let spec = PodSpec::new("under-daemonset-one").container(server("app", 8080));
    cluster.api.create(&spec, NODE_NAME);
    let pod = run(&scene.node, spec).await?;
    let mut slow = Peer::asking(pod.v4(8080)?, "/slow?ms=2000").await?;
    cluster.api.delete(&pod.spec, 20 * SECOND);
    let stopping = stop(scene.node.kubelet_at(&proxy.socket)?, &pod, 20 * SECOND);
    slow.answer("slow\n").await?;
    drop(slow);
    let stopped = stopping.await?;
    ensure!(stopped.error().is_none(), "{stopped:?}\n{}", logs(agent));
    let written = eventually("the Event is written", async || {
        let mut events = cluster.api.events().into_iter();
        let uid = pod.spec.uid.as_str();
        Ok(events.find(|e| e["reason"] == "Drained" && e["regarding"]["uid"] == uid))
    });
    written.await.with_context(|| logs(agent))?;
    ensure!(cluster.api.count(ApiVerb::Watch) > 0, "no watch was opened");
    Ok(())
}

async fn daemonset(scene: ExclusiveScene) -> Result<()> {
    let kubelet = scene.node.kubelet()?;
    // The first pod creates the bridge, and so the node's address. Its servers run as the user nobody, as most do.
    let spec = PodSpec::new("under-daemonset")
        .annotation("ebb.dev/quiet", "300ms")
        .annotation("ebb.dev/idle-after", "300ms")
        .annotation("ebb.dev/idle-flows", "close")
        .annotation("ebb.dev/wait-port", &WAIT_PORT.to_string())
        .annotation("ebb.dev/stop-signal", "SIGUSR1")
        .container(server("app", 8080).user(NOBODY))
        .container(server("side", 8081).user(NOBODY));
    let pod = run(&scene.node, spec).await?;
    let host_port = free_port();
    let spec = PodSpec::new("under-daemonset-host").host_network();
    let host = spec.container(server("app", host_port).user(NOBODY));
    let host = kubelet.run(&host).await?;
    let on_host = ([127, 0, 0, 1], host_port).into();
    http::until_open(on_host, SOON).await?;

    let daemonset: DaemonSet = serde_saphyr::from_str(&manifest("daemonset.yaml")?)?;
    let image = scene.import_ebb(&daemonset).await?;
    let cluster = SecuredCluster::start(&scene).await?;
    // The API server knows all pods, or ebb takes them for deleted by force.
    cluster.api.create(&pod.spec, NODE_NAME);
    cluster.api.create(&host.spec, NODE_NAME);
    let spec = cluster.with_service_account(pod_of(&daemonset, &image)?);
    // The trial is about an agent without privileges.
    let security = &spec.containers[0].security;
    ensure!(!security.privileged && security.read_only_root);
    let agent = kubelet.run(&spec).await?;
    until_ready(&agent).await?;
    is_confined(&scene, &agent, &spec).await?;

    let proxy = Proxy::at(
        scene.node.socket(),
        &directory(&scene.directory, "proxy")?,
        Path::new("/run/ebb/agent.sock"),
    )
    .await?;
    let _on_host = Peer::asking(on_host, "/slow?ms=60000").await?;
    answers_kubectl_ebb(&scene, &cluster, &agent).await?;
    let flows: FlowList = query(&scene, &agent, &["flows", "under-daemonset-host"]).await?;
    ensure!(flows.flows.len() == 1, "{flows:?}\n{}", logs(&agent));

    http::until_open(pod.v4(WAIT_PORT)?, SOON)
        .await
        .with_context(|| logs(&agent))?;
    let mut slow = Peer::asking(pod.v4(8080)?, "/slow?ms=2000").await?;
    // Its client never closes it: ebb does, with a duplicate of the server's descriptor.
    let idle = Peer::served(pod.v4(8081)?).await?;
    cluster.api.delete(&pod.spec, 20 * SECOND);
    let stopping = stop(scene.node.kubelet_at(&proxy.socket)?, &pod, 20 * SECOND);
    slow.answer("slow\n").await.with_context(|| logs(&agent))?;
    drop(slow);
    let stopped = stopping.await?;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    drop(idle);

    let drains: DrainList = query(&scene, &agent, &["drains"]).await?;
    let report = drains
        .drains
        .iter()
        .find(|r| r.pod.name == "under-daemonset");
    let report = report.context("no drain")?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.idle_closed == 1, "{report:?}\n{}", logs(&agent));
    ensure!(report.cut_total == Some(0), "{report:?}");
    // The servers run as another user and do not handle the signal, but it reached them.
    let sent = report.notified.signals.as_deref().unwrap_or_default();
    ensure!(sent.len() == 2, "{report:?}\n{}", logs(&agent));
    let reached = |s: &SignalReport| s.outcome == SignalOutcome::Ignored;
    ensure!(sent.iter().all(reached), "{report:?}");

    writes_an_event(&scene, &cluster, &agent, &proxy).await?;
    fits_in_memory(&scene, &daemonset, &agent).await?;
    // The agent's own stop is forwarded at once, because no agent would be left to release it.
    let through = scene.node.kubelet_at(&proxy.socket)?;
    let stopped = through.stop(&agent, 10 * SECOND).await;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    ensure!(stopped.took < 4 * SECOND, "{stopped:?}");
    let log = fs::read_to_string(scene.node.paths().directory().join("containerd/log"))?;
    let call = format!(
        "StopContainer for \\\"{}\\\" with timeout 10 ",
        agent.containers[0].id
    );
    ensure!(log.contains(&call), "not forwarded as it came: {call}");
    ensure!(
        !Path::new("/run/ebb/agent.sock").exists(),
        "the socket stays"
    );
    Ok(())
}

/// The kubectl plugin finds the agent through the API server and runs verbs in its container. A node whose agent can't be
/// asked is named, and costs nothing but its own rows.
async fn answers_kubectl_ebb(
    scene: &ExclusiveScene,
    cluster: &SecuredCluster,
    agent: &StartedPod,
) -> Result<()> {
    let kubeconfig = scene.directory.join("kubeconfig");
    cluster.api.kubeconfig_with(&cluster.account, &kubeconfig)?;
    let plugin = scene.directory.join("kubectl-ebb");
    symlink(env!("CARGO_BIN_EXE_ebb"), &plugin)?;
    let kubectl_ebb = async |args: &[&str]| {
        let mut command = Command::new(&plugin);
        command.args(args).arg("--kubeconfig").arg(&kubeconfig);
        Ok::<_, anyhow::Error>(command.output().await?)
    };

    let none = kubectl_ebb(&["pods"]).await?;
    let why = String::from_utf8_lossy(&none.stderr);
    ensure!(
        !none.status.success() && why.contains("no agent of ebb runs in namespace ebb-system"),
        "{why}"
    );
    cluster.api.create(&agent.spec, NODE_NAME);
    cluster.api.allow_exec(agent, scene.node.kubelet()?);

    let pods = kubectl_ebb(&["pods", "-o", "json"]).await?;
    ensure!(pods.status.success(), "{pods:?}");
    let pods: PodList = serde_json::from_slice(&pods.stdout)?;
    ensure!(
        pods.pods.iter().any(|p| p.pod.name == "under-daemonset"),
        "{pods:?}"
    );
    let flows = kubectl_ebb(&["flows", "default/under-daemonset-host", "--no-headers"]).await?;
    let rows = String::from_utf8_lossy(&flows.stdout).lines().count();
    ensure!(flows.status.success() && rows == 1, "{flows:?}");
    // The agent's own answer and exit status: nothing is held.
    let release = kubectl_ebb(&["release", "under-daemonset"]).await?;
    ensure!(release.status.code() == Some(10), "{release:?}");
    let unknown = kubectl_ebb(&["release", "under"]).await?;
    let why = String::from_utf8_lossy(&unknown.stderr);
    ensure!(why.contains("the API server knows no pod under"), "{why}");

    // A terminal goes through to the agent's container, with its size and its keys.
    let terminal = Terminal::open(100, 30)?;
    let modes = format!("{:?}", terminal.modes()?);
    let mut top = Command::from(terminal.controlled(&plugin)?);
    top.arg("top").arg("--kubeconfig").arg(&kubeconfig);
    let mut top = top.kill_on_drop(true).spawn()?;
    eventually("ebb top shows pods", async || {
        let screen = terminal.text();
        let is_whole = screen.contains("under-daemonset") && screen.contains("q quit");
        Ok(is_whole.then_some(()))
    })
    .await
    .with_context(|| terminal.text())?;
    terminal.send("q")?;
    let ended = timeout(SOON, top.wait()).await??;
    ensure!(ended.success(), "{ended:?}: {}", terminal.text());
    ensure!(
        format!("{:?}", terminal.modes()?) == modes,
        "the modes stay"
    );

    // The name is only the beginning of a pod's, so the API server does not know it.
    let prefix = ["flows", "under-daemonset-h", "-o", "name"];
    let prefix = kubectl_ebb(&prefix).await?;
    ensure!(
        prefix.stdout == b"default/under-daemonset-host\n",
        "{prefix:?}"
    );
    // A document by node, also if a check fails.
    let doctor = kubectl_ebb(&["doctor", "-o", "json"]).await?;
    let doctor: NodeDocuments<Diagnosis> =
        serde_json::from_slice(&doctor.stdout).with_context(|| format!("{doctor:?}"))?;
    let [of_node] = &doctor.nodes[..] else {
        bail!("{doctor:?}");
    };
    ensure!(of_node.node == NODE_NAME && !of_node.document.checks.is_empty());
    let version = kubectl_ebb(&["version"]).await?;
    let heading = format!("node {NODE_NAME}:\nebb ");
    ensure!(
        version.stdout.starts_with(heading.as_bytes()),
        "{version:?}"
    );

    let mut elsewhere = agent.spec.clone();
    elsewhere.name = "ebb-elsewhere".into();
    cluster.api.create(&elsewhere, "node-b");
    let drains = kubectl_ebb(&["drains"]).await?;
    let why = String::from_utf8_lossy(&drains.stderr);
    ensure!(
        drains.status.code() == Some(9) && why.contains("node-b: "),
        "{drains:?}"
    );
    ensure!(drains.stdout.starts_with(b"NAMESPACE"), "{drains:?}");
    // Of two nodes, a watch is on that of its pod.
    let mut command = Command::new(&plugin);
    command.args([
        "flows",
        "default/under-daemonset-host",
        "-w",
        "--kubeconfig",
    ]);
    command.arg(&kubeconfig).stdin(Stdio::null());
    ends_with_its_client(command).await?;
    cluster.api.remove(&elsewhere);
    Ok(())
}

/// A watch needs no terminal. When its client is killed, no process is left in the agent's container.
async fn ends_with_its_client(mut kubectl_ebb: Command) -> Result<()> {
    let mut watch = kubectl_ebb
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = watch.stdout.take().context("no output")?;
    let mut lines = BufReader::new(stdout).lines();
    for start in ["NAMESPACE", "default"] {
        let line = timeout(SOON, lines.next_line()).await??;
        ensure!(line.is_some_and(|line| line.starts_with(start)), "{start}");
    }
    ensure!(remote_watches()? == 1, "{}", remote_watches()?);
    watch.kill().await?;
    eventually("the remote watch ends", async || {
        Ok((remote_watches()? == 0).then_some(()))
    })
    .await
}

/// How many `ebb` processes are the other end of a watch by `kubectl ebb`.
fn remote_watches() -> Result<usize> {
    let mut found = 0;
    for entry in fs::read_dir("/proc")? {
        // Other files, and processes that have ended meanwhile.
        let command = fs::read(entry?.path().join("cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0);
        found += usize::from(words.any(|word| word == b"--until-stdin-ends"));
    }
    Ok(found)
}

/// Runs a verb in the agent's container, as `kubectl exec` does.
async fn query<T: DeserializeOwned>(
    scene: &ExclusiveScene,
    agent: &StartedPod,
    verb: &[&str],
) -> Result<T> {
    let command = [&["/usr/local/bin/ebb"], verb, &["-o", "json"]].concat();
    let kubelet = scene.node.kubelet()?;
    let output = kubelet.exec(&agent.containers[0], &command, SOON).await?;
    ensure!(output.status == 0, "{output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Requires that the runtime has applied the manifest: no other capability, seccomp, a read-only root.
async fn is_confined(scene: &ExclusiveScene, agent: &StartedPod, spec: &PodSpec) -> Result<()> {
    let pid = scene.node.kubelet()?.pid(&agent.containers[0]).await?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
    let effective = field("CapEff:\t").context("no CapEff")?;
    let effective = u64::from_str_radix(effective, 16)?.count_ones();
    ensure!(effective == u32::try_from(spec.containers[0].security.add.len())?);
    ensure!(
        field("Seccomp:\t") == Some("2"),
        "no seccomp filter: {status}"
    );
    let root = fs::write(format!("/proc/{pid}/root/tmp-file"), "");
    ensure!(root.is_err_and(|e| e.kind() == ErrorKind::ReadOnlyFilesystem));
    // An unmount on the node unmounts here too.
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let mut follows = mounts.lines().filter(|l| l.contains(" /run/containerd "));
    ensure!(follows.any(|l| l.contains(" master:")), "{mounts}");
    Ok(())
}

impl ExclusiveScene {
    /// Imports the repository's image under the manifest's name.
    async fn import_ebb(&self, manifest: &DaemonSet) -> Result<String> {
        let archive = target().join("dist/debug/ebb-image.tar");
        ensure!(
            archive.exists(),
            "{} is missing: run `cargo xtask dist --debug`",
            archive.display()
        );
        let image = container_of(manifest)?.image.as_ref().context("no image")?;
        // Every runtime completes a short name like this.
        let image = format!("docker.io/library/{image}");
        self.node.import(&archive, &image).await?;
        Ok(image)
    }
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        PathBuf::from,
    )
}

/// A file of `deploy/`.
fn manifest(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(name);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

fn container_of(manifest: &DaemonSet) -> Result<&Container> {
    let spec = manifest
        .spec
        .as_ref()
        .and_then(|s| s.template.spec.as_ref());
    spec.and_then(|s| s.containers.first())
        .context("no container")
}

/// The pod that a kubelet would run for the manifest on this node.
fn pod_of(manifest: &DaemonSet, image: &str) -> Result<PodSpec> {
    let template = &manifest.spec.as_ref().context("no spec")?.template;
    let spec = template.spec.as_ref().context("no pod")?;
    let mut pod = PodSpec::new("ebb");
    pod.namespace = "ebb-system".into();
    pod.host_network = spec.host_network == Some(true);
    pod.host_pid = spec.host_pid == Some(true);
    let metadata = template.metadata.as_ref().context("no metadata")?;
    pod.annotations
        .extend(metadata.annotations.clone().unwrap_or_default());
    pod.labels
        .extend(metadata.labels.clone().unwrap_or_default());

    let from = container_of(manifest)?;
    let mut container = ContainerSpec::new(&from.name, image);
    for env in from.env.iter().flatten() {
        container = container.env(&env.name, value(env)?);
    }
    let args = from.args.iter().flatten().map(|arg| {
        container
            .env
            .iter()
            .fold(arg.clone(), |arg, (name, value)| {
                arg.replace(&format!("$({name})"), value)
            })
    });
    container.args = args.collect();
    for mount in from.volume_mounts.iter().flatten() {
        let volume = spec.volumes.iter().flatten().find(|v| v.name == mount.name);
        container.mounts.push(Mount {
            from: host_path(volume.context("no such volume")?)?,
            to: mount.mount_path.clone(),
            read_only: mount.read_only == Some(true),
            follows: mount.mount_propagation.as_deref() == Some("HostToContainer"),
        });
    }
    let security = from
        .security_context
        .as_ref()
        .context("no security context")?;
    // AppArmor and SELinux are left out: the trial proves nothing about them.
    let capabilities = security.capabilities.clone().unwrap_or_default();
    let seccomp = security.seccomp_profile.as_ref();
    container.security = Security {
        privileged: security.privileged == Some(true),
        read_only_root: security.read_only_root_filesystem == Some(true),
        seccomp_default: seccomp.is_some_and(|p| p.type_ == "RuntimeDefault"),
        add: capabilities.add.unwrap_or_default(),
        drop: capabilities.drop.unwrap_or_default(),
        user: None,
    };
    Ok(pod.container(container))
}

fn value(env: &EnvVar) -> Result<&str> {
    if let Some(value) = &env.value {
        return Ok(value);
    }
    let from = env.value_from.as_ref().and_then(|f| f.field_ref.as_ref());
    match from.map(|f| f.field_path.as_str()) {
        Some("spec.nodeName") => Ok(NODE_NAME),
        Some("status.hostIP") => Ok(NODE_V4),
        other => anyhow::bail!("no value for {}: {other:?}", env.name),
    }
}

/// Requires that the idle agent uses no more memory than the manifest requests: its anonymous memory and its BPF maps.
/// Read from /proc, because not every machine has the memory controller in cgroup v2. Pages of the binary do not count,
/// because the kernel reclaims them when it needs them.
async fn fits_in_memory(
    scene: &ExclusiveScene,
    daemonset: &DaemonSet,
    agent: &StartedPod,
) -> Result<()> {
    let pid = scene.node.kubelet()?.pid(&agent.containers[0]).await?;
    let resources = container_of(daemonset)?.resources.as_ref();
    let requests = resources.and_then(|r| r.requests.as_ref());
    let requested = requests
        .and_then(|r| r.get("memory"))
        .context("no request")?;
    let requested: u64 = requested
        .0
        .strip_suffix("Mi")
        .context("not in Mi")?
        .parse()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let own = field(&status, "RssAnon:").context("no RssAnon")?;
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        if let (Some(id), Some(bytes)) = (field(&text, "map_id:"), field(&text, "memlock:")) {
            maps.insert(id, bytes);
        }
    }
    ensure!(!maps.is_empty(), "no BPF maps");
    let used = (own * 1024 + maps.values().sum::<u64>()).div_ceil(1 << 20);
    eprintln!("the agent's container uses {used} MiB at rest");
    ensure!(used <= requested, "{used} MiB of {requested}");
    Ok(())
}

/// The number in a line of /proc.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A directory of the node, created if the volume says so.
fn host_path(volume: &Volume) -> Result<PathBuf> {
    let host = volume.host_path.as_ref().context("no host path")?;
    if host.type_.as_deref() == Some("DirectoryOrCreate") {
        fs::create_dir_all(&host.path)?;
    }
    Ok(PathBuf::from(&host.path))
}

/// The logs of the pod's containers.
fn logs(pod: &StartedPod) -> String {
    pod.containers.iter().map(|c| pod.log(&c.name)).collect()
}
