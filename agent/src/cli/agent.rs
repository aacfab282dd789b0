//! `ebb agent`.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    drain::policy::{self, IdleFlows, Policy, Until},
    pods::kube::KubeMode,
    start::{self, Config},
};

#[derive(Args)]
pub(super) struct Flags {
    /// The container runtime's CRI socket (its own, not `ebb cri-proxy`'s).
    #[arg(
        long,
        env = "EBB_CRI_SOCKET",
        default_value = "/run/containerd/containerd.sock",
        value_name = "SOCKET"
    )]
    cri_socket: PathBuf,
    /// Where to keep the agent's socket, lock and journal.
    #[arg(
        long,
        env = "EBB_RUN_DIR",
        default_value = "/run/ebb",
        value_name = "DIR"
    )]
    run_dir: PathBuf,
    /// Where to serve the wait endpoint, health and metrics. May be given more than once.
    #[arg(
        long,
        env = "EBB_HTTP",
        value_delimiter = ',',
        default_value = "127.0.0.1:9690",
        value_name = "ADDRESS"
    )]
    http: Vec<SocketAddr>,
    /// The mount of cgroup v2.
    #[arg(
        long,
        env = "EBB_CGROUP_ROOT",
        default_value = "/sys/fs/cgroup",
        value_name = "DIR"
    )]
    cgroup_root: PathBuf,
    /// Whether to watch pods at the API server.
    #[arg(long, env = "EBB_KUBE", value_enum, default_value_t)]
    kube: KubeMode,
    /// This node's name in the cluster (spec.nodeName).
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Hold the stop of a container also when nobody can tell whether its pod is terminating or the
    /// container is only being restarted. For nodes without an API server. It costs: a container that fails
    /// its liveness probe keeps failing for as long as its connections last, up to the deadline.
    #[arg(long, env = "EBB_HOLD_UNKNOWN")]
    hold_unknown: bool,
    /// Log what the BPF programs have to say (rare).
    #[arg(long, env = "EBB_BPF_LOG")]
    bpf_log: bool,
    #[command(flatten)]
    policy: PolicyFlags,
}

/// The policy of pods without annotations.
#[derive(Args)]
#[command(next_help_heading = "Policy of pods that have no ebb.dev/ annotations")]
struct PolicyFlags {
    /// What to wait for: zero (no inbound connection is left), idle (none in the middle of something) or
    /// settled (no new ones arrive).
    #[arg(long, env = "EBB_UNTIL", default_value = "zero", value_name = "WHAT")]
    until: Until,
    /// What to do with idle connections while a pod drains: keep them, or close them gracefully.
    #[arg(
        long,
        env = "EBB_IDLE_FLOWS",
        default_value = "keep",
        value_name = "WHAT"
    )]
    idle_flows: IdleFlows,
    /// The settle phase ends when no new connection has arrived for this long …
    #[arg(long, env = "EBB_QUIET", default_value = "3s", value_parser = within(policy::QUIET), value_name = "DURATION")]
    quiet: Duration,
    /// … or after this long in any case.
    #[arg(long, env = "EBB_SETTLE_MAX", default_value = "15s", value_parser = within(SETTLE_MAX), value_name = "DURATION")]
    settle_max: Duration,
    /// A connection without bytes for this long may be idle.
    #[arg(long, env = "EBB_IDLE_AFTER", default_value = "5s", value_parser = within(policy::IDLE_AFTER), value_name = "DURATION")]
    idle_after: Duration,
    /// What to leave of the grace period for the application's own shutdown; never more than a third of it.
    #[arg(long, env = "EBB_RESERVE", default_value = "5s", value_parser = within(policy::RESERVE), value_name = "DURATION")]
    reserve: Duration,
    /// The longest hold, where the grace period allows as much.
    #[arg(long, env = "EBB_MAX_HOLD", value_parser = within(policy::MAX_HOLD), value_name = "DURATION")]
    max_hold: Option<Duration>,
}

/// What the longest settle phase may be. No grace period is longer than a day.
const SETTLE_MAX: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(24 * 60 * 60);

/// Reads durations of this range, which is that of the annotation of the same name.
fn within(
    range: RangeInclusive<Duration>,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync {
    move |text| {
        let d = humantime::parse_duration(text)
            .map_err(|e| format!("{e}; write a number and a unit, such as 30s or 1m30s"))?;
        if range.contains(&d) {
            return Ok(d);
        }
        let [least, most] = [range.start(), range.end()].map(|d| humantime::format_duration(*d));
        Err(format!("not between {least} and {most}"))
    }
}

pub(super) async fn run(flags: Flags) -> Result<()> {
    let stop = stop_on_signal()?;
    let p = flags.policy;
    let config = Config {
        cri_socket: flags.cri_socket,
        run_dir: flags.run_dir,
        http: flags.http,
        cgroup_root: flags.cgroup_root,
        kube: flags.kube,
        node_name: flags.node_name,
        hold_unknown: flags.hold_unknown,
        bpf_log: flags.bpf_log,
        policy: Policy {
            until: p.until,
            idle_flows: p.idle_flows,
            quiet: p.quiet,
            settle_max: p.settle_max,
            idle_after: p.idle_after,
            reserve: p.reserve,
            max_hold: p.max_hold,
            ..Policy::default()
        },
    };
    // A runtime that is slow to answer must not keep the agent from being stopped.
    let running = tokio::select! {
        started = start::start(config) => started?,
        () = stop.cancelled() => return Ok(()),
    };
    running.serve(stop).await;
    Ok(())
}

/// A token that SIGTERM and SIGINT cancel.
pub(super) fn stop_on_signal() -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let cancel = stop.clone();
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        cancel.cancel();
    });
    Ok(stop)
}
