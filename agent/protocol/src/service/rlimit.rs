//! The kernel's limits of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit of open files to the hard limit, because the usual soft limit of 1024 exists only for programs
/// that use select(2). On failure the limit stays as it is.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!("can't raise the limit of open files: {e}");
    }
}
