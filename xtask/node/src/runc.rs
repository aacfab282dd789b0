//! The wrapper around runc for machines whose cgroup2 has no cpu controller.
//!
//! CRI pods always ask for cpu shares, and runc fails on a `cpu.weight` that does not exist. Where the
//! controllers are bound to cgroup v1 the wrapper takes all resource limits out of a container's
//! configuration before runc reads it. The container still gets its own cgroup. Which devices it may use stays as it
//! is: that needs no controller, and a privileged container could not even open /dev/null.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use serde_json::Value;

/// Name of the link to the real runc, beside the wrapper.
pub(crate) const REAL: &str = "runc";

/// Passes its arguments on to the real runc. Returns only if that can't be started.
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
