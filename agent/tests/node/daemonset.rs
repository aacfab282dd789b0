//! deploy/daemonset.yaml as a kubelet would run it: its image, arguments, capabilities and mounts.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::report::ReleaseReason,
    report::view::{DrainList, FlowList},
};
use ebb_node::{
    api_server::{ApiServer, Verb},
    http,
    kubelet::{ContainerSpec, Mount, Pod, PodSpec, Security},
};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, EnvVar, Volume},
};
use libtest_mimic::Trial;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    agent::{NODE_NAME, Proxy},
    hold::stop,
    peer::Peer,
    scene::{
        Alone, NODE_V4, SECOND, SOON, directory, eventually, free_port, run, server, trial_alone,
    },
};

/// Privileged, which a pod may declare, too.
const WAIT_PORT: u16 = 690;

const NOBODY: i64 = 65_534;

pub(crate) fn trials() -> Vec<Trial> {
    // Alone: every other agent would listen on the wait port of its pod.
    vec![
        trial_alone(
            "the_daemonset_does_the_main_job_with_the_capabilities_and_mounts_it_names",
            daemonset,
        ),
        trial_alone("the_daemonset_does_the_main_job_privileged", privileged),
    ]
}

/// A cluster's API server, and what its pods have to get in.
struct Secured {
    api: ApiServer,
    account: PathBuf,
}

impl Secured {
    async fn start(scene: &Alone) -> Result<Self> {
        let account = directory(&scene.directory, "serviceaccount")?;
        let address = ([127, 0, 0, 1], free_port()).into();
        let api = ApiServer::start_secured(address).await?;
        api.service_account(&account)?;
        Ok(Self { api, account })
    }

