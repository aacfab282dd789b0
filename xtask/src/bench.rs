//! `cargo xtask bench`: builds and runs the bench.

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::{
    process::{cargo, command, exec, run, say, target},
    setup,
};

/// What to measure.
#[derive(Args)]
pub(crate) struct BenchOptions {
    what: BenchKind,
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
    /// One pair instead of eleven, and less of everything: a test of the bench, not a measurement.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum BenchKind {
    /// Tracking connections, listing and releasing.
    Flows,
    /// The CRI proxy.
    Cri,
}

/// Installs what is missing, builds, and replaces this process with the bench.
pub(crate) fn bench(options: &BenchOptions) -> Result<()> {
    setup::ensure(setup::Needs::All)?;
    say("building ebb and the bench");
    run(cargo()
        .args(["build", "--release", "--locked", "--quiet"])
        .args(["--package", "ebb", "--package", "ebb-cri-proxy"])
        .args(["--package", "ebb-bench"]))?;
    let release = target().join("release");
    let mut bench = command(release.join("ebb-bench"));
    bench.arg(match options.what {
        BenchKind::Flows => "flows",
        BenchKind::Cri => "cri",
    });
    bench.arg("--ebb").arg(release.join("ebb"));
    for (flag, set) in [("--json", options.json), ("--quick", options.quick)] {
        if set {
            bench.arg(flag);
        }
    }
    exec(&mut bench)
}
