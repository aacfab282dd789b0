//! `cargo xtask demo`: builds and runs the demo.

use std::path::{self, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::{
    process::{cargo, command, exec, run, say, target},
    setup,
};

/// How to show the demo.
#[derive(Args)]
pub(crate) struct DemoOptions {
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
    /// Instead, write pictures of what ebb shows on a terminal to this directory.
    #[arg(long, value_name = "DIR", conflicts_with = "json")]
    pictures: Option<PathBuf>,
}

/// Installs what is missing, builds, and replaces this process with the demo.
pub(crate) fn demo(options: &DemoOptions) -> Result<()> {
    setup::ensure(setup::Needs::Demo)?;
    say("building ebb and the demo");
    // Not optimised: that would take longer than the demo itself.
    run(cargo()
        .args(["build", "--locked", "--quiet"])
        .args(["--package", "ebb", "--package", "ebb-cri-proxy"])
        .args(["--package", "ebb-demo"]))?;
    let built = target().join("debug");
    let mut demo = command(built.join("ebb-demo"));
    demo.arg("--ebb").arg(built.join("ebb"));
    if options.json {
        demo.arg("--json");
    }
    if let Some(directory) = &options.pictures {
        demo.arg("--pictures").arg(path::absolute(directory)?);
    }
    exec(&mut demo)
}
