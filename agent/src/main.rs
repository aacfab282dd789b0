//! The `ebb` command.

use std::{io, process::ExitCode, time::Duration};

use clap::Parser as _;
use ebb::{cli::Cli, exit, log::Log, report::text::one_line};

/// How long the end waits for what runs on threads of its own, such as the journal's last entry.
const LAST_WORK: Duration = Duration::from_secs(1);

/// How long it waits for whoever reads the log.
const LAST_LINES: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = cli.is_service().then(start_log).transpose();
    let result = log
        .and_then(|log| Ok((log, cli.runtime()?)))
        .map_err(anyhow::Error::from)
        .and_then(|(log, runtime)| {
            let result = runtime.block_on(cli.run());
            // Not to be kept by a thread that a disk or the kernel does not answer.
            runtime.shutdown_timeout(LAST_WORK);
            if let Some(log) = log {
                log.flush(LAST_LINES);
            }
            result
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ebb: {}", one_line(&e));
            exit::code(&e)
        }
    }
}

/// Has what this process does logged to standard error, as `EBB_LOG` wants it.
fn start_log() -> io::Result<Log> {
    let log = Log::to(io::stderr())?;
    let wanted = std::env::var("EBB_LOG").ok();
    let filter = wanted.as_ref().map(tracing_subscriber::EnvFilter::try_new);
    let wrong = filter
        .as_ref()
        .and_then(|f| f.as_ref().err().map(ToString::to_string));
    tracing_subscriber::fmt()
        .with_env_filter(filter.and_then(Result::ok).unwrap_or_else(|| "info".into()))
        .with_writer({
            let log = log.clone();
            move || log.clone()
        })
        .with_ansi(false)
        .with_target(false)
        .init();
    if let (Some(wanted), Some(wrong)) = (wanted, wrong) {
        tracing::warn!("EBB_LOG={wanted:?} is no log level ({wrong}): logging at info");
    }
    Ok(log)
}
