//! Strict parsing: each document is parsed into the API's own type and serialised again. A field that the API does not
//! have, such as a misspelt one, is then missing.
//!
//! The types of Kubernetes' own kinds come from `k8s-openapi`. No crate has those of kustomize and of the Prometheus
//! operator, so this file declares the few fields in use, and refuses any other.

use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment, StatefulSet},
        core::v1::{ConfigMap, Namespace, ResourceQuota, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Parses a document, and fails if the API does not have one of its fields.
pub(crate) fn strictly<T: Serialize + DeserializeOwned>(document: &Value) -> Result<T, String> {
    let typed: T = serde_json::from_value(document.clone()).map_err(|e| e.to_string())?;
    let again = serde_json::to_value(&typed).map_err(|e| e.to_string())?;
    let mut lost = Vec::new();
    difference("", document, &again, &mut lost);
    if lost.is_empty() {
        Ok(typed)
    } else {
        Err(format!("not in the API: {}", lost.join(", ")))
    }
}

/// Collects the paths at which `again` differs from `document`.
fn difference(path: &str, document: &Value, again: &Value, lost: &mut Vec<String>) {
    match (document, again) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                let path = format!("{path}.{key}");
                match b.get(key) {
                    Some(other) => difference(&path, value, other, lost),
                    None => lost.push(path),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                difference(&format!("{path}[{i}]"), a, b, lost);
            }
        }
        _ if document != again => lost.push(format!("{path} ({document} became {again})")),
        _ => {}
    }
}

/// Checks that the API has every field of a document.
pub(crate) fn check(document: &Value) -> Result<(), String> {
    match (document["apiVersion"].as_str(), document["kind"].as_str()) {
        (Some("v1"), Some("Namespace")) => strictly::<Namespace>(document).map(drop),
        (Some("v1"), Some("ResourceQuota")) => strictly::<ResourceQuota>(document).map(drop),
        (Some("v1"), Some("Service")) => strictly::<Service>(document).map(drop),
        (Some("v1"), Some("ServiceAccount")) => strictly::<ServiceAccount>(document).map(drop),
        (Some(RBAC), Some("ClusterRole")) => strictly::<ClusterRole>(document).map(drop),
        (Some(RBAC), Some("ClusterRoleBinding")) => {
            strictly::<ClusterRoleBinding>(document).map(drop)
        }
        (Some("apps/v1"), Some("DaemonSet")) => strictly::<DaemonSet>(document).map(drop),
        (Some("apps/v1"), Some("Deployment")) => strictly::<Deployment>(document).map(drop),
        (Some("apps/v1"), Some("StatefulSet")) => strictly::<StatefulSet>(document).map(drop),
        (Some("networking.k8s.io/v1"), Some("NetworkPolicy")) => {
            strictly::<NetworkPolicy>(document).map(drop)
        }
        (Some("policy/v1"), Some("PodDisruptionBudget")) => {
            strictly::<PodDisruptionBudget>(document).map(drop)
        }
        (Some("kustomize.config.k8s.io/v1beta1"), Some("Kustomization"))
        | (Some("kustomize.config.k8s.io/v1alpha1"), Some("Component")) => {
            strictly::<Kustomization>(document).map(drop)
        }
        (Some("monitoring.coreos.com/v1"), Some("PodMonitor")) => {
            strictly::<PodMonitor>(document).map(drop)
        }
        (Some("monitoring.coreos.com/v1"), Some("PrometheusRule")) => {
            strictly::<PrometheusRule>(document).map(drop)
        }
        (Some("v1"), Some("ConfigMap")) => strictly::<ConfigMap>(document).map(drop),
        (version, kind) => Err(format!("no type for kind {kind:?} of {version:?}")),
    }
}

const RBAC: &str = "rbac.authorization.k8s.io/v1";

/// A Kustomization or a Component, which have the same fields.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Kustomization {
    api_version: String,
    pub(crate) kind: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) resources: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) components: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) images: Vec<Image>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) patches: Vec<Patch>,
}

/// The registry name and tag that replace an image's name.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) new_name: String,
    pub(crate) new_tag: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Patch {
    pub(crate) target: Target,
    /// A JSON patch, as YAML.
    pub(crate) patch: String,
}

/// The object that a patch changes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Target {
    pub(crate) kind: String,
    pub(crate) name: String,
}

/// A kind of the Prometheus operator.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PodMonitor {
    api_version: String,
    kind: String,
    pub(crate) metadata: ObjectMeta,
    pub(crate) spec: PodMonitorSpec,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PodMonitorSpec {
    pub(crate) selector: LabelSelector,
    pub(crate) pod_metrics_endpoints: Vec<PodMetricsEndpoint>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PodMetricsEndpoint {
    pub(crate) port: String,
    pub(crate) path: String,
    interval: String,
    pub(crate) honor_labels: bool,
    relabelings: Vec<Relabeling>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Relabeling {
    source_labels: Vec<String>,
    target_label: String,
}

/// A kind of the Prometheus operator. `promtool` checks the rules themselves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PrometheusRule {
    api_version: String,
    kind: String,
    pub(crate) metadata: ObjectMeta,
    pub(crate) spec: Value,
}

#[test]
fn a_misspelt_field_is_found() {
    let mut document = crate::manifest::documents("deploy/daemonset.yaml").remove(0);
    let pod = document.pointer_mut("/spec/template/spec").unwrap();
    let pod = pod.as_object_mut().unwrap();
    let host_pid = pod.remove("hostPID").unwrap();
    pod.insert("hostPid".into(), host_pid);
    let error = check(&document).unwrap_err();
    assert_eq!(error, "not in the API: .spec.template.spec.hostPid");

    let mut document = crate::manifest::documents("deploy/kustomization.yaml").remove(0);
    document["resource"] = document["resources"].clone();
    let error = check(&document).unwrap_err();
    assert!(error.contains("unknown field `resource`"), "{error}");
}
