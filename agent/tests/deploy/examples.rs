//! `deploy/examples`: how ebb reads them.

use std::time::Duration;

use ebb::pods::hook;
use ebb_core::policy::{Policy, Until, annotations};
use k8s_openapi::{
    api::{core::v1::PodTemplateSpec, networking::v1::NetworkPolicy},
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde_json::Value;

use crate::{
    manifest::{agent_container, documents, read, yaml_files},
    strict::strictly,
};

/// The pods that the examples describe, with the name of the workload, and their policy.
fn pods() -> Vec<(String, PodTemplateSpec, Policy)> {
    let files = yaml_files("deploy/examples");
    let documents = files.iter().flat_map(|file| documents(file));
    documents
        .filter_map(|document| {
            let template = strictly(document.pointer("/spec/template")?).unwrap();
            let name = document["metadata"]["name"].as_str().unwrap().to_owned();
            let policy = policy(&name, &template);
            Some((name, template, policy))
        })
        .collect()
}

fn policy(name: &str, template: &PodTemplateSpec) -> Policy {
    let metadata = template.metadata.as_ref().unwrap();
    let annotations = metadata.annotations.as_ref().unwrap();
    assert!(!annotations.is_empty(), "{name}");
    let (policy, warnings) = Policy::default().from_annotations(annotations);
    assert_eq!(warnings, Vec::<String>::new(), "{name}");
    policy
}

#[test]
fn every_example_has_valid_annotations_each_with_a_reason() {
    let until: Vec<(String, Until)> = pods()
        .into_iter()
        .map(|(name, _, policy)| (name, policy.until))
        .collect();
    // As docs/until.md recommends: a WebSocket between messages looks idle; gRPC drains by its own GOAWAY.
    let expected = [
        ("db", Until::Idle),
        ("quotes", Until::Settled),
        ("shop", Until::Idle),
        ("chat", Until::Zero),
    ];
    assert_eq!(
        until,
        expected.map(|(name, until)| (name.to_owned(), until))
    );
    for file in yaml_files("deploy/examples") {
        let text = read(&file);
        let mut before = "";
        for line in text.lines().map(str::trim) {
            if line.starts_with(annotations::PREFIX) {
                assert!(before.starts_with('#'), "{file}: {line} has no reason");
            }
            before = line;
        }
    }
}

#[test]
fn annotations_are_where_ebb_reads_them() {
    for file in yaml_files("deploy/examples") {
        for document in documents(&file) {
            let own = &document["metadata"]["annotations"];
            assert_eq!(own, &Value::Null, "{file}: not on the pod");
        }
    }
}

#[test]
fn grace_periods_cover_the_holds_and_the_reserve() {
    for (name, template, policy) in pods() {
        let pod = template.spec.unwrap();
        let grace = pod.termination_grace_period_seconds.unwrap();
        let grace = Duration::from_secs(grace.try_into().unwrap());
        assert!(policy.reserve <= grace / 3, "{name}: the reserve is cut");
        let held = policy
            .max_hold
            .unwrap_or(policy.settle_max + policy.idle_after);
        assert!(held + policy.reserve <= grace, "{name}");
        for container in pod.containers {
            assert!(container.readiness_probe.is_some(), "{name}");
        }
    }
}

#[test]
fn one_example_waits_by_a_hook_on_a_port_that_no_container_declares() {
    let mut found = Vec::new();
    for (name, template, _) in pods() {
        for container in template.spec.unwrap().containers {
            let Some(hook) = container.lifecycle.and_then(|l| l.pre_stop) else {
                continue;
            };
            // ebb reads both as JSON from the annotations that the kubelet gives a container.
            let hook = serde_json::to_string(&hook).unwrap();
            let ports = container.ports.unwrap();
            let json = serde_json::to_string(&ports).unwrap();
            let port = hook::wait_port(&hook, Some(&json)).unwrap().unwrap();
            assert!(!ports.iter().any(|p| p.container_port == i32::from(port)));
            found.push(name.clone());
        }
    }
    assert_eq!(found, ["chat"]);
}

#[test]
fn an_example_without_a_hook_says_first_that_it_needs_the_proxy() {
    let mut without = Vec::new();
    for file in yaml_files("deploy/examples") {
        let documents = documents(&file);
        let mut templates = documents.iter().filter_map(|d| d.pointer("/spec/template"));
        let Some(template) = templates.next() else {
            continue;
        };
        let has_hook = template.to_string().contains(hook::WAIT_PATH);
        let text = read(&file);
        let said = text.starts_with("# Needs the CRI proxy on its nodes");
        assert_eq!(said, !has_hook, "{file}");
        if said {
            assert!(text.contains("add the hook of\n# websocket.yaml"), "{file}");
            without.push(file);
        }
    }
    assert_eq!(without.len(), 3, "{without:?}");
}

#[test]
fn the_network_policy_lets_pods_reach_the_node_port() {
    let document = &documents("deploy/examples/networkpolicy.yaml")[0];
    let policy: NetworkPolicy = strictly(document).unwrap();
    let egress = policy.spec.unwrap().egress.unwrap();
    let allowed = egress[0].ports.as_ref().unwrap()[0].port.clone();
    let port = agent_container().ports.unwrap()[0].container_port;
    assert_eq!(allowed, Some(IntOrString::Int(port)));
}
