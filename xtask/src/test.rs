//! `cargo xtask test`: all checks and tests.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::{
    dist, lint,
    process::{cargo, exec, killed_with_parent, say},
    setup, vmtest,
};

/// Which tests to run.
#[derive(Args)]
pub(crate) struct TestOptions {
    /// Run only tests whose names contain one of these, without the checks.
    filters: Vec<String>,
}

/// Installs what is missing and runs the checks, the tests on this kernel, and those in virtual machines. With filters,
/// replaces this process with `cargo test`.
pub(crate) fn test(options: &TestOptions) -> Result<()> {
    if options.filters.is_empty() {
        lint::check()?;
    }
    setup::for_tests::ensure()?;
    // Builds the tests, too. The test of deploy/daemonset.yaml runs the image.
    dist::build(true)?;
    say("all tests: unit tests, and integration tests on the running kernel and a real containerd");
    let mut test = cargo();
    test.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    if !options.filters.is_empty() {
        return exec(test.arg("--").args(&options.filters));
    }
    let failures = run_suites(&mut killed_with_parent(&test))?;
    let in_guests = vmtest::vmtest(&vmtest::VmtestOptions::for_ci());
    if failures.is_empty() {
        return in_guests;
    }
    if let Err(error) = &in_guests {
        say(&format!("{error:#}"));
    }
    // Repeated at the end, because much other output has followed.
    say("failures on the running kernel:");
    eprintln!("{failures}");
    bail!("tests failed on the running kernel");
}

/// Runs `cargo test`, prints its output, and returns the parts of it about failed tests.
fn run_suites(test: &mut Command) -> Result<String> {
    let mut child = test
        .stdout(Stdio::piped())
        .spawn()
        .context("starting cargo test")?;
    let output = child.stdout.take().context("no standard output")?;
    let mut failures = String::new();
    let mut failing = false;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("reading cargo test's output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        failing |= line == "failures:";
        if failing {
            failures.push_str(&line);
            failures.push('\n');
        }
        failing &= !line.starts_with("test result:");
    }
    let status = child.wait().context("waiting for cargo test")?;
    if status.success() {
        return Ok(String::new());
    }
    ensure!(!failures.is_empty(), "cargo test failed: {status}");
    Ok(failures)
}
