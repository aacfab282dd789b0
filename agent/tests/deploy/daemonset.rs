//! The DaemonSet: names, arguments, mounts, probes, capabilities, memory.

use std::{collections::HashMap, path::Path};

use clap::{CommandFactory as _, Parser as _};
use ebb::{cli::Cli, drain::policy::Policy, host::doctor, start::STOP_WITHIN};
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
    assert!(!policy.enabled, "the agent's own stop must not be held");
    assert_eq!(warnings, Vec::<String>::new());
}

/// `$(NAME)` as the kubelet replaces it, with something to stand for each field.
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
                other => panic!("no value to stand for {other}"),
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
fn the_agent_accepts_the_arguments_and_knows_the_variables_that_it_is_started_with() {
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
        assert!(read_by_ebb || in_args, "{} is of no use", env.name);
    }
}

#[test]
fn what_the_arguments_name_is_mounted_and_the_probes_ask_where_it_listens() {
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
fn the_paths_of_the_host_are_mounted_where_they_are_looked_for_and_hardly_any_to_be_written() {
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
            // Both sides know this one by the same path: the socket is named in the arguments of both.
            "run" => assert_eq!(host.path, mount.mount_path),
            "containerd" => {
                assert_eq!(host.path, mount.mount_path);
                assert_eq!(mount.read_only, Some(true));
            }
            "cgroup" => {
                assert_eq!(host.path, "/sys/fs/cgroup");
                assert_eq!(mount.read_only, Some(true));
            }
            other => panic!("what is {other} for?"),
        }
    }
    // The proxy of the host asks the agent there.
    let unit = read("deploy/systemd/ebb-cri.service");
    assert!(unit.contains(&format!("--agent {}/agent.sock", host("run").path)));
}

#[test]
fn it_runs_on_every_node_that_it_is_built_for_and_on_no_other() {
    let pod = agent_pod();
    let affinity = pod.affinity.unwrap().node_affinity.unwrap();
    let terms = affinity
        .required_during_scheduling_ignored_during_execution
        .unwrap()
        .node_selector_terms;
    assert_eq!(terms.len(), 1, "one that fits would do");
    let wanted = terms[0].match_expressions.as_ref().unwrap();
    // As the scheduler reads In and NotIn.
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
    // Whatever the taint.
    let tolerations = pod.tolerations.unwrap();
    let all = tolerations
        .iter()
        .any(|t| t.operator.as_deref() == Some("Exists") && t.key.is_none() && t.effect.is_none());
    assert!(all, "{tolerations:?}");
}

#[test]
fn it_is_updated_one_node_after_the_other_and_has_the_time_that_its_stop_takes() {
    let spec = daemonset().spec.unwrap();
    let strategy = spec.update_strategy.unwrap();
    assert_eq!(strategy.type_.as_deref(), Some("RollingUpdate"));
    let rolling = strategy.rolling_update.unwrap();
    assert_eq!(rolling.max_unavailable, Some(IntOrString::Int(1)));
    // Two of them on a node would want the same port and the same directory.
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
fn ebb_doctor_asks_for_the_capabilities_that_the_manifest_names() {
    let security = agent_container().security_context.unwrap();
    assert_eq!(security.privileged, None);
    assert_eq!(security.read_only_root_filesystem, Some(true));
    assert_eq!(security.seccomp_profile.unwrap().type_, "RuntimeDefault");
    let capabilities = security.capabilities.unwrap();
    assert_eq!(capabilities.drop.unwrap(), ["ALL"]);
    let mut named: Vec<String> = capabilities.add.unwrap();
    let mut asked: Vec<&str> = doctor::CAPABILITIES.iter().map(|(_, name)| *name).collect();
    for name in &mut named {
        name.insert_str(0, "CAP_");
    }
    named.sort();
    asked.sort_unstable();
    assert_eq!(named, asked);
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
fn the_memory_that_is_asked_for_is_what_was_measured_and_what_the_kernel_needs_besides() {
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
    // The comments say what was measured, and for how many connections the limit is.
    let manifest = read("deploy/daemonset.yaml");
    let measured = number_after(&manifest, "# Measured: ");
    assert!(requested >= measured, "{measured} MiB measured");
    let each = number_after(
        &read("README.md"),
        "| Memory of the kernel for each accepted connection | ",
    );
    assert_eq!(number_after(&manifest, "connection of the node, "), each);
    let connections = number_after(&manifest, &format!("{each} B × "));
    let kernel = (each * connections).div_ceil(1 << 20);
    assert_eq!(number_after(&manifest, "connections are "), kernel);
    assert!(
        requested + kernel <= limit,
        "{limit} MiB for {requested} and {kernel}"
    );
}
