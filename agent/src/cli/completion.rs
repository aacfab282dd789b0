//! `ebb completion`.

use anyhow::Result;
use clap::{Args, CommandFactory as _, ValueEnum};
use clap_complete::Shell;

use super::{Cli, output::print};

#[derive(Args)]
pub(super) struct CompletionFlags {
    /// The shell.
    #[arg(value_enum)]
    shell: SupportedShell,
}

#[derive(Clone, Copy, ValueEnum)]
enum SupportedShell {
    Bash,
    Zsh,
    Fish,
}

pub(super) fn run(flags: &CompletionFlags) -> Result<()> {
    let shell = match flags.shell {
        SupportedShell::Bash => Shell::Bash,
        SupportedShell::Zsh => Shell::Zsh,
        SupportedShell::Fish => Shell::Fish,
    };
    // Written to memory first: the generator panics if it can't write, as to a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ebb", &mut script);
    print(&String::from_utf8(script)?)
}
