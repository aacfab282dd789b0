//! Parses the runtime's verbose status of a sandbox, a container or an image. Pure.
//!
//! The CRI leaves `info` to the runtime. containerd and CRI-O both put one JSON document under the key
//! `info`, and the fields used here have the same names in both: `SandboxInfo` and `ContainerInfo` in
//! containerd's `pkg/cri/server/{sandbox,container}_status.go`; `createSandboxInfo` and
//! `createContainerInfo` in CRI-O's `server/{sandbox,container}_status.go`.

use std::{collections::HashMap, net::IpAddr};

use k8s_cri::v1::{NamespaceMode, PodSandboxStatusResponse};
use serde::Deserialize;

/// A verbose status that can't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InfoError {
    #[error("the runtime's verbose status holds no `info`")]
    Absent,
    #[error("the runtime's verbose status is not understood")]
    Shape(#[from] serde_json::Error),
}

/// The part of a verbose status that ebb uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Info {
    /// The first process, in the node's PID namespace.
    pub(crate) pid: Option<u32>,
    /// The shim, such as `io.containerd.runc.v2`. CRI-O leaves it empty.
    pub(super) runtime_type: String,
    /// Whether the OCI spec has a network namespace; `None` if it lists no namespaces.
    pub(super) own_network: Option<bool>,
    /// `linux.cgroupsPath` of the OCI spec, in the cgroup driver's spelling.
    pub(super) cgroups_path: Option<String>,
}

/// The part of a sandbox's status that ebb uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SandboxFacts {
    /// The sandbox's process. `None` if CRI-O dropped the infra container.
    pub(crate) pid: Option<u32>,
    pub(super) host_network: bool,
    /// Why the host's kernel does not have its sockets, if so.
    pub(super) hidden: Option<String>,
    /// Its addresses, the primary one first. None for host-network pods.
    pub(super) ips: Vec<IpAddr>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawInfo {
    pid: Option<i64>,
    runtime_type: Option<String>,
    runtime_spec: Option<RawSpec>,
}

