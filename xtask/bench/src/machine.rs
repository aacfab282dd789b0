//! Facts about the machine, and CPU time.

use std::fs;

use anyhow::{Context as _, Result};
use ebb_testkit::sandbox::SandboxPaths;
use serde_json::{Value, json};

/// Cores, kernel and CPU.
pub(crate) fn facts() -> Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |rest| rest.trim_start_matches([' ', '\t', ':']));
    json!({
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "cpu": model,
    })
}

/// CPU time of all processes of the sandbox so far, user and system, in microseconds: the server, its clients and what
/// runs beside them. Other processes of the machine are not counted.
pub(crate) fn cpu_time_us(place: &SandboxPaths) -> Result<f64> {
    let path = place.cgroup("cpu.stat");
    let text =
        fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
    let usage = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .with_context(|| format!("{} has no usage", path.display()))?;
    Ok(usage.parse()?)
}
