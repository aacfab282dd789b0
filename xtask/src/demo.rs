//! The main job, shown on real input.

use anyhow::Result;
use clap::Args;

use crate::{
    process::{become_, cargo, command, run, say, target},
    setup,
};

/// How to show it.
#[derive(Args)]
pub(crate) struct Options {
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
}

/// Sets up, builds, then becomes the demo.
pub(crate) fn demo(options: &Options) -> Result<()> {
    setup::ensure()?;
    say("building ebb and the demo");
    run(cargo()
        .args(["build", "--release", "--locked", "--quiet"])
        .args(["--package", "ebb", "--package", "ebb-demo"]))?;
    let release = target().join("release");
    let mut demo = command(release.join("ebb-demo"));
    demo.arg("--ebb").arg(release.join("ebb"));
    if options.json {
        demo.arg("--json");
    }
    become_(&mut demo)
}
