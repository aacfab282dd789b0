//! Checks what the machine must have and xtask can't install.

use std::{fmt, fs, path::Path, process::ExitCode};

use anyhow::Result;

/// A requirement that the machine does not meet.
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
                "Linux {release} is too old: ebb needs Linux 5.15 or later"
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

/// Fails with the first unmet requirement. [`exit_code`] gives each its own status.
pub(crate) fn check() -> Result<()> {
    let found = MachineFacts {
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

/// The exit status for an error: 1 unless it is a [`Missing`].
pub(crate) fn exit_code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.downcast_ref::<Missing>().map_or(1, Missing::status))
}

struct MachineFacts {
    root: bool,
    apt: bool,
    release: String,
    btf: bool,
    filesystems: String,
}

impl MachineFacts {
    fn missing(self) -> Option<Missing> {
        if !self.root {
            Some(Missing::Root)
        } else if !self.apt {
            Some(Missing::Debian)
        } else if version(&self.release) < Some((5, 15)) {
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
pub(crate) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> MachineFacts {
        MachineFacts {
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
    fn each_unmet_requirement_has_its_own_status() {
        let cases = [
            MachineFacts {
                root: false,
                ..good()
            },
            MachineFacts {
                apt: false,
                ..good()
            },
            MachineFacts {
                release: "5.10.0-30-amd64".into(),
                ..good()
            },
            MachineFacts {
                btf: false,
                ..good()
            },
            MachineFacts {
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
        assert!(version("5.9.1") < version("5.15"));
        assert_eq!(version("7.0-rc1"), Some((7, 0)));
        assert_eq!(version("x"), None);
    }
}
