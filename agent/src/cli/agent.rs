//! `ebb agent`.

use std::{
    net::{Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    cleanup,
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
        value_name = "ADDRESS",
        value_parser = address
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
    /// The cgroup that the kubelet dials from, as a path in cgroup v2. Without, cgroups called kubelet.service or
    /// kubelet are looked for. Everything dialled from there counts as a probe and holds nothing, so one that
    /// the kubelet shares with other things (/system.slice/k3s.service) costs: what those send to pods directly,
    /// an ingress run by the same service, say, is not waited for.
    #[arg(
        long,
        env = "EBB_KUBELET_CGROUP",
        value_parser = cgroup_path,
        value_name = "PATH"
    )]
    kubelet_cgroup: Option<PathBuf>,
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
    /// Let a pod whose policy names a max-hold longer than its grace period be held for that long, up to what
    /// the kubelet waits for an answer (the grace period and 2 minutes). It costs: a pod may take longer to
    /// end than its terminationGracePeriodSeconds says.
    #[arg(long, env = "EBB_EXTEND")]
    extend: bool,
    /// Log what the BPF programs have to say (rare).
    #[arg(long, env = "EBB_BPF_LOG")]
    bpf_log: bool,
    /// Do not start: remove what an agent that was killed has left in its run directory, and say whether BPF
    /// programs of ebb are loaded. Refused while an agent runs there.
    #[arg(long)]
    cleanup: bool,
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
pub(super) fn within(
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

/// Reads a path that stays below the root of cgroup v2, and is not the root itself, which everybody is in.
fn cgroup_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text.strip_prefix('/').unwrap_or(text));
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    if plain && path.components().next().is_some() {
        return Ok(Path::new("/").join(path));
    }
    Err("not the path of a cgroup below the root; write it as in /proc/PID/cgroup, such as /system.slice/k3s.service".into())
}

/// An address with a port. That of IPv6 may come without brackets, as `$(NODE_IP):9690` becomes on a node that has no
/// other; what is behind the last colon is the port.
fn address(text: &str) -> Result<SocketAddr, String> {
    let unbracketed = || {
        let (ip, port) = text.rsplit_once(':')?;
        let ip: Ipv6Addr = ip.parse().ok()?;
        Some(SocketAddr::from((ip, port.parse().ok()?)))
    };
    let address = text.parse().ok().or_else(unbracketed);
    address.ok_or_else(|| "not an address with a port, such as 192.0.2.10:9690".into())
}

pub(super) async fn run(flags: Flags) -> Result<()> {
    if flags.cleanup {
        for line in cleanup::cleanup(&flags.run_dir)? {
            println!("{line}");
        }
        return Ok(());
    }
    let stop = stop_on_signal()?;
    let p = flags.policy;
    let config = Config {
        cri_socket: flags.cri_socket,
        run_dir: flags.run_dir,
        http: flags.http,
        cgroup_root: flags.cgroup_root,
        kubelet_cgroup: flags.kubelet_cgroup,
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
            extend: flags.extend,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_node_that_has_only_ipv6_needs_no_brackets() {
        let v6 = Ok("[2001:db8::10]:9690".parse().unwrap());
        assert_eq!(address("2001:db8::10:9690"), v6);
        assert_eq!(address("[2001:db8::10]:9690"), v6);
        assert_eq!(address("192.0.2.10:1"), Ok("192.0.2.10:1".parse().unwrap()));
        // Written out, the port is one more group than there are.
        let full = "2001:db8:1:2:3:4:5:6";
        assert!(address(full).is_err() && address(&format!("{full}:80")).is_ok());
        for bad in [
            "",
            "9690",
            "192.0.2.10",
            "node:9690",
            "::1",
            "2001:db8::10:70000",
        ] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_cgroup_is_named_by_a_path_below_the_root_and_never_by_the_root() {
        let k3s = Ok("/system.slice/k3s.service".into());
        assert_eq!(cgroup_path("/system.slice/k3s.service"), k3s);
        assert_eq!(cgroup_path("system.slice/k3s.service"), k3s);
        for bad in ["", "/", "//", ".", "/..", "a/../b", "/../kubelet"] {
            assert!(cgroup_path(bad).is_err(), "{bad}");
        }
    }
}
