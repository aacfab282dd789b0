//! The RPCs of the CRI, from its protocol file.

use std::{collections::BTreeSet, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::script;

/// Fails if the script leaves out an RPC.
pub(crate) fn is_covered() -> Result<()> {
    let methods = methods()?;
    ensure!(
        methods.len() >= 34 && methods.contains("/runtime.v1.ImageService/PullImage"),
        "not the CRI: {methods:?}"
    );
    let script: BTreeSet<String> = script::script()?.into_iter().map(|s| s.method).collect();
    let left_out: Vec<_> = methods.difference(&script).collect();
    ensure!(left_out.is_empty(), "left out: {left_out:?}");
    let beyond = script.difference(&methods).count();
    ensure!(beyond >= 10, "no newer or no unknown methods");
    Ok(())
}

/// All methods, as gRPC paths.
fn methods() -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(file()?)?;
    let mut methods = BTreeSet::new();
    let mut service = None;
    for line in text.lines().map(str::trim) {
        let mut words = line.split([' ', '(']);
        match words.next() {
            Some("service") => service = words.next(),
            Some("rpc") => {
                let service = service.context("an rpc outside of a service")?;
                let method = words.next().context("an rpc without a name")?;
                methods.insert(format!("/runtime.v1.{service}/{method}"));
            }
            _ => {}
        }
    }
    Ok(methods)
}

/// The file that the CRI client of these tests is generated from.
fn file() -> Result<std::path::PathBuf> {
    let out = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        // Packages for other platforms may not have been fetched.
        .arg(format!(
            "--filter-platform={}-unknown-linux-gnu",
            std::env::consts::ARCH
        ))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .context("starting cargo")?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let metadata: Value = serde_json::from_slice(&out.stdout)?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let package = packages.iter().find(|p| p["name"] == "k8s-cri");
    let manifest = package.and_then(|p| p["manifest_path"].as_str());
    let manifest = Path::new(manifest.context("no package k8s-cri")?);
    Ok(manifest.with_file_name("proto").join("v1.proto"))
}
