//! `ebb doctor`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use ebb_core::socket_path;

use super::output::ViewFlags;
use crate::host::doctor::{self, DoctorOptions};

/// The legend of the table.
pub(super) const LEGEND: &str = "\
Results:
  ok    no problem
  ?     it depends on something that ebb can't see
  warn  it limits ebb, or costs requests or time
  FAIL  ebb, or its hold, can't work; the exit status is 11
Below a result: why it matters (why:), and what helps (change:).

Of a pod, ebb checks how each container ends on its stop signal, by the program behind its main process;
inits and shells are followed to their children. It checks preStop hooks, and whether the pod's connections
fit its policy. docs/images.md has the programs and signals that ebb knows.";

#[derive(Args)]
pub(super) struct DoctorFlags {
    /// Check this pod instead of the node: its name, NAMESPACE/NAME or UID.
    pub(super) pod: Option<String>,
    /// The host's root directory. Without this flag, the root of the host's first process, which ebb also sees from
    /// a container with the host's processes, as in the DaemonSet.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The container runtime's own socket, if it is not the one that the kubelet or the proxy uses.
    #[arg(long, env = "EBB_CRI_SOCKET", value_name = "SOCKET", value_parser = socket_path::parse)]
    runtime: Option<PathBuf>,
    /// The proxy's socket, if it is not the one that `ebb install-cri` sets up.
    #[arg(long, env = "EBB_CRI_LISTEN", value_name = "SOCKET", value_parser = socket_path::parse)]
    proxy: Option<PathBuf>,
    /// The mount of cgroup v2.
    #[arg(
        long,
        env = "EBB_CGROUP_ROOT",
        default_value = "/sys/fs/cgroup",
        value_name = "DIR"
    )]
    cgroup_root: PathBuf,
    #[command(flatten)]
    pub(super) view: ViewFlags,
}

pub(super) async fn run(flags: &DoctorFlags) -> Result<()> {
    let at = DoctorOptions {
        root: flags.root.clone().unwrap_or_else(doctor::host_root),
        runtime: flags.runtime.clone(),
        proxy: flags.proxy.clone(),
        cgroup_root: flags.cgroup_root.clone(),
    };
    let agent = flags.view.agent.client();
    let diagnosis = match &flags.pod {
        Some(pod) => doctor::advise(&at, &agent, &flags.view.scope.pod(pod)?).await?,
        None => doctor::node(&at, &agent).await,
    };
    flags.view.print(&diagnosis)?;
    Ok(doctor::verdict(&diagnosis)?)
}
