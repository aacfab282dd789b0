//! `ebb uninstall-cri`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::print;
use crate::host::install::{Removal, remove};

#[derive(Args)]
pub(super) struct Flags {
    /// The host's root directory.
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    /// Say what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do it although the kubelet uses the proxy. The node fails until the kubelet is pointed elsewhere.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(flags: &Flags) -> Result<()> {
    let mut lines = match remove(&flags.root, flags.dry_run, flags.force)? {
        Removal::Nothing => {
            vec!["nothing to do: `ebb install-cri` has installed nothing here".into()]
        }
        Removal::Done { lines, left } => {
            let left = left.iter().map(|path| {
                format!(
                    "note: {} was changed since, and is yours to remove",
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
