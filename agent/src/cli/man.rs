//! `ebb man`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _};
use clap_mangen::Man;

use super::{Cli, output::print};

#[derive(Args)]
pub(super) struct ManFlags {
    /// Write the manual page of ebb and of each command to this directory, as ebb.1, ebb-pods.1 and so on.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn run(flags: &ManFlags) -> Result<()> {
    let mut ebb = Cli::command();
    // Gives each command its whole name, such as `ebb pods`.
    ebb.build();
    let Some(directory) = &flags.out else {
        return print(&String::from_utf8(page(&Man::new(ebb))?)?);
    };
    fs::create_dir_all(directory).with_context(|| format!("can't make {}", directory.display()))?;
    for verb in ebb.get_subcommands() {
        let name = format!("ebb-{}", verb.get_name());
        let man = Man::new(verb.clone()).title(name.clone());
        write(directory, &name, page(&man)?)?;
    }
    write(directory, "ebb", page(&Man::new(ebb))?)
}

fn page(man: &Man) -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    man.render(&mut page)?;
    Ok(page)
}

fn write(directory: &Path, name: &str, page: Vec<u8>) -> Result<()> {
    let path = directory.join(format!("{name}.1"));
    fs::write(&path, page).with_context(|| format!("can't write {}", path.display()))
}
