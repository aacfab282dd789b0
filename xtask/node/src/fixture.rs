//! Programs that run inside containers.

mod serve;
mod sink;

use std::future::pending;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::http;

/// A test server and client for containers.
#[derive(Parser)]
#[command(name = crate::helpers::FIXTURE)]
struct Cli {
    #[command(subcommand)]
    program: Program,
}

#[derive(Subcommand)]
enum Program {
    Serve(serve::Serve),
    Sink(sink::Sink),
    /// GETs a URL, waits as long as it takes and prints the body.
    Get {
        /// `http://<address>:<port>/<path>`
        url: String,
    },
    /// Does nothing until it is told to end.
    Pause,
}

/// The program named by the arguments. A server exits at once on SIGTERM, connections or not.
pub(crate) fn main() -> Result<ExitCode> {
    match Cli::parse().program {
        Program::Serve(serve) => {
            let deaf = serve.deaf;
            serve.start()?;
            until_told(deaf)
        }
        Program::Sink(sink) => {
            Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(sink.serve())?;
            Ok(ExitCode::SUCCESS)
        }
        Program::Get { url } => get(&url),
        Program::Pause => until_told(false),
    }
}

/// What a sandbox runs to keep its namespaces.
pub(crate) fn pause() -> Result<ExitCode> {
    until_told(false)
}

/// Waits for SIGTERM, SIGINT or SIGQUIT. A container's pid 1 has no default actions: without handlers
/// these signals do nothing, which is what `deaf` is for.
fn until_told(deaf: bool) -> Result<ExitCode> {
    Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            if deaf {
                return pending().await;
            }
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut quit = signal(SignalKind::quit())?;
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = quit.recv() => {}
            }
            // Threads that serve connections are not waited for.
            Ok(ExitCode::SUCCESS)
        })
}

fn get(url: &str) -> Result<ExitCode> {
    let rest = url.strip_prefix("http://").context("only http:// URLs")?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let path = if path.is_empty() { "/" } else { path };
    let address: SocketAddr = authority
        .parse()
        .with_context(|| format!("{authority:?} is not <address>:<port>"))?;
    let reply = Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(http::get(address, path))?;
    std::io::stdout().write_all(&reply.body)?;
    if !reply.status.is_success() {
        bail!("{url}: {}", reply.status);
    }
    Ok(ExitCode::SUCCESS)
}
