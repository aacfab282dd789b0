//! The files of `deploy/`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, PodSpec},
};
use serde_json::Value;

use crate::strict::strictly;

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub(crate) fn read(path: &str) -> String {
    let path = repository().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The documents of a YAML file.
pub(crate) fn documents(path: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The YAML files below a directory of the repository, by their paths in it.
pub(crate) fn yaml_files(directory: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(repository().join(directory)).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{directory}/{}", entry.file_name().into_string().unwrap());
        if entry.file_type().unwrap().is_dir() {
            found.extend(yaml_files(&path));
        } else if path.ends_with(".yaml") {
            found.push(path);
        }
    }
    found.sort();
    found
}

pub(crate) fn daemonset() -> DaemonSet {
    strictly(&documents("deploy/daemonset.yaml")[0]).unwrap()
}

/// The pod of the DaemonSet.
pub(crate) fn agent_pod() -> PodSpec {
    daemonset().spec.unwrap().template.spec.unwrap()
}

pub(crate) fn agent_container() -> Container {
    let pod = agent_pod();
    assert_eq!(pod.containers.len(), 1);
    pod.containers.into_iter().next().unwrap()
}
