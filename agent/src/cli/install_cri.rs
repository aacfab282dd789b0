//! `ebb install-cri`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use ebb_core::socket_path;

use super::print;
use crate::host::install::{InstallOptions, prepare};

#[derive(Args)]
pub(super) struct InstallCriFlags {
    /// The host's root directory. With any other than /, files are written and nothing is started.
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// The container runtime's own socket, if it is not the one that the kubelet uses now.
    #[arg(long, value_name = "SOCKET", value_parser = socket_path::parse)]
    runtime: Option<PathBuf>,
    /// Also point the kubelet at the proxy, with a drop-in in its --config-dir. Restart the kubelet afterwards.
    #[arg(long)]
    apply: bool,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(flags: &InstallCriFlags) -> Result<()> {
    let mut installation = prepare(&InstallOptions {
        root: flags.root.clone(),
        runtime: flags.runtime.clone(),
        apply: flags.apply,
    })?;
    installation.check_runtime().await?;
    let mut lines = installation.describe();
    if lines.is_empty() {
        lines.push("nothing to do: everything is installed already".into());
    }
    if !flags.dry_run {
        installation.carry_out().await?;
    }
    let notes = installation
        .notes
        .iter()
        .map(|note| format!("note: {note}"));
    lines.extend(notes);
    if flags.dry_run {
        lines.push("nothing was changed (--dry-run)".into());
    }
    print(&(lines.join("\n") + "\n"))
}
