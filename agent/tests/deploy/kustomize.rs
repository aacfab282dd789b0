//! Every manifest, and what kustomize builds from them.

use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::Container};
use serde_json::Value;

use crate::{
    manifest::{agent_container, daemonset, documents, repository, yaml_files},
    strict::{Kustomization, PodMonitor, check, strictly},
};

#[test]
fn every_manifest_has_only_fields_that_the_api_has() {
    let files = yaml_files("deploy");
    assert!(files.len() >= 12, "{files:?}");
    for file in files {
        let documents = documents(&file);
        assert!(!documents.is_empty(), "{file} is empty");
        for document in documents {
            check(&document).unwrap_or_else(|e| panic!("{file}: {e}"));
        }
    }
}

fn kustomization(path: &str) -> Kustomization {
    strictly(&documents(path)[0]).unwrap()
}

#[test]
fn each_kustomization_lists_the_files_beside_it_and_no_other() {
    for (directory, kind) in [
        ("deploy", "Kustomization"),
        ("deploy/components/no-stop-signal", "Component"),
        ("deploy/components/privileged", "Component"),
        ("deploy/components/monitoring", "Component"),
    ] {
        let mut listed = kustomization(&format!("{directory}/kustomization.yaml"));
        assert_eq!(listed.kind, kind);
        let there: Vec<String> = yaml_files(directory)
            .into_iter()
            .map(|path| path[directory.len() + 1..].to_owned())
            .filter(|path| !path.contains('/') && path != "kustomization.yaml")
            .collect();
        listed.resources.sort();
        assert_eq!(listed.resources, there, "{directory}");
    }
}

/// The kustomization with all of its commented options.
fn with_all() -> Kustomization {
    let text = crate::manifest::read("deploy/kustomization.yaml");
    let lines = text.lines().map(|line| match line.strip_prefix("# ") {
        Some(offer) if offer.starts_with("  ") || offer.ends_with("s:") => offer,
        _ => line,
    });
    let text: Vec<&str> = lines.collect();
    let document: Value = serde_saphyr::from_str(&text.join("\n")).unwrap();
    check(&document).unwrap();
    strictly(&document).unwrap()
}

#[test]
fn the_commented_options_of_the_kustomization_exist_and_are_valid() {
    let mut offered = with_all();
    let mut there: Vec<String> = std::fs::read_dir(repository().join("deploy/components"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| format!("components/{name}"))
        .collect();
    there.sort();
    offered.components.sort();
    assert_eq!(offered.components, there);
    let [image] = &offered.images[..] else {
        panic!("{:?}", offered.images)
    };
    // It must be the name that the DaemonSet uses.
    let named = agent_container().image.unwrap();
    assert_eq!(named.split(':').next(), Some(image.name.as_str()));
    assert_eq!(image.new_tag, env!("CARGO_PKG_VERSION"));
    assert!(!image.new_name.is_empty());
}

#[test]
fn the_component_without_stop_signals_takes_one_capability() {
    let added = |components: &[String]| {
        let documents = rendered(components);
        let mut found = documents.iter().filter(|d| d["kind"] == "DaemonSet");
        let agent = &found.next().unwrap()["spec"]["template"]["spec"]["containers"][0];
        let added = agent["securityContext"]["capabilities"]["add"].as_array();
        added.unwrap().clone()
    };
    let mut all = added(&[]);
    all.retain(|capability| capability != "KILL");
    let without = added(&["components/no-stop-signal".into()]);
    assert_eq!(without, all);
    assert_eq!(without.len() + 1, added(&[]).len());
}

/// The documents that kustomize builds with these components, patched.
fn rendered(components: &[String]) -> Vec<Value> {
    let of = |directory: &str, resources: &[String]| -> Vec<Value> {
        let files = resources.iter().map(|file| format!("{directory}/{file}"));
        files.flat_map(|file| documents(&file)).collect()
    };
    let mut all = of(
        "deploy",
        &kustomization("deploy/kustomization.yaml").resources,
    );
    for component in components {
        let directory = format!("deploy/{component}");
        let component = kustomization(&format!("{directory}/kustomization.yaml"));
        all.extend(of(&directory, &component.resources));
        for patch in component.patches {
            let target = all.iter_mut().find(|document| {
                document["kind"] == patch.target.kind.as_str()
                    && document["metadata"]["name"] == patch.target.name.as_str()
            });
            let patch_of: json_patch::Patch = serde_saphyr::from_str(&patch.patch).unwrap();
            json_patch::patch(target.unwrap(), &patch_of).unwrap();
        }
    }
    all
}

#[test]
fn the_output_with_each_component_and_with_all_of_them_is_valid() {
    let all = with_all().components;
    let plain = rendered(&[]).len();
    for components in all.iter().map(std::slice::from_ref).chain([&all[..]]) {
        let documents = rendered(components);
        let mut names = Vec::new();
        for document in &documents {
            check(document).unwrap_or_else(|e| panic!("{components:?}: {e}"));
            let name = &document["metadata"]["name"];
            names.push(format!("{} {name}", document["kind"]));
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), documents.len(), "twice: {names:?}");
        let monitored = components.iter().any(|c| c.ends_with("monitoring"));
        assert_eq!(documents.len(), plain + 3 * usize::from(monitored));
    }
}

/// The agent's container with the privileged component applied.
fn privileged() -> Container {
    let documents = rendered(&["components/privileged".to_owned()]);
    let document = documents.iter().find(|d| d["kind"] == "DaemonSet").unwrap();
    let patched: DaemonSet = strictly(document).unwrap();
    let pod = patched.spec.unwrap().template.spec.unwrap();
    pod.containers.into_iter().next().unwrap()
}

#[test]
fn the_privileged_component_changes_only_the_security_context() {
    let patched = privileged();
    let security = patched.security_context.clone().unwrap();
    assert_eq!(security.privileged, Some(true));
    assert_eq!(security.read_only_root_filesystem, Some(true));
    // The API server refuses neither, but they would have no effect.
    assert_eq!(security.capabilities, None);
    assert_eq!(security.seccomp_profile, None);
    let mut plain = agent_container();
    plain.security_context = patched.security_context.clone();
    assert_eq!(patched, plain);
}

#[test]
fn the_pod_monitor_scrapes_a_port_that_the_agents_have() {
    let monitor = &documents("deploy/components/monitoring/podmonitor.yaml")[0];
    let monitor: PodMonitor = strictly(monitor).unwrap();
    let daemonset = daemonset();
    assert_eq!(monitor.metadata.namespace, daemonset.metadata.namespace);
    let labels = daemonset.spec.unwrap().template.metadata.unwrap().labels;
    assert_eq!(monitor.spec.selector.match_labels, labels);
    let endpoint = &monitor.spec.pod_metrics_endpoints[0];
    assert_eq!(endpoint.path, "/metrics");
    // Both the metrics and Prometheus have a label `namespace`.
    assert!(endpoint.honor_labels);
    let ports = agent_container().ports.unwrap();
    let port = ports
        .iter()
        .find(|p| p.name.as_deref() == Some(&endpoint.port));
    assert!(port.is_some(), "no port {}", endpoint.port);
}
