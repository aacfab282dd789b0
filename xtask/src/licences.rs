//! Checks that every dependency comes from a registry and has an allowed licence, as `cargo deny check licenses sources`
//! does, but offline and without another tool.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process::{cargo, command, output};

/// SPDX ids of licences that require no more than a notice.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Fails with a list of the packages that break a rule.
pub(crate) fn check() -> Result<()> {
    // Only what is compiled on this platform. It is downloaded already, so this needs no network.
    let metadata = output(
        cargo()
            .args(["metadata", "--format-version=1", "--locked"])
            .args(["--filter-platform", &host()?]),
    )?;
    let metadata: Value = serde_json::from_str(&metadata).context("reading cargo metadata")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata has no packages")?;
    let bad: Vec<String> = packages.iter().filter_map(problem).collect();
    if bad.is_empty() {
        return Ok(());
    }
    bail!(
        "dependencies to replace, or to allow in xtask/src/licences.rs:\n  {}",
        bad.join("\n  ")
    )
}

/// The host platform, such as `x86_64-unknown-linux-gnu`.
fn host() -> Result<String> {
    let version = output(command("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

fn problem(package: &Value) -> Option<String> {
    let name = package["name"].as_str().unwrap_or("?");
    // Packages of this workspace have no source.
    let source = package["source"].as_str()?;
    if !source.starts_with("registry+") {
        return Some(format!("{name}: comes from {source}, not from a registry"));
    }
    let licence = package["license"].as_str().unwrap_or("none");
    (!is_allowed(licence)).then(|| format!("{name}: licence {licence}"))
}

/// Whether [`ALLOWED`] satisfies an SPDX expression: one side of each `OR`, both sides of each `AND`. `AND` outside
/// parentheses is split first.
fn is_allowed(expression: &str) -> bool {
    let e = expression.trim();
    if let Some(parts) = split_outside(e, " AND ") {
        return parts.iter().all(|p| is_allowed(p));
    }
    if let Some(parts) = split_outside(e, " OR ").or_else(|| split_outside(e, "/")) {
        return parts.iter().any(|p| is_allowed(p));
    }
    if let Some(inner) = e.strip_prefix('(').and_then(|e| e.strip_suffix(')')) {
        return is_allowed(inner);
    }
    ALLOWED.contains(&e)
}

/// Splits at `separator` outside parentheses; `None` where it does not occur.
fn split_outside<'a>(e: &'a str, separator: &str) -> Option<Vec<&'a str>> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (i, c) in e.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && i >= start && e[i..].starts_with(separator) => {
                parts.push(&e[start..i]);
                start = i + separator.len();
            }
            _ => {}
        }
    }
    (!parts.is_empty()).then(|| {
        parts.push(&e[start..]);
        parts
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_or_needs_one_allowed_side_and_an_and_both() {
        assert!(is_allowed("MIT OR GPL-3.0-only"));
        assert!(is_allowed("MIT/Apache-2.0"));
        assert!(is_allowed("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(!is_allowed("MIT AND GPL-3.0-only"));
        assert!(!is_allowed("GPL-3.0-only"));
        assert!(!is_allowed("none"));
    }

    #[test]
    fn a_package_that_is_not_from_a_registry_is_reported() {
        let package = serde_json::json!({"name": "x", "source": "git+https://x", "license": "MIT"});
        assert!(problem(&package).is_some_and(|p| p.contains("x: comes from git")));
        let own = serde_json::json!({"name": "x", "source": null, "license": null});
        assert_eq!(problem(&own), None);
    }
}
