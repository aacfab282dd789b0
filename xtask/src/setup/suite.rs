//! Packages of another Debian suite than the machine's. They are unpacked, never installed.
//!
//! Each suite has its own apt lists, sources and cache, so that the machine's apt configuration stays as it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::apt_get;
use crate::process::{command, output, run};

/// A suite's package index, in a directory that [`DebianSuite::unpack`] removes.
pub(crate) struct DebianSuite {
    name: String,
    directory: PathBuf,
}

impl DebianSuite {
    /// Reads the suite's index into a directory below `parts`.
    ///
    /// # Errors
    /// If the index can't be read or verified.
    pub(crate) fn open(parts: &Path, name: &str) -> Result<Self> {
        let suite = Self {
            name: name.to_owned(),
            directory: parts.join(format!("apt-{name}")),
        };
        let _ = fs::remove_dir_all(&suite.directory);
        fs::create_dir_all(suite.directory.join("lists/partial"))?;
        fs::create_dir_all(suite.directory.join("cache/archives/partial"))?;
        fs::write(
            suite.directory.join("debian.sources"),
            format!(
                "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: {name}\nComponents: main\n\
                 Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
            ),
        )
        .context("writing apt's sources")?;
        run(suite
            .configured(apt_get())
            .args(["update", "--error-on=any"]))
        .with_context(|| format!("reading the index of Debian {name}"))?;
        Ok(suite)
    }

    /// The direct dependencies of `package`.
    ///
    /// # Errors
    /// If the suite has no such package.
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let text = output(
            self.configured(command("apt-cache"))
                .args(["depends", package]),
        )?;
        let dependencies: Vec<String> = text
            .lines()
            .filter_map(|line| {
                line.trim_start_matches([' ', '|'])
                    .strip_prefix("Depends: ")
            })
            .map(str::to_owned)
            .collect();
        ensure!(
            !dependencies.is_empty(),
            "Debian {} has no {package}",
            self.name
        );
        Ok(dependencies)
    }

    /// Unpacks packages into `home` and removes the index. `home` exists only if it is complete.
    ///
    /// # Errors
    /// If the suite lacks a package, or one can't be fetched or unpacked.
    pub(crate) fn unpack(self, packages: &[String], home: &Path) -> Result<()> {
        let packages = packages.iter().map(|p| format!("{p}/{}", self.name));
        run(self.configured(apt_get()).arg("download").args(packages))?;
        let unpacked = self.directory.join("unpacked");
        for entry in fs::read_dir(&self.directory)?.flatten() {
            if entry.path().extension().is_some_and(|e| e == "deb") {
                run(command("dpkg-deb")
                    .arg("-x")
                    .arg(entry.path())
                    .arg(&unpacked))?;
            }
        }
        let _ = fs::remove_dir_all(home);
        fs::rename(&unpacked, home).with_context(|| format!("making {}", home.display()))?;
        fs::remove_dir_all(&self.directory).context("removing the downloaded packages")
    }

    /// Makes a command of apt use only this suite's files.
    fn configured(&self, mut command: Command) -> Command {
        for (option, path) in [
            (
                "Dir::Etc::sourcelist",
                self.directory.join("debian.sources"),
            ),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::State::status", "/dev/null".into()),
            ("Dir::State::lists", self.directory.join("lists")),
            ("Dir::Cache", self.directory.join("cache")),
        ] {
            command.arg(format!("-o{option}={}", path.display()));
        }
        // As root, apt drops to the user `_apt`, which may not write here. It still verifies what it fetches.
        command.args(["-oAPT::Sandbox::User=root", "-oAcquire::Languages=none"]);
        command.arg("-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false");
        command.current_dir(&self.directory);
        command
    }
}
