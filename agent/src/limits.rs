//! What the kernel allows a process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Allows this process as many open files as it may have: the usual limit of 1024 is for programs that use
/// select(2). Failing leaves it as it is.
pub(crate) fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!("can't raise the limit of open files: {e}");
    }
}
