//! The proxy has few dependencies, because it runs as root between kubelet and runtime, and an update of kube or aya
//! must not change it.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeSet, process::Command};

/// The most packages that the proxy may be built from, including its own.
const MOST: usize = 110;

/// All packages of the normal dependency tree, each as `name version`. From `cargo tree`, which resolves features for
/// this package alone; `cargo metadata` merges those of the whole workspace.
fn packages() -> BTreeSet<String> {
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--package", env!("CARGO_PKG_NAME")])
        .args(["--edges", "normal", "--prefix", "none", "--format", "{p}"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    let text = String::from_utf8(out.stdout).unwrap();
    let name_and_version = |line: &str| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    text.lines().map(name_and_version).collect()
}

#[test]
fn it_is_built_from_few_packages_without_kube_and_aya() {
    let packages = packages();
    assert!(packages.len() <= MOST, "{}: {packages:#?}", packages.len());
    let is_foreign = |package: &&String| {
        let name = package.split(' ').next().unwrap_or_default();
        let family = name.split('-').next().unwrap_or_default();
        ["kube", "k8s", "aya", "axum", "tonic", "regex"].contains(&family)
    };
    let foreign: Vec<_> = packages.iter().filter(is_foreign).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}

#[test]
fn of_ebbs_crates_it_needs_core_and_protocol_only() {
    let packages = packages();
    let ours: Vec<_> = packages
        .iter()
        .filter_map(|package| package.split(' ').next())
        .filter(|name| *name == "ebb" || name.starts_with("ebb-"))
        .collect();
    assert_eq!(ours, ["ebb-core", "ebb-cri-proxy", "ebb-protocol"]);
}
