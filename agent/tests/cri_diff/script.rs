//! Every RPC, in an order in which most can succeed, and the most common errors.
//!
//! Requests are bytes. A request that needs an id from an earlier reply has a placeholder of the same length as the
//! runtime's ids, so that a client only has to replace bytes.

use anyhow::Result;
use ebb_testkit::{image, sandbox};
use k8s_cri::v1::*;
use prost::Message;
use serde::Serialize;

/// One call.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    /// The gRPC path.
    pub(crate) method: String,
    /// The request, in hexadecimal digits.
    pub(crate) request: String,
    /// The placeholder for the id in its reply, if there is one.
    pub(crate) saves_id_as: Option<String>,
    /// Whether its reply is a stream, which is read during all later calls.
    pub(crate) streams: bool,
}

/// A placeholder for an id that is not known yet.
fn placeholder(name: &str) -> String {
    format!("{name:-<64}")
}

struct Script(Vec<Step>);

impl Script {
    fn raw(&mut self, service: &str, method: &str, request: &[u8]) -> &mut Step {
        self.0.push(Step {
            method: format!("/{service}/{method}"),
            request: request.iter().map(|b| format!("{b:02x}")).collect(),
            saves_id_as: None,
            streams: false,
        });
        let last = self.0.len() - 1;
        &mut self.0[last]
    }

    fn runtime(&mut self, method: &str, request: &impl Message) -> &mut Step {
        self.raw(
            "runtime.v1.RuntimeService",
            method,
            &request.encode_to_vec(),
        )
    }

    fn image(&mut self, method: &str, request: &impl Message) {
        self.raw("runtime.v1.ImageService", method, &request.encode_to_vec());
    }
}

/// The script. It leaves nothing behind, so it can be run again.
pub(crate) fn script() -> Result<Vec<Step>> {
    let mut script = Script(Vec::new());
    script
        .runtime("GetContainerEvents", &GetEventsRequest {})
        .streams = true;
    node(&mut script);
    images(&mut script);
    pod(&mut script);
    errors(&mut script);
    Ok(script.0)
}

fn node(script: &mut Script) {
    let version = "v1".into();
    script.runtime("Version", &VersionRequest { version });
    for verbose in [false, true] {
        script.runtime("Status", &StatusRequest { verbose });
    }
    script.runtime("RuntimeConfig", &RuntimeConfigRequest {});
    let pod_cidr = "10.88.0.0/24".into();
    let network_config = Some(NetworkConfig { pod_cidr });
    let runtime_config = Some(RuntimeConfig { network_config });
    script.runtime(
        "UpdateRuntimeConfig",
        &UpdateRuntimeConfigRequest { runtime_config },
    );
    script.runtime("ListMetricDescriptors", &ListMetricDescriptorsRequest {});
}

fn images(script: &mut Script) {
    script.image("ImageFsInfo", &ImageFsInfoRequest {});
    script.image("ListImages", &ListImagesRequest::default());
    for name in [image::FIXTURE, "ebb.local/nowhere:1", "Not A Name"] {
        let image = Some(image_spec(name));
        let verbose = true;
        script.image("ImageStatus", &ImageStatusRequest { image, verbose });
    }
    let image = Some(image_spec("127.0.0.1:1/unreachable:1"));
    script.image(
        "PullImage",
        &PullImageRequest {
            image,
            ..Default::default()
        },
    );
    let image = Some(image_spec("ebb.local/nowhere:1"));
    script.image("RemoveImage", &RemoveImageRequest { image });
}

