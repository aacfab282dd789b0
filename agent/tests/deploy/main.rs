//! `deploy/` and README.md say what the code does. No cluster is asked.

#![expect(clippy::unwrap_used, reason = "tests")]

mod daemonset;
mod examples;
mod kustomize;
mod manifest;
mod rbac;
mod readme;
mod strict;
mod units;

use clap::CommandFactory as _;
use ebb::cli::Cli;

/// The default of a flag, as `--help` has it.
pub(crate) fn default(verb: &str, flag: &str) -> String {
    let command = Cli::command();
    let verb = command.find_subcommand(verb).unwrap();
    let mut args = verb.get_arguments();
    let arg = args.find(|a| a.get_long() == Some(flag));
    let arg = arg.unwrap_or_else(|| panic!("no flag --{flag}"));
    let values: Vec<_> = arg.get_default_values().iter().collect();
    values
        .iter()
        .map(|v| v.to_str().unwrap())
        .collect::<Vec<_>>()
        .join(",")
}
