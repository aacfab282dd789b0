//! Format, clippy, licences.

use anyhow::Result;

use crate::{
    licences,
    process::{cargo, run, say},
    setup,
};

/// Sets up, then checks; fails on the first check that does.
pub(crate) fn check() -> Result<()> {
    setup::ensure()?;
    say("checking the format");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    say("clippy, without warnings");
    run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--quiet",
        "--",
        "--deny=warnings",
    ]))?;
    say("licences and sources of all dependencies");
    licences::check()
}
