//! The command line.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use ebb_core::{format::duration_within, socket_path};
use ebb_protocol::service::{listen::listen, log::LogFormat, raise_open_files, stop_on_signal};
use tokio::net::UnixListener;

use crate::{ProxyOptions, serve};

/// The exit statuses, which are those of `ebb`. Printed after the help.
const EXIT_STATUS: &str = "\
Exit status:
   0  stopped by a signal
   1  anything not listed here
   2  wrong usage, or a value out of range
   7  the socket path can't be used
   8  another proxy serves it already";

/// Stands between the kubelet and the container runtime, and holds the stop of pods until they have drained.
#[derive(Parser)]
#[command(name = "ebb-cri-proxy", version, max_term_width = 100, after_help = EXIT_STATUS)]
pub struct ProxyCli {
    /// The unix socket to serve the kubelet on, unless systemd passes one.
    #[arg(
        long,
        env = "EBB_CRI_LISTEN",
        default_value = socket_path::PROXY,
        value_name = "SOCKET",
        value_parser = socket_path::parse
    )]
    listen: PathBuf,
    /// The container runtime's own CRI socket.
    #[arg(
        long,
        env = "EBB_CRI_SOCKET",
        default_value = "/run/containerd/containerd.sock",
        value_name = "SOCKET",
        value_parser = socket_path::parse
    )]
    runtime: PathBuf,
    /// How long to go on serving, without holding, after SIGTERM while calls are unanswered. More than 68s needs a
    /// systemd drop-in, because systemd kills the service after its unit's TimeoutStopSec=70s.
    #[arg(
        long,
        env = "EBB_CRI_STOP_WITHIN",
        default_value = "60s",
        value_parser = duration_within(Duration::ZERO..=LONGEST_STOP),
        value_name = "DURATION"
    )]
    stop_within: Duration,
    /// How long a stop, held or new, waits for the next agent when the agent stops, as in an upgrade; never beyond
    /// its deadline. With 0s it is forwarded at once.
    #[arg(
        long,
        env = "EBB_CRI_AGENT_RESTART_WITHIN",
        default_value = "10s",
        value_parser = duration_within(Duration::ZERO..=LONGEST_RESTART),
        value_name = "DURATION"
    )]
    agent_restart_within: Duration,
    /// The agent's unix socket.
    #[arg(
        long,
        env = "EBB_AGENT",
        default_value = "/run/ebb/agent.sock",
        value_name = "SOCKET",
        value_parser = socket_path::parse
    )]
    agent: PathBuf,
    /// How to write the log: auto (text, with colours on a terminal), text, or json (one object per line). The
    /// environment variable EBB_LOG sets the level: info, debug, or a list such as warn,h2=debug.
    #[arg(
        long,
        env = "EBB_LOG_FORMAT",
        default_value = "auto",
        value_name = "FORMAT"
    )]
    pub log_format: LogFormat,
}

/// `--runtime` names the socket on which the proxy itself listens, so each call would come back to the proxy.
#[derive(Debug, thiserror::Error)]
#[error(
    "--runtime {} is the socket on which this proxy listens: give the container runtime's own, such as \
     /run/containerd/containerd.sock",
    .0.display()
)]
pub struct OwnSocket(PathBuf);

/// Compares the paths, and where they end: one may be a link to the other.
fn refuse_own_socket(listener: &UnixListener, runtime: &Path) -> Result<(), OwnSocket> {
    let address = listener.local_addr().ok();
    let Some(listen) = address.as_ref().and_then(|address| address.as_pathname()) else {
        return Ok(());
    };
    let file = |path| fs::metadata(path).map(|m| (m.dev(), m.ino()));
    let is_same_file = matches!((file(listen), file(runtime)), (Ok(a), Ok(b)) if a == b);
    if is_same_file || socket_path::same(listen, runtime) {
        return Err(OwnSocket(runtime.to_owned()));
    }
    Ok(())
}

/// The upper limit of `--stop-within`.
const LONGEST_STOP: Duration = Duration::from_secs(60 * 60);

/// The upper limit of `--agent-restart-within`.
const LONGEST_RESTART: Duration = Duration::from_secs(10 * 60);

impl ProxyCli {
    /// Serves until SIGTERM or SIGINT.
    ///
    /// # Errors
    ///
    /// The process can't listen on the socket or install its signal handlers.
    pub async fn run(self) -> Result<()> {
        let stop = stop_on_signal().context("listening for signals")?;
        // Each held call needs a descriptor for its hold request, and each client two.
        raise_open_files();
        let listening = listen(&self.listen).await?;
        refuse_own_socket(&listening.listener, &self.runtime)?;
        let options = ProxyOptions {
            stop_within: self.stop_within,
            agent_restart_within: self.agent_restart_within,
            ..ProxyOptions::new(self.runtime, self.agent)
        };
        serve(listening.listener, options, stop).await;
        // Removes the socket file if this process made it. Only now, because clients could connect until here.
        drop(listening.file);
        Ok(())
    }
}
