//! Discovery against a fake runtime, with `/proc` and cgroups laid out in a directory.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use k8s_cri::v1::{NamespaceMode, PodSandboxStatusResponse};

use super::*;
use crate::pods::{
    info::tests::{CONTAINERD, CONTAINERD_HOST, CRIO_DROPPED, info_map},
    testing::FakeRuntime,
};

struct Fixture {
    runtime: FakeRuntime,
    root: tempfile::TempDir,
    discovery: Discovery,
}

impl Fixture {
    async fn new() -> Self {
        let runtime = FakeRuntime::start();
        let root = tempfile::tempdir().unwrap();
        let host = root.path().join("proc/self/ns/net");
        put(&host);
        let paths = NodePaths {
            host_netns: Netns::inode_at(&host).unwrap(),
            proc: root.path().join("proc"),
            cgroup_root: root.path().join("cgroup"),
        };
        let cri = Cri::connect(runtime.path()).await.unwrap();
        Self {
            runtime,
            root,
            discovery: Discovery::new(cri, paths),
        }
    }

    /// Creates the namespace file of a process. A file has an inode, as a namespace has.
    fn process(&self, pid: u32) -> NetnsInode {
        let link = self.root.path().join(format!("proc/{pid}/ns/net"));
        put(&link);
        Netns::inode_at(&link).unwrap()
    }

