//! The wrapper around runc for machines whose cgroup2 has no cpu controller.
//!
//! CRI pods always have cpu shares, and runc fails if `cpu.weight` does not exist. If the controllers are bound to
//! cgroup v1, the wrapper removes all resource limits from a container's configuration before runc reads it. The
//! container still gets its own cgroup. The device rules stay, because they need no controller, and without them even
//! a privileged container could not open /dev/null.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use serde_json::Value;

/// Name of the link to the real runc, in the wrapper's directory.
pub(crate) const REAL: &str = "runc";

/// Executes the real runc with the same arguments. Returns only if that fails.
pub(crate) fn main() -> Result<ExitCode> {
    let mut args = env::args_os();
    let me = PathBuf::from(args.next().context("started without a name")?);
    let args: Vec<OsString> = args.collect();
    if args.iter().any(|arg| arg == "create") {
        let bundle = args
            .iter()
            .position(|arg| arg == "--bundle" || arg == "-b")
            .and_then(|at| args.get(at + 1))
            .context("`create` without --bundle")?;
        drop_resources(&Path::new(bundle).join("config.json"))?;
    }
    let real = me.with_file_name(REAL);
    let error = Command::new(&real).args(&args).exec();
    Err(error).with_context(|| format!("can't start {}", real.display()))
}

fn drop_resources(config: &Path) -> Result<()> {
    let text = fs::read(config).with_context(|| format!("can't read {}", config.display()))?;
    let mut spec: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not JSON", config.display()))?;
    if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
        let resources = linux.remove("resources");
        if let Some(devices) = resources.and_then(|r| r.get("devices").cloned()) {
            linux.insert(
                "resources".into(),
                serde_json::json!({ "devices": devices }),
            );
        }
    }
    fs::write(config, serde_json::to_vec(&spec)?)
        .with_context(|| format!("can't write {}", config.display()))
}
