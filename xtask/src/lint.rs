//! `cargo xtask lint`: format, clippy, licences.

use anyhow::Result;

use crate::{
    licences,
    process::{cargo, run, say},
    setup,
};

/// Installs what is missing, then runs the checks. Stops at the first one that fails.
pub(crate) fn check() -> Result<()> {
    setup::ensure(setup::Needs::Demo)?;
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
