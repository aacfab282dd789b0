//! `ebb cri-proxy`.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use clap::Args;

use super::{
    AgentFlags,
    agent::{stop_on_signal, within},
};
use crate::{
    hold::cri_proxy::{ProxyOptions, serve},
    limits,
    listen::listen,
};

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
    /// How long to serve on, without holding, when told to stop while calls are unanswered. systemd kills it
    /// after its unit's TimeoutStopSec=70s: more than 68s needs a drop-in with a longer one.
    #[arg(
        long,
        env = "EBB_CRI_STOP_WITHIN",
        default_value = "60s",
        value_parser = within(Duration::ZERO..=LONGEST_STOP),
        value_name = "DURATION"
    )]
    stop_within: Duration,
    /// How long a stop that is held waits for the next agent when the agent is stopped, as for an upgrade; never
    /// longer than it may be held. 0s: it is forwarded at once.
    #[arg(
        long,
        env = "EBB_CRI_AGENT_RESTART_WITHIN",
        default_value = "10s",
        value_parser = within(Duration::ZERO..=LONGEST_RESTART),
        value_name = "DURATION"
    )]
    agent_restart_within: Duration,
    #[command(flatten)]
    agent: AgentFlags,
}

/// The longest grace periods are not worth a service that does not stop.
const LONGEST_STOP: Duration = Duration::from_secs(60 * 60);

/// Who knows that it takes longer has no agent to wait for.
const LONGEST_RESTART: Duration = Duration::from_secs(10 * 60);

pub(super) async fn run(flags: Flags) -> Result<()> {
    let stop = stop_on_signal()?;
    // A held call takes one for its question to the agent, and each client two.
    limits::raise_open_files();
    let listening = listen(&flags.listen).await?;
    let options = ProxyOptions {
        answer_within: flags.stop_within,
        agent_restart_within: flags.agent_restart_within,
        ..ProxyOptions::new(flags.runtime, flags.agent.socket)
    };
    serve(listening.listener, options, stop).await;
    // Removes the socket if it is ours, now that nobody is served on it any more.
    drop(listening.file);
    Ok(())
}