fn pod(script: &mut Script) {
    let (sandbox, app, rest) = (
        placeholder("sandbox"),
        placeholder("app"),
        placeholder("rest"),
    );
    let config = sandbox_config();
    script
        .runtime(
            "RunPodSandbox",
            &RunPodSandboxRequest {
                config: Some(config.clone()),
                runtime_handler: String::new(),
            },
        )
        .saves_id_as = Some(sandbox.clone());
    for verbose in [false, true] {
        let pod_sandbox_id = sandbox.clone();
        script.runtime(
            "PodSandboxStatus",
            &PodSandboxStatusRequest {
                pod_sandbox_id,
                verbose,
            },
        );
    }
    script.runtime("ListPodSandbox", &ListPodSandboxRequest::default());
    for (name, id) in [("app", &app), ("rest", &rest)] {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(container_config(name)),
            sandbox_config: Some(config.clone()),
        };
        script.runtime("CreateContainer", &request).saves_id_as = Some(id.clone());
    }
    container_status(script, &app, false);
    for container_id in [app.clone(), rest.clone()] {
        script.runtime("StartContainer", &StartContainerRequest { container_id });
    }
    container_status(script, &app, true);
    script.runtime("ListContainers", &ListContainersRequest::default());
    running(script, &sandbox, &app);

    let container_id = app.clone();
    let timeout = 3;
    script.runtime(
        "StopContainer",
        &StopContainerRequest {
            container_id,
            timeout,
        },
    );
    container_status(script, &app, false);
    let container_id = app;
    script.runtime("RemoveContainer", &RemoveContainerRequest { container_id });
    // The other container still runs.
    let pod_sandbox_id = sandbox.clone();
    script.runtime("StopPodSandbox", &StopPodSandboxRequest { pod_sandbox_id });
    container_status(script, &rest, false);
    let pod_sandbox_id = sandbox;
    script.runtime(
        "RemovePodSandbox",
        &RemovePodSandboxRequest { pod_sandbox_id },
    );
    script.runtime("ListPodSandbox", &ListPodSandboxRequest::default());
}

/// Calls about a running container.
fn running(script: &mut Script, sandbox: &str, app: &str) {
    let id = || app.to_owned();
    let linux = Some(LinuxContainerResources {
        cpu_shares: 512,
        ..Default::default()
    });
    script.runtime(
        "UpdateContainerResources",
        &UpdateContainerResourcesRequest {
            container_id: id(),
            linux,
            ..Default::default()
        },
    );
    script.runtime(
        "ReopenContainerLog",
        &ReopenContainerLogRequest { container_id: id() },
    );
    for command in ["/usr/bin/ebb-fixture", "/nowhere"] {
        script.runtime(
            "ExecSync",
            &ExecSyncRequest {
                container_id: id(),
                cmd: vec![command.into(), "--help".into()],
                timeout: 10,
            },
        );
    }
    script.runtime(
        "Exec",
        &ExecRequest {
            container_id: id(),
            cmd: vec!["/usr/bin/ebb-fixture".into()],
            stdout: true,
            ..Default::default()
        },
    );
    script.runtime(
        "Attach",
        &AttachRequest {
            container_id: id(),
            stdout: true,
            ..Default::default()
        },
    );
    script.runtime(
        "PortForward",
        &PortForwardRequest {
            pod_sandbox_id: sandbox.into(),
            port: vec![8080],
        },
    );
    script.runtime(
        "ContainerStats",
        &ContainerStatsRequest { container_id: id() },
    );
    script.runtime("ListContainerStats", &ListContainerStatsRequest::default());
    let pod_sandbox_id = sandbox.to_owned();
    script.runtime(
        "PodSandboxStats",
        &PodSandboxStatsRequest { pod_sandbox_id },
    );
    script.runtime(
        "ListPodSandboxStats",
        &ListPodSandboxStatsRequest::default(),
    );
    script.runtime("ListPodSandboxMetrics", &ListPodSandboxMetricsRequest {});
    script.runtime(
        "CheckpointContainer",
        &CheckpointContainerRequest {
            container_id: id(),
            // A directory that can't be made.
            location: "/proc/nowhere/checkpoint".into(),
            timeout: 5,
        },
    );
}