    /// As the kubelet does, of the pod's own accord: the account where it is looked for, and where the server is.
    fn admit(&self, mut agent: PodSpec) -> PodSpec {
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

async fn privileged(scene: Alone) -> Result<()> {
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
    let drains: DrainList = ask(&scene, &agent, &["drains"]).await?;
    let report = drains.drains.first().context("no drain")?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    let stopped = kubelet.stop(&agent, 10 * SECOND).await;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    Ok(())
}

async fn until_ready(agent: &Pod) -> Result<()> {
    eventually("the agent is ready", async || {
        let ready = http::get(([127, 0, 0, 1], 9690).into(), "/readyz").await;
        Ok(ready.is_ok_and(|r| r.status == 200).then_some(()))
    })
    .await
    .with_context(|| logs(agent))
}

/// In a cluster a deletion is known, so that a pod of one container is held; and what became of it is written there.
/// All of that by TLS and with the token.
async fn is_told_of(scene: &Alone, cluster: &Secured, agent: &Pod, proxy: &Proxy) -> Result<()> {
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
    let told = eventually("the cluster is told", async || {
        let mut events = cluster.api.events().into_iter();
        let uid = pod.spec.uid.as_str();
        Ok(events.find(|e| e["reason"] == "Drained" && e["regarding"]["uid"] == uid))
    });
    told.await.with_context(|| logs(agent))?;
    ensure!(cluster.api.count(Verb::Watch) > 0, "nobody watched");
    Ok(())
}

async fn daemonset(scene: Alone) -> Result<()> {
    let kubelet = scene.node.kubelet()?;
    // The first pod makes the bridge, and so the node's address. As nobody, like most servers.
    let spec = PodSpec::new("under-daemonset")
        .annotation("ebb.dev/quiet", "300ms")
        .annotation("ebb.dev/idle-after", "300ms")
        .annotation("ebb.dev/idle-flows", "close")
        .annotation("ebb.dev/wait-port", &WAIT_PORT.to_string())
        .container(server("app", 8080).user(NOBODY))
        .container(server("side", 8081).user(NOBODY));
    let pod = run(&scene.node, spec).await?;
    let host_port = free_port();
    let spec = PodSpec::new("under-daemonset-host").host_network();
    let host = spec.container(server("app", host_port).user(NOBODY));
    kubelet.run(&host).await?;
    let on_host = ([127, 0, 0, 1], host_port).into();
    http::until_open(on_host, SOON).await?;

    let daemonset: DaemonSet = serde_saphyr::from_str(&manifest("daemonset.yaml")?)?;
    let image = scene.import_ebb(&daemonset).await?;
    let cluster = Secured::start(&scene).await?;
    let spec = cluster.admit(pod_of(&daemonset, &image)?);
    // What the trial is about.
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
    let flows: FlowList = ask(&scene, &agent, &["flows", "under-daemonset-host"]).await?;
    ensure!(flows.flows.len() == 1, "{flows:?}\n{}", logs(&agent));

    http::until_open(pod.v4(WAIT_PORT)?, SOON)
        .await
        .with_context(|| logs(&agent))?;
    let mut slow = Peer::asking(pod.v4(8080)?, "/slow?ms=2000").await?;
    // Its client never closes it: ebb does, with a duplicate of the server's descriptor.
    let idle = Peer::served(pod.v4(8081)?).await?;
    let stopping = stop(scene.node.kubelet_at(&proxy.socket)?, &pod, 20 * SECOND);
    slow.answer("slow\n").await?;
    drop(slow);
    let stopped = stopping.await?;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    drop(idle);

    let drains: DrainList = ask(&scene, &agent, &["drains"]).await?;
    let report = drains
        .drains
        .iter()
        .find(|r| r.pod.name == "under-daemonset");
    let report = report.context("no drain")?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.idle_closed == 1, "{report:?}\n{}", logs(&agent));
    ensure!(report.cut_total == Some(0), "{report:?}");

    is_told_of(&scene, &cluster, &agent, &proxy).await?;
    has_room(&scene, &daemonset, &agent).await?;
    // Its own stop is asked about, too, and passes at once: who would answer for it afterwards?
    let through = scene.node.kubelet_at(&proxy.socket)?;
    let stopped = through.stop(&agent, 10 * SECOND).await;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    ensure!(stopped.took < 4 * SECOND, "{stopped:?}");
    let log = fs::read_to_string(scene.node.place().directory().join("containerd/log"))?;
    let told = format!(
        "StopContainer for \\\"{}\\\" with timeout 10 ",
        agent.containers[0].id
    );
    ensure!(log.contains(&told), "not stopped as it was asked: {told}");
    ensure!(
        !Path::new("/run/ebb/agent.sock").exists(),
        "the socket stays"
    );
    Ok(())
}

/// Asks the agent as `kubectl exec` does.
async fn ask<T: DeserializeOwned>(scene: &Alone, agent: &Pod, words: &[&str]) -> Result<T> {
    let command = [&["/usr/local/bin/ebb"], words, &["-o", "json"]].concat();
    let kubelet = scene.node.kubelet()?;
    let output = kubelet.exec(&agent.containers[0], &command, SOON).await?;
    ensure!(output.status == 0, "{output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The runtime has done with the agent what the manifest says: no other capability, seccomp, read-only.
async fn is_confined(scene: &Alone, agent: &Pod, spec: &PodSpec) -> Result<()> {
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
    // What is unmounted on the node is not kept mounted here.
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let mut follows = mounts.lines().filter(|l| l.contains(" /run/containerd "));
    ensure!(follows.any(|l| l.contains(" master:")), "{mounts}");
    Ok(())
}

impl Alone {
    /// Imports the image of the repository as the manifest names it.
    async fn import_ebb(&self, manifest: &DaemonSet) -> Result<String> {
        let archive = target().join("dist/debug/ebb-image.tar");
        ensure!(
            archive.exists(),
            "{} is missing: run `cargo xtask dist --debug`",
            archive.display()
        );
        let image = container_of(manifest)?.image.as_ref().context("no image")?;
        // What a short name means to every runtime.
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

/// The pod that a kubelet would make of it on this node.
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
    // AppArmor and SELinux are not told: the trial is no proof of what they would do.
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

/// What the agent's container is charged with at rest is what the manifest requests, at most: the agent's own memory, and
/// the kernel's for its BPF maps. Added up from what the kernel tells of both, since not every machine has the memory
/// controller in cgroup v2. Pages of the binary are given back when they are needed.
async fn has_room(scene: &Alone, daemonset: &DaemonSet, agent: &Pod) -> Result<()> {
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

/// A directory of the node, made if the volume says so.
fn host_path(volume: &Volume) -> Result<PathBuf> {
    let host = volume.host_path.as_ref().context("no host path")?;
    if host.type_.as_deref() == Some("DirectoryOrCreate") {
        fs::create_dir_all(&host.path)?;
    }
    Ok(PathBuf::from(&host.path))
}

/// What its containers have logged.
fn logs(pod: &Pod) -> String {
    pod.containers.iter().map(|c| pod.log(&c.name)).collect()
}
