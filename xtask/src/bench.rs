//! What ebb costs, measured.

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::{
    process::{become_, cargo, command, run, say, target},
    setup,
};

/// What to measure.
#[derive(Args)]
pub(crate) struct Options {
    what: What,
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
    /// Three pairs instead of eleven, and less of everything: whether it can be measured, not what it is.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Tracking connections, listing and releasing.
    Flows,
    /// The CRI proxy.
    Cri,
}

/// Sets up, builds, then becomes the bench.
pub(crate) fn bench(options: &Options) -> Result<()> {
    setup::ensure()?;
    say("building ebb and the bench");
    run(cargo()
        .args(["build", "--release", "--locked", "--quiet"])
        .args(["--package", "ebb", "--package", "ebb-bench"]))?;
    let release = target().join("release");
    let mut bench = command(release.join("ebb-bench"));
    bench.arg(match options.what {
        What::Flows => "flows",
        What::Cri => "cri",
    });
    bench.arg("--ebb").arg(release.join("ebb"));
    for (flag, set) in [("--json", options.json), ("--quick", options.quick)] {
        if set {
            bench.arg(flag);
        }
    }
    become_(&mut bench)
}
