//! The DaemonSet: names, arguments, mounts, probes, capabilities, memory.

use std::{collections::HashMap, path::Path};

use clap::{CommandFactory as _, Parser as _};
use ebb::{app::start::STOP_WITHIN, cli::Cli, host::doctor};
use ebb_core::policy::{DrainMode, Policy};
use k8s_openapi::{
    api::{
        core::v1::{Container, Namespace, ResourceQuota, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{
    manifest::{agent_container, agent_pod, daemonset, documents, read},
    strict::strictly,
};

#[test]
fn names_and_labels_agree_across_the_manifests() {
    let rbac = documents("deploy/rbac.yaml");
    let role: ClusterRole = strictly(&rbac[0]).unwrap();
    let binding: ClusterRoleBinding = strictly(&rbac[1]).unwrap();
    let account: ServiceAccount = strictly(&documents("deploy/serviceaccount.yaml")[0]).unwrap();
    let namespace: Namespace = strictly(&documents("deploy/namespace.yaml")[0]).unwrap();
    let daemonset = daemonset();
    assert_eq!(binding.role_ref.name, role.metadata.name.unwrap());
    let subject = &binding.subjects.unwrap()[0];
    assert_eq!(Some(&subject.name), account.metadata.name.as_ref());
    assert_eq!(subject.namespace, account.metadata.namespace);
    assert_eq!(account.metadata.namespace, namespace.metadata.name);
    assert_eq!(daemonset.metadata.namespace, namespace.metadata.name);
    let spec = daemonset.spec.unwrap();
    let template = spec.template.metadata.unwrap();
    assert_eq!(spec.selector.match_labels, template.labels);
    let pod = spec.template.spec.unwrap();
    assert_eq!(pod.service_account_name, account.metadata.name);
    let quota = &documents("deploy/resourcequota.yaml")[0];
    let quota: ResourceQuota = strictly(quota).unwrap();
    let scope = quota.spec.unwrap().scope_selector.unwrap();
    let classes = scope.match_expressions.unwrap().remove(0).values.unwrap();
    assert_eq!(pod.priority_class_name.as_ref(), classes.first());
    let (policy, warnings) = Policy::default().from_annotations(&template.annotations.unwrap());
    assert!(
        policy.drain == DrainMode::Off,
        "the agent's own stop must not be held"
    );
    assert_eq!(warnings, Vec::<String>::new());
}

/// The arguments with `$(NAME)` replaced as the kubelet does, with an example for each field.
fn expanded(container: &Container) -> Vec<String> {
    let values: HashMap<&str, &str> = container
        .env
        .iter()
        .flatten()
        .map(|env| {
            let field = env.value_from.as_ref().unwrap().field_ref.as_ref().unwrap();
            let value = match field.field_path.as_str() {
                "spec.nodeName" => "node-1",
                "status.hostIP" => "192.0.2.10",
                other => panic!("no example for {other}"),
            };
            (env.name.as_str(), value)
        })
        .collect();
    let replace = |arg: &String| {
        values.iter().fold(arg.clone(), |arg, (name, value)| {
            arg.replace(&format!("$({name})"), value)
        })
    };
    container.args.iter().flatten().map(replace).collect()
}

#[test]
fn the_agent_knows_the_arguments_and_variables_of_the_manifest() {
    let container = agent_container();
    let args = expanded(&container);
    assert!(!args.iter().any(|a| a.contains("$(")), "{args:?}");
    Cli::try_parse_from(std::iter::once("ebb".into()).chain(args.clone()))
        .map(drop)
        .unwrap();
    let command = Cli::command();
    let agent = command.find_subcommand(&args[0]).unwrap();
    for env in container.env.unwrap() {
        let read_by_ebb = agent
            .get_arguments()
            .any(|a| a.get_env().is_some_and(|name| name == env.name.as_str()));
        let in_args = container
            .args
            .iter()
            .flatten()
            .any(|a| a.contains(&format!("$({})", env.name)));
        assert!(read_by_ebb || in_args, "{} is not used", env.name);
    }
}

#[test]
fn paths_in_the_arguments_are_mounted_and_the_probes_go_to_the_agents_addresses() {
    let container = agent_container();
    let args = expanded(&container);
    let flag = |name: &str| {
        let found = args.iter().find_map(|a| a.strip_prefix(name));
        found.unwrap_or_else(|| panic!("no {name}"))
    };
    let mounts = container.volume_mounts.unwrap();
    for (path, written) in [
        (flag("--cri-socket="), false),
        (flag("--run-dir="), true),
        (flag("--cgroup-root="), false),
    ] {
        let mount = mounts
            .iter()
            .find(|m| Path::new(path).starts_with(&m.mount_path))
            .unwrap_or_else(|| panic!("{path} is not mounted"));
        assert_eq!(mount.read_only != Some(true), written, "{path}");
    }
    let http: Vec<&str> = flag("--http=").split(',').collect();
    for (probe, path) in [
        (container.liveness_probe, "/healthz"),
        (container.readiness_probe, "/readyz"),
    ] {
        let ask = probe.unwrap().http_get.unwrap();
        let IntOrString::Int(port) = ask.port else {
            panic!("a port by name");
        };
        let address = format!("{}:{port}", ask.host.unwrap());
        assert!(http.contains(&address.as_str()), "{address} in {http:?}");
        assert_eq!(ask.path.as_deref(), Some(path));
    }
    let port = container.ports.unwrap()[0].container_port;
    assert!(http.iter().all(|a| a.ends_with(&format!(":{port}"))));
}

#[test]
fn host_paths_are_mounted_where_ebb_expects_them_and_read_only_where_possible() {
    let pod = agent_pod();
    let volumes = pod.volumes.unwrap();
    let host = |name: &str| {
        let volume = volumes.iter().find(|v| v.name == name);
        let source = volume.unwrap_or_else(|| panic!("no volume {name}"));
        source.host_path.clone().unwrap()
    };
    let mounts = agent_container().volume_mounts.unwrap();
    assert_eq!(mounts.len(), volumes.len());
    for mount in mounts {
        let host = host(&mount.name);
        match mount.name.as_str() {
            // The path is the same on the host and in the pod, because arguments on both sides name the socket.
            "run" => assert_eq!(host.path, mount.mount_path),
            "containerd" => {
                assert_eq!(host.path, mount.mount_path);
                assert_eq!(mount.read_only, Some(true));
            }
            "cgroup" => {
                assert_eq!(host.path, "/sys/fs/cgroup");
                assert_eq!(mount.read_only, Some(true));
            }
            other => panic!("unexpected volume {other}"),
        }
    }
    // The proxy on the host connects to the agent there.
    let unit = read("deploy/systemd/ebb-cri.service");
    assert!(unit.contains(&format!("--agent {}/agent.sock", host("run").path)));
}

#[test]
fn the_agent_runs_on_every_node_that_it_is_built_for_and_on_no_other() {
    let pod = agent_pod();
    let affinity = pod.affinity.unwrap().node_affinity.unwrap();
    let terms = affinity
        .required_during_scheduling_ignored_during_execution
        .unwrap()
        .node_selector_terms;
    assert_eq!(terms.len(), 1, "a node needs to fit only one of them");
    let wanted = terms[0].match_expressions.as_ref().unwrap();
    // Evaluates In and NotIn as the scheduler does.
    let fits = |labels: &[(&str, &str)]| {
        wanted.iter().all(|e| {
            let label = labels.iter().find(|(key, _)| *key == e.key);
            let named = label.is_some_and(|(_, value)| {
                let mut values = e.values.iter().flatten();
                values.any(|v| v == value)
            });
            match e.operator.as_str() {
                "In" => named,
                "NotIn" => !named,
                other => panic!("{other}"),
            }
        })
    };
    let linux = [
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", "amd64"),
    ];
    assert!(fits(&linux));
    for other in [
        [("kubernetes.io/os", "windows"), linux[1]],
        [linux[0], ("kubernetes.io/arch", "arm64")],
        [linux[0], ("kubernetes.io/arch", "s390x")],
    ] {
        assert!(!fits(&other), "{other:?}");
    }
    for virtual_node in [
        ("type", "virtual-kubelet"),
        ("eks.amazonaws.com/compute-type", "fargate"),
    ] {
        assert!(
            !fits(&[linux[0], linux[1], virtual_node]),
            "{virtual_node:?}"
        );
    }
    // Every taint is tolerated.
    let tolerations = pod.tolerations.unwrap();
    let all = tolerations
        .iter()
        .any(|t| t.operator.as_deref() == Some("Exists") && t.key.is_none() && t.effect.is_none());
    assert!(all, "{tolerations:?}");
}

#[test]
fn the_agent_is_updated_node_by_node_and_its_grace_period_covers_its_stop() {
    let spec = daemonset().spec.unwrap();
    let strategy = spec.update_strategy.unwrap();
    assert_eq!(strategy.type_.as_deref(), Some("RollingUpdate"));
    let rolling = strategy.rolling_update.unwrap();
    assert_eq!(rolling.max_unavailable, Some(IntOrString::Int(1)));
    // Two agents on a node would need the same port and the same directory.
    assert_eq!(rolling.max_surge, None);
    let grace = agent_pod().termination_grace_period_seconds.unwrap();
    assert!(
        grace.unsigned_abs() > 2 * STOP_WITHIN.as_secs(),
        "{grace} s"
    );
}

#[test]
fn the_image_is_the_one_that_this_version_builds() {
    let image = format!("ebb:{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(agent_container().image.as_deref(), Some(image.as_str()));
    for file in ["deploy/Containerfile", "deploy/kustomization.yaml"] {
        let text = read(file);
        assert!(text.contains(env!("CARGO_PKG_VERSION")), "{file}");
    }
}

#[test]
fn ebb_doctor_checks_the_capabilities_that_the_manifest_names() {
    let security = agent_container().security_context.unwrap();
    assert_eq!(security.privileged, None);
    assert_eq!(security.read_only_root_filesystem, Some(true));
    assert_eq!(security.seccomp_profile.unwrap().type_, "RuntimeDefault");
    let capabilities = security.capabilities.unwrap();
    assert_eq!(capabilities.drop.unwrap(), ["ALL"]);
    let mut named: Vec<String> = capabilities.add.unwrap();
    let mut checked: Vec<&str> = doctor::CAPABILITIES.iter().map(|(_, name)| *name).collect();
    for name in &mut named {
        name.insert_str(0, "CAP_");
    }
    named.sort();
    checked.sort_unstable();
    assert_eq!(named, checked);
}

/// The first number after `before` in a text, without its commas.
fn number_after(text: &str, before: &str) -> u64 {
    let (_, rest) = text
        .split_once(before)
        .unwrap_or_else(|| panic!("no {before:?}"));
    let number = rest.split([' ', '\n']).next().unwrap().replace(',', "");
    number
        .parse()
        .unwrap_or_else(|_| panic!("{number:?} after {before:?}"))
}

#[test]
fn the_memory_request_covers_what_was_measured_and_the_limit_is_higher() {
    let resources = agent_container().resources.unwrap();
    let mebibytes = |quantity: &str| -> u64 {
        let number = quantity.strip_suffix("Mi");
        number
            .unwrap_or_else(|| panic!("{quantity}"))
            .parse()
            .unwrap()
    };
    let requested = mebibytes(&resources.requests.unwrap()["memory"].0);
    let limit = mebibytes(&resources.limits.unwrap()["memory"].0);
    // The manifest's comment says what was measured. ebb keeps no memory per connection, so no count of them is needed.
    let measured = number_after(&read("deploy/daemonset.yaml"), "# Measured: ");
    assert!(requested >= measured, "{measured} MiB measured");
    assert!(requested < limit, "{limit} MiB for {requested}");
}
