//! Other kernels than the running one, from Debian's suites, and the emulator that boots them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::{install, suite::DebianSuite};
use crate::process::{root, say, target};

/// Kernels by their name for `--kernel`, each with its Debian suite, oldest first.
const KERNELS: &[(&str, &str)] = &[
    ("5.10", "bullseye"),
    ("6.1", "bookworm"),
    ("6.12", "trixie"),
    ("7", "forky"),
];

/// The oldest and the newest supported kernel, which `cargo xtask test` boots.
pub(crate) const FOR_CI: &[&str] = &["6.1", "7"];

const EMULATOR: &[(&str, &str)] = &[
    ("qemu-system-x86", "booting other kernels"),
    ("xz-utils", "unpacking their modules"),
];

/// An unpacked kernel.
pub(crate) struct DebianKernel {
    /// The name for `--kernel`.
    pub(crate) name: &'static str,
    /// `uname -r`.
    pub(crate) release: String,
    /// The compressed image.
    pub(crate) image: PathBuf,
    /// The directory of the kernel's modules.
    pub(crate) modules: PathBuf,
}

pub(crate) fn names() -> Vec<&'static str> {
    KERNELS.iter().map(|(name, _)| *name).collect()
}

/// Installs the emulator and unpacks those of these kernels that are missing. Returns fast if nothing is missing.
///
/// # Errors
/// If a name is unknown, or a package can't be fetched.
pub(crate) fn ensure<S: AsRef<str>>(wanted: &[S]) -> Result<Vec<DebianKernel>> {
    install(&EMULATOR.iter().collect::<Vec<_>>())?;
    wanted
        .iter()
        .map(|name| ensure_one(name.as_ref()))
        .collect()
}

fn ensure_one(wanted: &str) -> Result<DebianKernel> {
    let Some((name, suite)) = KERNELS.iter().find(|(name, _)| *name == wanted) else {
        bail!("no kernel {wanted:?}: there are {}", names().join(", "));
    };
    let parts = target().join("ebb-parts");
    let home = parts.join(format!("linux-{name}"));
    if !home.exists() {
        say(&format!(
            "unpacking Linux {name} of Debian {suite} into {}",
            home.strip_prefix(root()).unwrap_or(&home).display()
        ));
        fetch(&parts, suite, &home).with_context(|| format!("Linux {name} of Debian {suite}"))?;
    }
    find(name, &home).with_context(|| format!("in {}", home.display()))
}

/// The metapackage depends on the package of one release. In later suites that package is empty and depends on two of
/// the same release, one with the image and one with the modules.
fn fetch(parts: &Path, suite: &str, home: &Path) -> Result<()> {
    const META: &str = "linux-image-amd64";
    let suite = DebianSuite::open(parts, suite)?;
    let mut packages = suite.dependencies(META)?;
    packages.retain(|package| package.starts_with("linux-image-"));
    let [package] = &packages[..] else {
        bail!("{META} depends on {packages:?}, not on one package");
    };
    let of_release = package.replacen("linux-image", "", 1);
    let mut others = suite.dependencies(package)?;
    others.retain(|other| other.starts_with("linux-") && other.ends_with(&of_release));
    packages.extend(others);
    suite.unpack(&packages, home)
}

/// Finds the release in either layout: `/boot/vmlinuz-RELEASE` and `/lib/modules`, or everything in `/usr/lib/modules`.
fn find(name: &'static str, home: &Path) -> Result<DebianKernel> {
    let modules = ["usr/lib/modules", "lib/modules"].map(|path| home.join(path));
    let modules = modules.iter().filter_map(|path| fs::read_dir(path).ok());
    let modules = modules.flatten().next().context("no modules")??.path();
    let release = modules.file_name().context("no release")?;
    let release = release.to_string_lossy().into_owned();
    let images = [
        home.join(format!("boot/vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ];
    let image = images.into_iter().find(|path| path.exists());
    Ok(DebianKernel {
        name,
        image: image.context("no vmlinuz")?,
        modules,
        release,
    })
}
