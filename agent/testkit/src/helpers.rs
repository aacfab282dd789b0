//! Helper programs inside the executable that uses this crate.
//!
//! Containers need a program to run and containerd needs a runtime wrapper. Neither can be a binary of this crate,
//! because cargo does not build a dependency's binaries. So containerd and containers start the executable that uses
//! this crate under the names below, and [`dispatch`] runs the program of that name.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::{fixture, runc};

/// Name under which the executable wraps runc.
pub const RUNC: &str = "ebb-runc";
/// Name under which the executable is the test server and client in containers.
pub const FIXTURE: &str = "ebb-fixture";
/// Name under which the executable holds a pod's namespaces open.
pub const PAUSE: &str = "ebb-pause";

/// Runs the helper program that the first argument (argv 0) names.
///
/// Call this first in `main`. Returns `None` if the process is not a helper, else its exit status.
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

/// The program `name` in the directory of `program`, where cargo puts all binaries of a workspace.
///
/// # Panics
///
/// If it is missing: without `--workspace` cargo builds only the binaries of the package under test.
pub fn beside(program: &str, name: &str) -> PathBuf {
    let path = Path::new(program).with_file_name(name);
    assert!(
        path.exists(),
        "{} is missing: build it first, by `cargo build --package {name}` or `cargo xtask test`",
        path.display()
    );
    path
}
