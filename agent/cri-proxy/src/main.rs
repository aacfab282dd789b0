//! The `ebb-cri-proxy` command.

use std::{process::ExitCode, time::Duration};

use clap::Parser as _;
use ebb_core::format::one_line;
use ebb_cri_proxy::{OwnSocket, ProxyCli};
use ebb_protocol::service::{
    listen::ListenError,
    log::{self, LogError},
};
use tokio::runtime::Builder;

/// How long the log may take to be written at the end.
const FLUSH_WITHIN: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    match run(ProxyCli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ebb-cri-proxy: {}", one_line(error.as_ref()));
            ExitCode::from(status(&error))
        }
    }
}

fn status(error: &anyhow::Error) -> u8 {
    if error.is::<OwnSocket>() {
        return 2;
    }
    error
        .downcast_ref()
        .map(LogError::exit_status)
        .or_else(|| error.downcast_ref().map(ListenError::exit_status))
        .unwrap_or(1)
}

/// One thread runs all tasks: a call passes through about six short tasks, and waking another thread for each costs
/// more than their work. So no task may block, not even to write the log.
fn run(cli: ProxyCli) -> anyhow::Result<()> {
    let log = log::start(cli.log_format, &[])?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(cli.run());
    runtime.shutdown_background();
    log.flush(FLUSH_WITHIN);
    result
}