    fn sandbox(&self, id: &str, uid: &str, created_at: i64, info: &str, network: NamespaceMode) {
        let mut state = self.runtime.state();
        state.sandboxes.push(v1::PodSandbox {
            id: id.into(),
            created_at,
            labels: HashMap::from([
                (POD_NAME.into(), "web-0".into()),
                (POD_NAMESPACE.into(), "shop".into()),
                (POD_UID.into(), uid.into()),
            ]),
            annotations: HashMap::from([("ebb.dev/until".into(), "idle".into())]),
            ..Default::default()
        });
        let options = v1::NamespaceOption {
            network: network.into(),
            ..Default::default()
        };
        state.sandbox_status.insert(
            id.into(),
            PodSandboxStatusResponse {
                status: Some(v1::PodSandboxStatus {
                    id: id.into(),
                    linux: Some(v1::LinuxPodSandboxStatus {
                        namespaces: Some(v1::Namespace {
                            options: Some(options),
                        }),
                    }),
                    network: Some(v1::PodSandboxNetworkStatus {
                        ip: "10.88.0.7".into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                info: info_map(info),
                ..Default::default()
            },
        );
    }

    fn container(&self, id: &str, sandbox: &str, state: ContainerState, pid: u32, cgroup: &str) {
        let created_at = i64::from(pid);
        let mut runtime = self.runtime.state();
        runtime.containers.push(v1::Container {
            id: id.into(),
            pod_sandbox_id: sandbox.into(),
            state: state.into(),
            created_at,
            labels: HashMap::from([(CONTAINER_NAME.into(), format!("name-of-{id}"))]),
            annotations: HashMap::from([(POD_GRACE.into(), "30".into())]),
            ..Default::default()
        });
        let info = format!(
            r#"{{"sandboxID": "{sandbox}", "pid": {pid},
                 "runtimeSpec": {{"linux": {{"cgroupsPath": "{cgroup}"}}}}}}"#
        );
        runtime.container_status.insert(
            id.into(),
            v1::ContainerStatusResponse {
                status: Some(v1::ContainerStatus {
                    state: state.into(),
                    ..Default::default()
                }),
                info: info_map(&info),
            },
        );
    }

    async fn only_pod(&mut self) -> Pod {
        let mut pods = self.discovery.list().await.unwrap();
        assert_eq!(pods.len(), 1, "{pods:?}");
        pods.remove(0)
    }
}

fn put(file: &Path) {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, "").unwrap();
}

#[tokio::test]
async fn a_pods_scope_is_the_network_namespace_of_its_sandbox() {
    let mut node = Fixture::new().await;
    let inode = node.process(4242);
    node.sandbox("s1", "u1", 1, CONTAINERD, NamespaceMode::Pod);
    node.container("c2", "s1", ContainerState::ContainerExited, 2, "/x");
    node.container("c1", "s1", ContainerState::ContainerRunning, 1, "/x");

    let pod = node.only_pod().await;
    assert_eq!(pod.scope, Scope::Netns { inode, pid: 4242 });
    assert_eq!(
        (pod.name.namespace.as_str(), pod.name.name.as_str()),
        ("shop", "web-0")
    );
    assert_eq!(pod.ips, ["10.88.0.7".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(pod.annotations["ebb.dev/until"], "idle");
    let containers: Vec<_> = pod
        .containers
        .iter()
        .map(|c| (c.name.as_str(), c.running))
        .collect();
    assert_eq!(containers, [("name-of-c1", true), ("name-of-c2", false)]);
    assert_eq!(pod.containers[0].grace, Some(Duration::from_secs(30)));

    // A second list makes no status calls. A removed pod leaves the cache.
    node.only_pod().await;
    assert_eq!(node.runtime.calls("PodSandboxStatus"), 1);
    node.runtime.state().sandboxes.clear();
    assert!(node.discovery.list().await.unwrap().is_empty());
    assert!(node.discovery.sandboxes.is_empty());
}

#[tokio::test]
async fn the_newest_ready_sandbox_is_the_pods() {
    let mut node = Fixture::new().await;
    node.process(4242);
    node.sandbox("old", "u1", 1, CONTAINERD, NamespaceMode::Pod);
    node.sandbox("new", "u1", 2, CONTAINERD, NamespaceMode::Pod);
    assert_eq!(node.only_pod().await.sandbox, SandboxId::new("new"));
}

#[tokio::test]
async fn a_host_network_pods_scope_is_the_cgroups_of_its_running_containers() {
    let mut node = Fixture::new().await;
    let cgroup = node.root.path().join("cgroup/kubepods/podu2/c1");
    fs::create_dir_all(&cgroup).unwrap();
    let id = CgroupId(fs::metadata(&cgroup).unwrap().ino());
    node.sandbox("s2", "u2", 1, CONTAINERD_HOST, NamespaceMode::Node);
    node.container(
        "c1",
        "s2",
        ContainerState::ContainerRunning,
        7,
        "/kubepods/podu2/c1",
    );
    node.container(
        "c0",
        "s2",
        ContainerState::ContainerExited,
        6,
        "/kubepods/podu2/c0",
    );
    assert_eq!(node.only_pod().await.scope, Scope::HostNetwork(vec![id]));
}

#[tokio::test]
async fn a_sandbox_in_the_hosts_namespace_is_host_network_whatever_it_asked_for() {
    let mut node = Fixture::new().await;
    let link = node.root.path().join("proc/4242/ns/net");
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    fs::hard_link(node.root.path().join("proc/self/ns/net"), link).unwrap();
    node.sandbox("s1", "u1", 1, CONTAINERD, NamespaceMode::Pod);
    assert_eq!(node.only_pod().await.scope, Scope::HostNetwork(vec![]));
}

#[tokio::test]
async fn without_a_sandbox_process_a_containers_is_used() {
    let mut node = Fixture::new().await;
    let inode = node.process(900);
    node.sandbox("s3", "u3", 1, CRIO_DROPPED, NamespaceMode::Pod);
    assert!(matches!(node.only_pod().await.scope, Scope::Untracked(_)));
    node.container("c1", "s3", ContainerState::ContainerRunning, 900, "/x");
    assert_eq!(
        node.only_pod().await.scope,
        Scope::Netns { inode, pid: 900 }
    );
    // The container restarts under another id: its process is the new one.
    let inode = node.process(901);
    node.runtime.state().containers.clear();
    node.container("c2", "s3", ContainerState::ContainerRunning, 901, "/x");
    assert_eq!(
        node.only_pod().await.scope,
        Scope::Netns { inode, pid: 901 }
    );
}

#[tokio::test]
async fn a_pod_whose_sockets_cannot_be_found_is_untracked_with_the_reason() {
    let mut node = Fixture::new().await;
    let why = |pod: Pod| match pod.scope {
        Scope::Untracked(why) => why,
        other => panic!("{other:?}"),
    };
    node.sandbox("s1", "u1", 1, CONTAINERD, NamespaceMode::Pod);
    assert!(why(node.only_pod().await).contains("proc/4242/ns/net: No such file"));

    node.runtime.state().sandboxes.clear();
    node.sandbox("s2", "u2", 1, "{", NamespaceMode::Pod);
    assert!(why(node.only_pod().await).contains("not understood"));
    // The failure was not cached: the next list tries again.
    node.process(4242);
    node.runtime
        .state()
        .sandbox_status
        .get_mut("s2")
        .unwrap()
        .info = info_map(CONTAINERD);
    assert!(matches!(node.only_pod().await.scope, Scope::Netns { .. }));

    node.runtime.state().sandboxes.clear();
    node.sandbox("s3", "u3", 1, CONTAINERD_HOST, NamespaceMode::Node);
    node.container(
        "c1",
        "s3",
        ContainerState::ContainerRunning,
        7,
        "/kubepods/podu3/c1",
    );
    assert!(why(node.only_pod().await).contains("need cgroup v2"));

    node.runtime.state().sandboxes.clear();
    let kata = CONTAINERD.replace("runc", "kata");
    node.sandbox("s4", "u4", 1, &kata, NamespaceMode::Pod);
    assert!(why(node.only_pod().await).contains("Kata"));
}

#[tokio::test]
async fn a_sandbox_removed_between_list_and_status_is_no_pod() {
    let mut node = Fixture::new().await;
    node.sandbox("s1", "u1", 1, CONTAINERD, NamespaceMode::Pod);
    node.runtime.state().sandbox_status.clear();
    assert!(node.discovery.list().await.unwrap().is_empty());
}
