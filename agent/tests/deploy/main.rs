//! `deploy/` and README.md agree with the code. These tests need no cluster.

#![expect(clippy::unwrap_used, reason = "tests")]

mod daemonset;
mod examples;
mod kustomize;
mod manifest;
mod metrics;
mod monitoring;
mod rbac;
mod readme;
mod schema;
mod strict;
mod units;

use clap::CommandFactory as _;
use ebb::cli::Cli;

/// The default of a flag of a verb of `ebb`, as `--help` shows it.
pub(crate) fn default(verb: &str, flag: &str) -> String {
    let command = Cli::command();
    default_of(command.find_subcommand(verb).unwrap(), flag)
}

/// The default of a flag of this command.
pub(crate) fn default_of(command: &clap::Command, flag: &str) -> String {
    let mut args = command.get_arguments();
    let arg = args.find(|a| a.get_long() == Some(flag));
    let arg = arg.unwrap_or_else(|| panic!("no flag --{flag}"));
    let values: Vec<_> = arg.get_default_values().iter().collect();
    values
        .iter()
        .map(|v| v.to_str().unwrap())
        .collect::<Vec<_>>()
        .join(",")
}
