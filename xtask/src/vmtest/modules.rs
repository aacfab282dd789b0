//! The kernel modules that the test suite needs, with their dependencies, in the order of loading.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// Modules that the kernel loads on demand through modprobe. A guest has no modprobe.
const NEEDED: &[&str] = &[
    // Sandboxes of tests.
    "overlay",
    // Links between namespaces, and to virtual machines.
    "veth",
    "tun",
    "bridge",
    // sock_diag of TCP and of MPTCP.
    "tcp_diag",
    "mptcp_diag",
    // iptables -t nat -j MASQUERADE, and -j DNAT.
    "iptable_nat",
    "xt_MASQUERADE",
    "xt_nat",
    "nf_conntrack",
    // Classifiers.
    "sch_ingress",
    "cls_bpf",
];

/// Modules that another module requests by an alias while it loads, so that its `depends=` does not name them.
const BY_ALIAS: &[(&str, &str)] = &[("libcrc32c", "crc32c_generic")];

/// A module, uncompressed.
pub(super) struct KernelModule {
    /// The name, with `_` where the file's name may have `-`.
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// Reads the modules that the suite needs from `directory` (`/lib/modules/RELEASE`). Built-in ones are left out.
///
/// # Errors
/// If the kernel lacks a module.
pub(super) fn needed(directory: &Path) -> Result<Vec<KernelModule>> {
    let mut files = BTreeMap::new();
    find_files(directory, &mut files)?;
    let built_in =
        fs::read_to_string(directory.join("modules.builtin")).context("reading modules.builtin")?;
    let built_in = built_in.lines().filter_map(|line| name(Path::new(line)));
    let mut order = LoadOrder {
        files,
        known: built_in.collect(),
        modules: Vec::new(),
    };
    for name in NEEDED {
        order.add(name)?;
    }
    Ok(order.modules)
}

fn find_files(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_files(&entry.path(), files)?;
        } else if let Some(name) = name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// The name of the module at this path, if it is a module's.
fn name(path: &Path) -> Option<String> {
    let (name, extension) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(extension, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

struct LoadOrder {
    files: BTreeMap<String, PathBuf>,
    /// Built in, or in `modules` already.
    known: BTreeSet<String>,
    modules: Vec<KernelModule>,
}

impl LoadOrder {
    /// Adds a module after its dependencies.
    fn add(&mut self, name: &str) -> Result<()> {
        if !self.known.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name);
        let path = path.with_context(|| format!("the kernel has no module {name}"))?;
        let content = read(path)?;
        for dependency in dependencies(&content) {
            self.add(&dependency)?;
        }
        for (_, dependency) in BY_ALIAS.iter().filter(|(module, _)| *module == name) {
            self.add(dependency)?;
        }
        self.modules.push(KernelModule {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|e| e.to_str()) {
        Some("ko") => return fs::read(path).with_context(|| format!("reading {}", path.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!("{}: unknown compression", path.display()),
    };
    let out = Command::new(program)
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .with_context(|| format!("starting {program}"))?;
    ensure!(
        out.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(out.stdout)
}

/// The `depends=` entry of the section `.modinfo`, which is a list of `key=value` strings (scripts/mod/modpost.c). A
/// Debian package has no `modules.dep`: depmod makes it when the kernel is installed.
fn dependencies(module: &[u8]) -> Vec<String> {
    let entry = module
        .split(|byte| *byte == 0)
        .find_map(|string| string.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(entry.unwrap_or_default());
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        let module = b"\x7fELF\0license=GPL\0depends=ip_tables,nf-nat\0intree=Y\0";
        assert_eq!(dependencies(module), ["ip_tables", "nf_nat"]);
        assert!(dependencies(b"\0depends=\0name=veth\0").is_empty());
    }

    #[test]
    fn a_modules_name_is_that_of_its_file() {
        assert_eq!(name(Path::new("a/nf-nat.ko.xz")).as_deref(), Some("nf_nat"));
        assert_eq!(name(Path::new("a/veth.ko")).as_deref(), Some("veth"));
        assert_eq!(name(Path::new("a/modules.dep")), None);
    }
}
