//! Keeps this crate free of I/O: each dependency must be in the list below.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeMap, process::Command};

/// All packages that this crate may be built from. They parse, format, derive or hold constants, and none opens a
/// file or a socket or waits. rustix wraps all system calls; its features limit it to the clock.
const ALLOWED: [&str; 16] = [
    "bitflags",
    "ebb-core",
    "humantime",
    "itoa",
    "linux-raw-sys",
    "proc-macro2",
    "quote",
    "rustix",
    "serde",
    "serde_core",
    "serde_derive",
    "strsim",
    "syn",
    "thiserror",
    "thiserror-impl",
    "unicode-ident",
];

/// Each package of the normal dependency tree, with its features. From `cargo tree`, which resolves features for this
/// crate alone; `cargo metadata` merges those of the whole workspace.
fn packages() -> BTreeMap<String, String> {
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--package", env!("CARGO_PKG_NAME")])
        .args(["--edges", "normal", "--prefix", "none"])
        .args(["--format", "{p}|{f}"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    let name_and_features = |line: &str| {
        let (package, features) = line.split_once('|')?;
        let name = package.split(' ').next()?;
        Some((name.to_owned(), features.to_owned()))
    };
    let text = String::from_utf8(out.stdout).unwrap();
    text.lines().filter_map(name_and_features).collect()
}

#[test]
fn no_dependency_can_reach_a_file_a_socket_or_a_runtime() {
    let packages = packages();
    assert!(packages.contains_key("ebb-core"), "{packages:?}");
    let unknown: Vec<_> = packages
        .keys()
        .filter(|name| !ALLOWED.contains(&name.as_str()))
        .collect();
    assert!(unknown.is_empty(), "not allowed here: {unknown:?}");
    // `alloc` comes with `std`.
    assert_eq!(packages["rustix"], "alloc,std,time");
}
