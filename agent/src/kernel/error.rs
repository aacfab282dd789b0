//! Errors of the kernel module.

use std::path::PathBuf;

/// Why the BPF programs can't be started, or a system call failed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A capability is missing.
    #[error("loading BPF programs is not permitted: run ebb as root, with CAP_SYS_ADMIN")]
    NotPermitted,
    /// The kernel is older than Linux 5.15.
    #[error("Linux {release} is too old: ebb needs Linux 5.15 or later")]
    TooOld {
        /// `uname -r`.
        release: String,
    },
    /// The kernel has no BTF, or its BTF can't be read.
    #[error("{}: no kernel type information ({why}): ebb needs a kernel built with CONFIG_DEBUG_INFO_BTF=y", path.display())]
    NoBtf {
        /// Where the BTF should be.
        path: PathBuf,
        /// What went wrong.
        why: String,
    },
    /// The kernel lacks a field that the programs read.
    #[error(
        "kernel {release} has no field `{structure}.{field}` that ebb can read: this kernel is not supported; please report its version"
    )]
    NoField {
        /// Kernel structure.
        structure: &'static str,
        /// Field of the structure.
        field: &'static str,
        /// `uname -r`.
        release: String,
    },
    /// The kernel refused a program or a map.
    #[error(
        "kernel {release} refuses {what}: ebb needs Linux 5.15 or later with BPF tracing programs"
    )]
    Refused {
        /// The program or map.
        what: &'static str,
        /// `uname -r`.
        release: String,
        /// The error of the kernel, with the verifier's log.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What ebb was doing.
        what: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}
