//! The programs that run in a guest, and their command lines.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::image;
use crate::process::{cargo, command, output, run};

/// Paths of the programs that cargo built.
pub(super) struct GuestPrograms {
    pub(super) flows: PathBuf,
    pub(super) ebb: PathBuf,
}

impl GuestPrograms {
    /// Builds both with the features and the profile of `cargo xtask test`, so that cargo builds nothing twice.
    pub(super) fn build() -> Result<Self> {
        let messages = output(cargo().args([
            "test",
            "--workspace",
            "--test=flows",
            "--no-run",
            "--locked",
            "--quiet",
            "--message-format=json-render-diagnostics",
        ]))?;
        let executable = |kind: &str, name: &str| {
            find(&messages, kind, name).with_context(|| format!("cargo built no {kind} {name}"))
        };
        Ok(Self {
            flows: stripped(&executable("test", "flows")?)?,
            ebb: stripped(&executable("bin", "ebb")?)?,
        })
    }

    /// The shell command that runs the tests whose names contain one of `only` (all, if it is empty) and none of `skip`.
    ///
    /// # Errors
    /// If a filter matches no test.
    pub(super) fn suite_command(
        &self,
        only: &[String],
        skip: &[String],
        slow: u32,
    ) -> Result<String> {
        let list = output(Command::new(&self.flows).arg("--list"))?;
        let names: Vec<&str> = list
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .collect();
        let skipped = skipped(&names, only, skip)?;
        ensure!(skipped.len() < names.len(), "no test is left to run");
        // The test program takes only one filter, but any number of `--skip`.
        let skipped: String = skipped
            .iter()
            .map(|name| format!(" --skip {name}"))
            .collect();
        Ok(format!(
            "{} EBB_TEST_SLOW={slow} exec {} --color never --exact{skipped}",
            image::parts_variable(),
            image::path(&self.flows)?,
        ))
    }

    /// The shell command that starts the agent.
    pub(super) fn agent_command(&self) -> Result<String> {
        Ok(format!("exec {} agent", image::path(&self.ebb)?))
    }
}

/// Copies a program without debug information, which is nine tenths of a test program's size.
fn stripped(program: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program without a name")?;
    let copy = super::directory()?.join(name);
    run(command("strip")
        .arg("--strip-debug")
        .arg("-o")
        .arg(&copy)
        .arg(program))?;
    Ok(copy)
}

/// The names that contain one of `skip`, or none of `only` if `only` is not empty.
fn skipped<'a>(names: &[&'a str], only: &[String], skip: &[String]) -> Result<Vec<&'a str>> {
    for filter in only.iter().chain(skip) {
        let matches = names.iter().any(|name| name.contains(filter));
        ensure!(matches, "no test's name contains {filter:?}");
    }
    let contains = |name: &str, filters: &[String]| filters.iter().any(|f| name.contains(f));
    let is_skipped =
        |name: &&str| (!only.is_empty() && !contains(name, only)) || contains(name, skip);
    Ok(names.iter().copied().filter(is_skipped).collect())
}

/// The path of an executable in cargo's messages (doc.rust-lang.org/cargo/reference/external-tools.html).
fn find(messages: &str, kind: &str, name: &str) -> Option<PathBuf> {
    messages.lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let target = &message["target"];
        let is_kind = target["kind"].as_array()?.iter().any(|k| k == kind);
        let path = message["executable"].as_str()?;
        (is_kind && target["name"] == name).then(|| path.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped_of(only: &[&str], skip: &[&str]) -> Option<Vec<&'static str>> {
        let [only, skip] =
            [only, skip].map(|f| f.iter().map(|f| (*f).to_owned()).collect::<Vec<_>>());
        skipped(&["open", "open_thousands", "close"], &only, &skip).ok()
    }

    #[test]
    fn filters_match_parts_of_names() {
        assert_eq!(skipped_of(&[], &[]), Some(vec![]));
        assert_eq!(skipped_of(&["open"], &[]), Some(vec!["close"]));
        assert_eq!(skipped_of(&[], &["thousand"]), Some(vec!["open_thousands"]));
        let both = skipped_of(&["open"], &["thousand"]);
        assert_eq!(both, Some(vec!["open_thousands", "close"]));
    }

    #[test]
    fn a_filter_that_matches_no_test_is_an_error() {
        assert_eq!(skipped_of(&["half-open"], &[]), None);
        assert_eq!(skipped_of(&[], &["milion"]), None);
    }
}
