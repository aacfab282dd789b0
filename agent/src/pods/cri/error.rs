//! Errors of the CRI client, and how it tells a socket that is not CRI from a runtime that does not answer.

use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tonic::Status;

/// Why a CRI call failed.
#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// No process listens there.
    #[error(
        "cannot reach the container runtime at {}: {source}; is containerd running? set --cri-socket to its socket",
        path.display()
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The agent may not open the socket.
    #[error("no permission to open the container runtime's socket {}; run ebb as root", path.display())]
    Permission {
        /// The socket.
        path: PathBuf,
    },
    /// Something else listens there.
    #[error(
        "{} is not a CRI v1 socket ({detail}); set --cri-socket to the socket that the kubelet uses",
        path.display()
    )]
    NotCri {
        /// The socket.
        path: PathBuf,
        /// What shows that.
        detail: String,
    },
    /// The runtime has another API version.
    #[error(
        "the container runtime at {} speaks CRI {version}, and ebb needs v1; containerd 1.6, CRI-O 1.23 and later have it",
        path.display()
    )]
    WrongVersion {
        /// The socket.
        path: PathBuf,
        /// What it reported.
        version: String,
    },
    /// No answer in time.
    #[error(
        "the container runtime at {} did not answer {call} within {} s; is it stuck?",
        path.display(),
        after.as_secs()
    )]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The runtime answered with an error.
    #[error("the container runtime at {} failed {call}: {}", path.display(), describe(status))]
    Failed {
        /// The socket.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// Its answer.
        status: Status,
    },
}

/// Marks an error of the connector, as opposed to an I/O error on an established connection.
#[derive(Debug, thiserror::Error)]
#[error("cannot dial the socket")]
pub(super) struct DialError(#[source] pub(super) io::Error);

pub(super) fn dial_error(path: &Path, e: io::Error) -> CriError {
    match e.kind() {
        io::ErrorKind::PermissionDenied => CriError::Permission { path: path.into() },
        _ => CriError::Unreachable {
            path: path.into(),
            source: e,
        },
    }
}

pub(super) fn dial_failure(status: &Status) -> Option<&io::Error> {
    let mut cause = status.source();
    while let Some(e) = cause {
        if let Some(DialError(io)) = e.downcast_ref() {
            return Some(io);
        }
        cause = e.source();
    }
    None
}

/// Whether the connection failed: the status that tonic makes then has a source, one from the runtime has none.
pub(super) fn broken_transport(status: &Status) -> bool {
    status.source().is_some()
}

fn describe(status: &Status) -> String {
    // Some messages of runtimes have line breaks; an error is one line.
    match status
        .message()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
    {
        text if text.is_empty() => status.code().to_string(),
        text => text,
    }
}
