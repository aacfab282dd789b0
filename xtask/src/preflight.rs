//! What this machine must have before anything is installed or run.

use std::{fmt, fs, path::Path, process::ExitCode};

use anyhow::Result;

/// Something that xtask can't install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    Root,
    Debian,
    Kernel { release: String },
    Btf,
    Cgroup2,
}

impl Missing {
    const fn status(&self) -> u8 {
        match self {
            Self::Root => 10,
            Self::Debian => 11,
            Self::Kernel { .. } => 12,
            Self::Btf => 13,
            Self::Cgroup2 => 14,
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str(
                "this needs root (BPF programs, namespaces, containerd): run it as root",
            ),
            Self::Debian => f.write_str(
                "this installs Debian packages, and there is no apt-get here: run it on Debian 12",
            ),
            Self::Kernel { release } => write!(
                f,
                "Linux {release} is too old: ebb needs 5.12 or later (socket storage and cookies in BPF tracing programs)"
            ),
            Self::Btf => f.write_str(
                "no /sys/kernel/btf/vmlinux: ebb needs a kernel built with CONFIG_DEBUG_INFO_BTF=y",
            ),
            Self::Cgroup2 => f.write_str(
                "this kernel has no cgroup2 file system: ebb needs CONFIG_CGROUPS with cgroup v2",
            ),
        }
    }
}

impl std::error::Error for Missing {}

/// The first thing that is missing, as an error with an exit status of its own.
pub(crate) fn check() -> Result<()> {
    let found = Machine {
        root: rustix::process::geteuid().is_root(),
        apt: Path::new("/usr/bin/apt-get").exists(),
        release: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        filesystems: fs::read_to_string("/proc/filesystems").unwrap_or_default(),
    };
    found
        .missing()
        .map_or(Ok(()), |missing| Err(missing.into()))
}

/// The exit status for an error: 1 unless it says what is missing.
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.downcast_ref::<Missing>().map_or(1, Missing::status))
}

struct Machine {
    root: bool,
    apt: bool,
    release: String,
    btf: bool,
    filesystems: String,
}

impl Machine {
    fn missing(self) -> Option<Missing> {
        if !self.root {
            Some(Missing::Root)
        } else if !self.apt {
            Some(Missing::Debian)
        } else if version(&self.release) < Some((5, 12)) {
            Some(Missing::Kernel {
                release: self.release,
            })
        } else if !self.btf {
            Some(Missing::Btf)
        } else if !self.filesystems.lines().any(|l| l.ends_with("\tcgroup2")) {
            Some(Missing::Cgroup2)
        } else {
            None
        }
    }
}

/// Major and minor number of a kernel release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Machine {
        Machine {
            root: true,
            apt: true,
            release: "6.1.0-18-amd64".into(),
            btf: true,
            filesystems: "nodev\tsysfs\nnodev\tcgroup\nnodev\tcgroup2\n".into(),
        }
    }

    #[test]
    fn a_machine_with_everything_passes() {
        assert_eq!(good().missing(), None);
    }

    #[test]
    fn each_missing_thing_is_named_and_has_a_status_of_its_own() {
        let cases = [
            Machine {
                root: false,
                ..good()
            },
            Machine {
                apt: false,
                ..good()
            },
            Machine {
                release: "5.10.0-30-amd64".into(),
                ..good()
            },
            Machine {
                btf: false,
                ..good()
            },
            Machine {
                filesystems: "nodev\tcgroup\n".into(),
                ..good()
            },
        ];
        let statuses: Vec<_> = cases
            .into_iter()
            .map(|m| m.missing().map(|m| m.status()))
            .collect();
        assert_eq!(statuses, [10, 11, 12, 13, 14].map(Some));
    }

    #[test]
    fn releases_compare_by_number() {
        assert!(version("5.9.1") < version("5.12"));
        assert_eq!(version("7.0-rc1"), Some((7, 0)));
        assert_eq!(version("x"), None);
    }
}
