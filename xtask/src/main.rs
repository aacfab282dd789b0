//! `cargo xtask`: everything one does with this repository besides `cargo build`.

mod bench;
mod demo;
mod dist;
mod licences;
mod lint;
mod preflight;
mod process;
mod setup;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set up, try and test ebb.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what is missing to build and test ebb; say what before doing it.
    Setup,
    /// Show the main job on a real containerd: a pod stopped without ebb and with it.
    Demo(demo::Options),
    /// Measure what ebb costs, each figure beside its baseline of the same run.
    Bench(bench::Options),
    /// Pass all checks and tests. Takes test name filters.
    Test(test::Options),
    /// Build the static binary and the image around it.
    Dist(dist::Options),
    /// Check format, clippy and licences.
    Lint,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Setup => setup::for_tests::ensure(),
        Verb::Demo(options) => demo::demo(&options),
        Verb::Bench(options) => bench::bench(&options),
        Verb::Test(options) => test::test(&options),
        Verb::Dist(options) => dist::dist(&options),
        Verb::Lint => lint::check(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            preflight::exit_code(&e)
        }
    }
}
