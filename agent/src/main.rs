//! The `ebb` command.

use std::process::ExitCode;

use clap::Parser as _;
use ebb::{cli::Cli, exit, report::text::one_line};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.is_service() {
        tracing_subscriber::fmt()
            .with_env_filter(
                tracing_subscriber::EnvFilter::try_from_env("EBB_LOG")
                    .unwrap_or_else(|_| "info".into()),
            )
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .with_target(false)
            .init();
    }
    // Two threads are plenty for what an agent does, and little for a node to give.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let result = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(cli.run()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ebb: {}", one_line(&e));
            exit::code(&e)
        }
    }
}
