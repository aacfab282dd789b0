//! All checks and tests.

use anyhow::Result;
use clap::Args;

use crate::{
    dist, lint,
    process::{become_, cargo, say},
    setup,
};

/// What to test.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose names contain one of these, without the checks.
    filters: Vec<String>,
}

/// Sets up, checks, then becomes `cargo test`.
pub(crate) fn test(options: &Options) -> Result<()> {
    if options.filters.is_empty() {
        lint::check()?;
    }
    setup::for_tests::ensure()?;
    // The trial of deploy/daemonset.yaml runs it.
    dist::build(true)?;
    say("all tests: unit tests, and integration tests on the running kernel and a real containerd");
    let mut test = cargo();
    test.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    if !options.filters.is_empty() {
        test.arg("--").args(&options.filters);
    }
    become_(&mut test)
}
