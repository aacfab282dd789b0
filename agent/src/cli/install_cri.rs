//! `ebb install-cri`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::print;
use crate::host::install::{Wanted, prepare};

#[derive(Args)]
pub(super) struct Flags {
    /// The host's root directory. With any other than /, files are written and nothing is started.
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// The container runtime's own socket, if it is not the one that the kubelet uses now.
    #[arg(long, value_name = "SOCKET")]
    runtime: Option<PathBuf>,
    /// Point the kubelet at the proxy, too: write a drop-in into its --config-dir. It has to be restarted then.
    #[arg(long)]
    apply: bool,
    /// Say what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(flags: &Flags) -> Result<()> {
    let installation = prepare(&Wanted {
        root: flags.root.clone(),
        runtime: flags.runtime.clone(),
        apply: flags.apply,
    })?;
    let mut lines = installation.describe();
    if lines.is_empty() {
        lines.push("nothing to do: everything is as it should be".into());
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
