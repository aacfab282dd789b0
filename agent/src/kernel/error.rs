//! Why the kernel's side can't be had.

use std::path::PathBuf;

/// Why the BPF programs could not be started, or the kernel could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A capability is missing.
    #[error("loading BPF programs is not permitted: run ebb as root, with CAP_SYS_ADMIN")]
    NotPermitted,
    /// The kernel has no BTF, or it can't be read.
    #[error("{}: no kernel type information ({why}): ebb needs a kernel built with CONFIG_DEBUG_INFO_BTF=y", path.display())]
    NoBtf {
        /// Where it was looked for.
        path: PathBuf,
        /// What went wrong.
        why: String,
    },
    /// The kernel has not the field that the programs need.
    #[error(
        "kernel {release} has no field `{structure}.{field}` that ebb could read: this kernel is not supported; please report its version"
    )]
    NoField {
        /// Kernel structure.
        structure: &'static str,
        /// Its field.
        field: &'static str,
        /// `uname -r`.
        release: String,
    },
    /// The kernel refused a program or a map.
    #[error(
        "kernel {release} refuses {what}: ebb needs Linux 5.12 or later with BPF tracing programs"
    )]
    Refused {
        /// The program or map.
        what: &'static str,
        /// `uname -r`.
        release: String,
        /// The kernel's and the verifier's words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A question to the kernel failed.
    #[error("{what}: {source}")]
    Io {
        /// What was asked.
        what: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}
