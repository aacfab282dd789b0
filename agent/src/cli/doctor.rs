//! `ebb doctor`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::ViewFlags;
use crate::host::doctor::{self, Diagnosis, Where};

#[derive(Args)]
pub(super) struct Flags {
    /// Advise on this pod instead: its name, NAMESPACE/NAME or UID.
    pod: Option<String>,
    /// The host's root directory.
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// The container runtime's own socket, if it is not the one that the kubelet or the proxy uses.
    #[arg(long, env = "EBB_CRI_SOCKET", value_name = "SOCKET")]
    runtime: Option<PathBuf>,
    /// The proxy's socket, if `ebb install-cri` has not put it there.
    #[arg(long, env = "EBB_CRI_LISTEN", value_name = "SOCKET")]
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
    view: ViewFlags,
}

pub(super) async fn run(flags: &Flags) -> Result<()> {
    let at = Where {
        root: flags.root.clone(),
        runtime: flags.runtime.clone(),
        proxy: flags.proxy.clone(),
        cgroup_root: flags.cgroup_root.clone(),
    };
    let agent = flags.view.agent.client();
    let diagnosis = match &flags.pod {
        Some(pod) => doctor::advise(&at, &agent, pod).await?,
        None => doctor::node(&at, &agent).await,
    };
    flags.view.print(&diagnosis, Diagnosis::text)?;
    Ok(diagnosis.verdict()?)
}