#[derive(Deserialize)]
struct RawSpec {
    linux: Option<RawLinux>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawLinux {
    namespaces: Option<Vec<RawNamespace>>,
    cgroups_path: Option<String>,
}

#[derive(Deserialize)]
struct RawNamespace {
    r#type: String,
}

/// Reads the `info` map of a verbose status.
///
/// # Errors
/// [`InfoError`] if the map has no JSON document, or one of an unknown shape.
pub(crate) fn parse_info(info: &HashMap<String, String>) -> Result<Info, InfoError> {
    let raw: RawInfo = serde_json::from_str(info.get("info").ok_or(InfoError::Absent)?)?;
    let linux = raw.runtime_spec.and_then(|s| s.linux);
    let (namespaces, cgroups_path) = linux.map_or((None, None), |l| (l.namespaces, l.cgroups_path));
    Ok(Info {
        // Zero or less: the process has not started, or has exited.
        pid: raw
            .pid
            .and_then(|p| u32::try_from(p).ok())
            .filter(|&p| p != 0),
        runtime_type: raw.runtime_type.unwrap_or_default(),
        own_network: namespaces.map(|n| n.iter().any(|n| n.r#type == "network")),
        cgroups_path: cgroups_path.filter(|p| !p.is_empty()),
    })
}

/// The environment with which a container was started: `runtimeSpec.process.env` of its verbose status. The process itself
/// may have written over the one in `/proc`, as nginx does.
pub(crate) fn environment(info: &HashMap<String, String>) -> HashMap<String, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct RawContainer {
        runtime_spec: RawRuntimeSpec,
    }
    #[derive(Deserialize)]
    struct RawRuntimeSpec {
        process: RawProcess,
    }
    #[derive(Deserialize)]
    struct RawProcess {
        #[serde(default)]
        env: Vec<String>,
    }
    let raw = info
        .get("info")
        .and_then(|text| serde_json::from_str::<RawContainer>(text).ok());
    let variables = raw
        .map(|raw| raw.runtime_spec.process.env)
        .unwrap_or_default();
    let pairs = variables
        .iter()
        .filter_map(|variable| variable.split_once('='));
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Reads the stop signal of an image from its verbose status: `imageSpec.config.StopSignal`, in containerd's and
/// CRI-O's `image_status.go` alike. `None` if the image names none.
///
/// # Errors
/// [`InfoError`], see [`parse_info`].
pub(super) fn stop_signal(info: &HashMap<String, String>) -> Result<Option<String>, InfoError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct RawImage {
        image_spec: Option<RawImageSpec>,
    }
    #[derive(Deserialize)]
    struct RawImageSpec {
        config: Option<RawImageConfig>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct RawImageConfig {
        stop_signal: Option<String>,
    }
    let raw: RawImage = serde_json::from_str(info.get("info").ok_or(InfoError::Absent)?)?;
    let config = raw.image_spec.and_then(|s| s.config);
    Ok(config.and_then(|c| c.stop_signal).filter(|s| !s.is_empty()))
}

/// Reads a sandbox's verbose status.
///
/// # Errors
/// [`InfoError`], see [`parse_info`].
pub(super) fn sandbox_facts(answer: &PodSandboxStatusResponse) -> Result<SandboxFacts, InfoError> {
    let info = parse_info(&answer.info)?;
    let status = answer.status.as_ref();
    let options = status
        .and_then(|s| s.linux.as_ref())
        .and_then(|l| l.namespaces.as_ref())
        .and_then(|n| n.options.as_ref());
    let host_network = match options {
        Some(options) => options.network() == NamespaceMode::Node,
        // Without options the OCI spec decides; without namespaces in the spec, `discover` compares the inodes.
        None => info.own_network == Some(false),
    };
    let handler = status.map_or("", |s| s.runtime_handler.as_str());
    let network = status.and_then(|s| s.network.as_ref());
    let ips = network
        .into_iter()
        .flat_map(|n| std::iter::once(&n.ip).chain(n.additional_ips.iter().map(|a| &a.ip)))
        .filter_map(|ip| ip.parse().ok())
        .collect();
    Ok(SandboxFacts {
        pid: info.pid,
        host_network,
        hidden: hidden(&info.runtime_type, handler),
        ips,
    })
}

/// containerd's shims that run containers on the host's kernel, whatever OCI runtime they start (runc, crun, …).
const HOST_KERNEL_SHIMS: [&str; 3] = [
    "io.containerd.runc.v1",
    "io.containerd.runc.v2",
    "io.containerd.runtime.v1.linux",
];

/// Why the pod's TCP sockets are not in the host's kernel, if the runtime has its own network stack. The shim's name
/// decides, or the handler's if the runtime names no shim. An unknown shim may have its own stack.
fn hidden(runtime_type: &str, handler: &str) -> Option<String> {
    if HOST_KERNEL_SHIMS.contains(&runtime_type) {
        return None;
    }
    let says = |word| runtime_type.contains(word) || handler.contains(word);
    let sandbox = if says("runsc") || says("gvisor") {
        "gVisor"
    } else if says("kata") {
        "Kata"
    } else if runtime_type.is_empty() {
        return None;
    } else {
        return Some(format!(
            "it runs under {runtime_type}, and ebb does not know whether that keeps sockets in the host's kernel"
        ));
    };
    Some(format!(
        "it runs in a {sandbox} sandbox, whose sockets are not in the host's kernel"
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use k8s_cri::v1;

    use super::*;

    /// containerd 1.6, a pod with its own network.
    pub(in crate::pods) const CONTAINERD: &str = r#"{
      "pid": 4242, "processStatus": "running", "netNamespaceClosed": false,
      "image": "registry.k8s.io/pause:3.9",
      "snapshotKey": "8f1f3f1d0c6c", "snapshotter": "overlayfs", "runtimeHandler": "",
      "runtimeType": "io.containerd.runc.v2", "runtimeOptions": {"systemd_cgroup": true},
      "config": {"metadata": {"name": "web-0", "uid": "u1", "namespace": "shop"}, "linux": {}},
      "runtimeSpec": {"ociVersion": "1.0.2-dev", "process": {"args": ["/pause"], "cwd": "/"},
        "linux": {"resources": {"cpu": {"shares": 2}},
          "cgroupsPath": "kubepods-burstable-podu1.slice:cri-containerd:8f1f3f1d0c6c",
          "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"},
            {"type": "network", "path": "/var/run/netns/cni-6f2a"}]}},
      "cniResult": {"Interfaces": {"eth0": {"IPConfigs": [{"IP": "10.88.0.7"}]}}}
    }"#;

    /// containerd 1.6, a host-network pod: the spec has no network namespace.
    pub(in crate::pods) const CONTAINERD_HOST: &str = r#"{
      "pid": 4243, "processStatus": "running", "netNamespaceClosed": false, "runtimeHandler": "",
      "runtimeType": "io.containerd.runc.v2",
      "runtimeSpec": {"linux": {"cgroupsPath": "/kubepods/podu2/aa11",
        "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}]}},
      "cniResult": null
    }"#;

    /// CRI-O, whose infra container was dropped: a spec and nothing else.
    pub(in crate::pods) const CRIO_DROPPED: &str = r#"{
      "runtimeSpec": {"ociVersion": "1.2.0", "annotations": {"io.container.manager": "cri-o"},
        "linux": {"namespaces": [{"type": "network", "path": "/var/run/netns/5e7c"}, {"type": "mount"}],
          "cgroupsPath": "kubepods-podu3.slice:crio:77ee"}}
    }"#;

    pub(in crate::pods) fn info_map(json: &str) -> HashMap<String, String> {
        HashMap::from([("info".into(), json.into())])
    }

    fn answer(
        json: &str,
        network: Option<NamespaceMode>,
        handler: &str,
    ) -> PodSandboxStatusResponse {
        let options = network.map(|n| v1::NamespaceOption {
            network: n.into(),
            ..Default::default()
        });
        PodSandboxStatusResponse {
            status: Some(v1::PodSandboxStatus {
                linux: Some(v1::LinuxPodSandboxStatus {
                    namespaces: Some(v1::Namespace { options }),
                }),
                runtime_handler: handler.into(),
                network: Some(v1::PodSandboxNetworkStatus {
                    ip: "10.88.0.7".into(),
                    additional_ips: vec![v1::PodIp {
                        ip: "fd00::7".into(),
                    }],
                }),
                ..Default::default()
            }),
            info: info_map(json),
            ..Default::default()
        }
    }

    #[test]
    fn a_container_has_the_environment_of_its_spec() {
        let json =
            r#"{"pid": 7, "runtimeSpec": {"process": {"env": ["PATH=/bin", "EMPTY=", "A=b=c"]}}}"#;
        let environment = environment(&info_map(json));
        let of = |name: &str| environment.get(name).map(String::as_str);
        assert_eq!(of("PATH"), Some("/bin"));
        assert_eq!(of("EMPTY"), Some(""));
        assert_eq!(of("A"), Some("b=c"));
        assert!(super::environment(&info_map(CONTAINERD)).is_empty());
    }

    #[test]
    fn containerd_sandbox_with_its_own_network() {
        let facts = sandbox_facts(&answer(CONTAINERD, Some(NamespaceMode::Pod), "")).unwrap();
        assert_eq!(facts.pid, Some(4242));
        assert!(!facts.host_network);
        assert_eq!(facts.hidden, None);
        assert_eq!(
            facts.ips,
            [
                "10.88.0.7".parse::<IpAddr>().unwrap(),
                "fd00::7".parse().unwrap()
            ]
        );
    }

    #[test]
    fn host_network_comes_from_the_options_or_else_from_the_spec() {
        let facts = |json, mode| sandbox_facts(&answer(json, mode, "")).unwrap();
        assert!(facts(CONTAINERD_HOST, Some(NamespaceMode::Node)).host_network);
        assert!(facts(CONTAINERD_HOST, None).host_network);
        assert!(!facts(CONTAINERD, None).host_network);
        assert!(!facts(r#"{"pid": 1}"#, None).host_network);
    }

    #[test]
    fn crio_without_an_infra_container_has_no_pid() {
        let facts = sandbox_facts(&answer(CRIO_DROPPED, Some(NamespaceMode::Pod), "")).unwrap();
        assert_eq!(facts.pid, None);
        assert!(!facts.host_network);
    }

    #[test]
    fn sandboxes_with_a_network_stack_of_their_own_are_hidden() {
        let kata = CONTAINERD.replace("io.containerd.runc.v2", "io.containerd.kata-qemu.v2");
        assert!(
            sandbox_facts(&answer(&kata, None, ""))
                .unwrap()
                .hidden
                .unwrap()
                .contains("Kata")
        );
        let runsc = CONTAINERD.replace("io.containerd.runc.v2", "io.containerd.runsc.v1");
        assert!(
            sandbox_facts(&answer(&runsc, None, ""))
                .unwrap()
                .hidden
                .unwrap()
                .contains("gVisor")
        );
        assert!(
            sandbox_facts(&answer(CRIO_DROPPED, None, "kata"))
                .unwrap()
                .hidden
                .is_some()
        );
    }

    #[test]
    fn an_unknown_shim_may_hide_its_sockets() {
        let hidden = |shim: &str, handler: &str| {
            let info = CONTAINERD.replace("io.containerd.runc.v2", shim);
            let facts = sandbox_facts(&answer(&info, None, handler)).unwrap();
            facts.hidden
        };
        assert!(
            hidden("io.containerd.unknown.v1", "")
                .unwrap()
                .contains("io.containerd.unknown.v1")
        );
        assert_eq!(hidden("io.containerd.runc.v1", "kata-like-name"), None);
        assert_eq!(hidden("", "crun"), None);
    }

    #[test]
    fn container_info_of_both_runtimes() {
        let containerd = parse_info(&info_map(
            r#"{"sandboxID": "8f1f", "pid": 4300, "removing": false, "snapshotKey": "c1",
                "snapshotter": "overlayfs", "runtimeType": "io.containerd.runc.v2", "runtimeOptions": {},
                "config": {"metadata": {"name": "nginx"}},
                "runtimeSpec": {"linux": {"cgroupsPath": "/kubepods/podu1/c1", "namespaces": null}}}"#,
        ));
        let containerd = containerd.unwrap();
        assert_eq!(containerd.pid, Some(4300));
        assert_eq!(
            containerd.cgroups_path.as_deref(),
            Some("/kubepods/podu1/c1")
        );
        assert_eq!(containerd.own_network, None);
        let crio = parse_info(&info_map(
            r#"{"sandboxID": "77ee", "pid": 0, "privileged": false, "checkpointedAt": "0001-01-01T00:00:00Z",
                "runtimeSpec": {"linux": {"cgroupsPath": "kubepods-podu3.slice:crio:c2"}}}"#,
        ));
        assert_eq!(crio.unwrap().pid, None);
    }

    #[test]
    fn the_stop_signal_of_an_image_is_read_where_it_has_one() {
        let of = |json| stop_signal(&info_map(json)).unwrap();
        let nginx = r#"{"chainID": "sha256:1", "imageSpec": {"os": "linux", "config":
            {"Cmd": ["nginx"], "StopSignal": "SIGQUIT"}}}"#;
        assert_eq!(of(nginx).as_deref(), Some("SIGQUIT"));
        assert_eq!(of(r#"{"imageSpec": {"config": {"Cmd": []}}}"#), None);
        assert_eq!(of("{}"), None);
    }

    #[test]
    fn an_unknown_shape_is_an_error() {
        assert!(matches!(
            parse_info(&HashMap::new()),
            Err(InfoError::Absent)
        ));
        for bad in ["", "[]", "nonsense", r#"{"pid": "many"}"#] {
            assert!(
                matches!(parse_info(&info_map(bad)), Err(InfoError::Shape(_))),
                "{bad}"
            );
        }
    }
}
