//! The `ebb` command.

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use clap::Parser as _;
use ebb::cli::{Cli, exit, kubectl::Plugin};
use ebb_protocol::service::log;

/// How long the process waits at its end for blocking threads, such as a write to the journal.
const BLOCKING_THREADS_WITHIN: Duration = Duration::from_secs(1);

/// How long it waits until the log is flushed.
const LOG_FLUSH_WITHIN: Duration = Duration::from_millis(500);

/// Crates that log the errors of each request to the API server. ebb retries or reports these itself, and the log says
/// once when the API server goes and when it is back.
const HANDLED_BY_EBB: [&str; 2] = ["kube_client", "kube_runtime"];

fn main() -> ExitCode {
    if Plugin::is_called_by(env::args_os().next().as_deref()) {
        let plugin = Plugin::parse(env::args_os());
        let result = Cli::runtime().map_err(anyhow::Error::from);
        let result = result.and_then(|runtime| {
            let result = runtime.block_on(plugin.run());
            // A thread may still wait for a key.
            runtime.shutdown_background();
            result
        });
        return status(result);
    }
    let cli = Cli::parse();
    let log = cli
        .log_format()
        .map(|format| log::start(format, &HANDLED_BY_EBB))
        .transpose();
    let result = log
        .map_err(anyhow::Error::from)
        .and_then(|log| Ok((log, Cli::runtime()?)))
        .and_then(|(log, runtime)| {
            let result = runtime.block_on(cli.run());
            // A thread that is blocked on a disk or in the kernel must not keep the process from ending.
            runtime.shutdown_timeout(BLOCKING_THREADS_WITHIN);
            if let Some(log) = log {
                log.flush(LOG_FLUSH_WITHIN);
            }
            result
        });
    status(result.map(|()| ExitCode::SUCCESS))
}

/// The exit status. Prints the error if there is one.
fn status(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(status) => status,
        Err(e) => {
            // Without a reader of standard error, the status alone says it.
            let _ = writeln!(io::stderr(), "ebb: {}", exit::message(&e));
            exit::code(&e)
        }
    }
}
