//! `cargo xtask`: the repository's tasks besides `cargo build`.

mod bench;
mod demo;
mod dist;
mod licences;
mod lint;
mod preflight;
mod process;
mod setup;
mod test;
mod vmtest;

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
struct XtaskArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what is missing to build and test ebb, naming it first.
    Setup,
    /// Show the main job on a real containerd: a pod stopped without ebb and with it.
    Demo(demo::DemoOptions),
    /// Measure what ebb costs, each value beside its baseline of the same run.
    Bench(bench::BenchOptions),
    /// Run all checks and tests. Takes test name filters.
    Test(test::TestOptions),
    /// Run the tests that depend on the kernel on other kernels, in virtual machines. Takes test name filters.
    Vmtest(vmtest::VmtestOptions),
    /// Build the static binaries and the image with them.
    Dist(dist::DistOptions),
    /// Check format, clippy and licences.
    Lint,
}

fn main() -> ExitCode {
    let result = match XtaskArgs::parse().verb {
        Verb::Setup => setup::for_tests::ensure(),
        Verb::Demo(options) => demo::demo(&options),
        Verb::Bench(options) => bench::bench(&options),
        Verb::Test(options) => test::test(&options),
        Verb::Vmtest(options) => vmtest::vmtest(&options),
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