fn errors(script: &mut Script) {
    let absent = || "absent".to_owned();
    container_status(script, "absent", false);
    container_status(script, "", false);
    let pod_sandbox_id = absent();
    script.runtime(
        "PodSandboxStatus",
        &PodSandboxStatusRequest {
            pod_sandbox_id,
            verbose: false,
        },
    );
    let container_id = absent();
    script.runtime("StartContainer", &StartContainerRequest { container_id });
    for timeout in [30, 0, -1] {
        let container_id = absent();
        script.runtime(
            "StopContainer",
            &StopContainerRequest {
                container_id,
                timeout,
            },
        );
    }
    let pod_sandbox_id = absent();
    script.runtime("StopPodSandbox", &StopPodSandboxRequest { pod_sandbox_id });
    script.runtime("RunPodSandbox", &RunPodSandboxRequest::default());
    script.runtime("CreateContainer", &CreateContainerRequest::default());
    let container_id = absent();
    script.runtime(
        "ExecSync",
        &ExecSyncRequest {
            container_id,
            ..Default::default()
        },
    );
    // Bytes that are no message, also for calls that the proxy decodes.
    for method in ["Version", "StopContainer", "StopPodSandbox"] {
        script.raw("runtime.v1.RuntimeService", method, b"\xff\xff garbage");
    }
    // Unknown fields, which a later kubelet may send.
    script.raw("runtime.v1.RuntimeService", "Version", b"\xfa\x7f\x03new");
    script.raw(
        "runtime.v1.RuntimeService",
        "StopContainer",
        b"\x0a\x06absent\x10\x1e\xfa\x7f\x03new",
    );
    newer(script);
    // Unknown methods and services.
    script.raw("runtime.v1.RuntimeService", "UnknownMethod", b"");
    script.raw("runtime.v9.FutureService", "Method", b"\x0a\x01x");
}

/// Methods of later versions of the CRI than the protocol file's, by their names: the proxy must return the runtime's
/// answer, whether the runtime knows them or not.
fn newer(script: &mut Script) {
    const SERVICE: &str = "runtime.v1.RuntimeService";
    // Field 1 is the sandbox.
    script.raw(SERVICE, "UpdatePodSandboxResources", b"\x0a\x06absent");
    for method in [
        "StreamPodSandboxes",
        "StreamContainers",
        "StreamContainerStats",
        "StreamPodSandboxStats",
        "StreamPodSandboxMetrics",
    ] {
        script.raw(SERVICE, method, b"");
    }
    script.raw("runtime.v1.ImageService", "StreamImages", b"");
    // Read as a stream, because it may be one.
    script.raw(SERVICE, "StreamUnknownMethod", b"").streams = true;
}

fn container_status(script: &mut Script, id: &str, verbose: bool) {
    let container_id = id.to_owned();
    script.runtime(
        "ContainerStatus",
        &ContainerStatusRequest {
            container_id,
            verbose,
        },
    );
}

fn image_spec(name: &str) -> ImageSpec {
    ImageSpec {
        image: name.into(),
        ..Default::default()
    }
}

/// Paths are the same each time the script is run.
fn sandbox_config() -> PodSandboxConfig {
    let kubepods = sandbox::paths().map_or_else(|_| String::new(), |place| place.kubepods());
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "same".into(),
            uid: "3c6a3b6e-0000-4000-8000-000000000001".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: "same".into(),
        log_directory: "/run/cri-diff".into(),
        dns_config: Some(DnsConfig {
            servers: vec!["127.0.0.1".into()],
            ..Default::default()
        }),
        labels: [("app".into(), "same".into()), ("b".into(), "2".into())].into(),
        annotations: [("note".into(), "grüße".into())].into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("{kubepods}/pod-same"),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_config(name: &str) -> ContainerConfig {
    let args = [
        "serve",
        "--port",
        if name == "app" { "8080" } else { "8081" },
    ];
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(image_spec(image::FIXTURE)),
        args: args.map(Into::into).into(),
        log_path: format!("{name}.log"),
        labels: [("io.kubernetes.container.name".into(), name.into())].into(),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}
