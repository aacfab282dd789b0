//! One executable, several programs.
//!
//! Containers need a program to run and containerd needs a runtime wrapper. Neither can be a binary of
//! this crate, because cargo does not build a dependency's binaries. So the executable that uses
//! this crate is started again under the names below, and [`dispatch`] turns it into that program.

use std::env;
use std::path::Path;
use std::process::ExitCode;

use crate::{fixture, runc};

/// Name under which the executable wraps runc.
pub const RUNC: &str = "ebb-runc";
/// Name under which the executable is the test server and client of containers.
pub const FIXTURE: &str = "ebb-fixture";
/// Name under which the executable holds a pod's namespaces open.
pub const PAUSE: &str = "ebb-pause";

/// Runs the helper that this process was started as, going by the name it was started under.
///
/// To be called first in `main`. Returns `None` if the process is no helper, else the status to exit
/// with at once.
pub fn dispatch() -> Option<ExitCode> {
    let name = env::args_os().next()?;
    let program: fn() -> anyhow::Result<ExitCode> = match Path::new(&name).file_name()?.to_str()? {
        RUNC => runc::main,
        FIXTURE => fixture::main,
        PAUSE => fixture::pause,
        _ => return None,
    };
    Some(program().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    }))
}
