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
struct FixtureCli {
    #[command(subcommand)]
    program: FixtureProgram,
}

#[derive(Subcommand)]
enum FixtureProgram {
    Serve(serve::Serve),
    Sink(sink::Sink),
    /// GETs a URL, waits as long as it takes and prints the body.
    Get {
        /// `http://<address>:<port>/<path>`
        url: String,
    },
    /// Does nothing until a signal ends it.
    Pause,
}

/// Runs the program that the arguments name. A server exits at once on SIGTERM, even with open connections.
pub(crate) fn main() -> Result<ExitCode> {
    match FixtureCli::parse().program {
        FixtureProgram::Serve(serve) => {
            let no_signal_handlers = serve.no_signal_handlers;
            serve.start()?;
            until_signal(no_signal_handlers)
        }
        FixtureProgram::Sink(sink) => {
            Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(sink.serve())?;
            Ok(ExitCode::SUCCESS)
        }
        FixtureProgram::Get { url } => get(&url),
        FixtureProgram::Pause => until_signal(false),
    }
}

/// The pause program, which keeps a pod sandbox's namespaces.
pub(crate) fn pause() -> Result<ExitCode> {
    until_signal(false)
}

/// Waits for SIGTERM, SIGINT or SIGQUIT. With `no_signal_handlers` it waits for ever: the kernel ignores these
/// signals for a container's pid 1 without handlers.
fn until_signal(no_signal_handlers: bool) -> Result<ExitCode> {
    Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            if no_signal_handlers {
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
            // Does not wait for threads that serve connections.
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
