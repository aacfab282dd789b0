//! `ebb cri-proxy`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::{AgentFlags, agent::stop_on_signal};
use crate::hold::cri_proxy::{ProxyOptions, listen::listen, serve};

#[derive(Args)]
pub(super) struct Flags {
    /// The unix socket to serve the kubelet on, unless systemd passes one.
    #[arg(
        long,
        env = "EBB_CRI_LISTEN",
        default_value = "/run/ebb/cri.sock",
        value_name = "SOCKET"
    )]
    listen: PathBuf,
    /// The container runtime's own CRI socket.
    #[arg(
        long,
        env = "EBB_CRI_SOCKET",
        default_value = "/run/containerd/containerd.sock",
        value_name = "SOCKET"
    )]
    runtime: PathBuf,
    #[command(flatten)]
    agent: AgentFlags,
}

pub(super) async fn run(flags: Flags) -> Result<()> {
    let stop = stop_on_signal()?;
    let listening = listen(&flags.listen).await?;
    serve(
        listening.listener,
        ProxyOptions::new(flags.runtime, flags.agent.socket),
        stop,
    )
    .await;
    // Removes the socket if it is ours, now that nobody is served on it any more.
    drop(listening.file);
    Ok(())
}
