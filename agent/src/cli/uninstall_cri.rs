//! `ebb uninstall-cri`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::print;
use crate::host::install::{Removal, remove};

#[derive(Args)]
pub(super) struct UninstallCriFlags {
    /// The host's root directory.
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Uninstall although the kubelet uses the proxy. The node fails until the kubelet uses the runtime's socket again.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(flags: &UninstallCriFlags) -> Result<()> {
    let mut lines = match remove(&flags.root, flags.dry_run, flags.force)? {
        Removal::Nothing => {
            vec!["nothing to do: `ebb install-cri` has installed nothing here".into()]
        }
        Removal::Done { lines, left } => {
            let left = left.iter().map(|path| {
                format!(
                    "note: {} was changed since `ebb install-cri` wrote it, so ebb keeps it: remove it by hand",
                    path.display()
                )
            });
            lines.into_iter().chain(left).collect()
        }
    };
    if flags.dry_run {
        lines.push("nothing was changed (--dry-run)".into());
    }
    print(&(lines.join("\n") + "\n"))
}
