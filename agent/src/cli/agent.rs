//! `ebb agent`.

use std::{
    ffi::CStr,
    net::{Ipv6Addr, SocketAddr},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use ebb_core::{
    format::duration_within as within,
    policy::{self, DEFAULT_MAX_HOLD, DrainMode, IdleFlows, Policy, Until},
    socket_path,
};
use ebb_protocol::service::{log::LogFormat, stop_on_signal};
use rustix::system::uname;

use crate::{
    app::{
        cleanup,
        start::{self, AgentConfig},
    },
    pods::kube::KubeMode,
};

#[derive(Args)]
pub(super) struct AgentFlags {
    /// The container runtime's CRI socket (its own, not `ebb-cri-proxy`'s).
    #[arg(
        long,
        env = "EBB_CRI_SOCKET",
        default_value = "/run/containerd/containerd.sock",
        value_name = "SOCKET",
        value_parser = socket_path::parse
    )]
    cri_socket: PathBuf,
    /// The directory of the agent's socket, lock and journal.
    #[arg(
        long,
        env = "EBB_RUN_DIR",
        default_value = "/run/ebb",
        value_name = "DIR"
    )]
    run_dir: PathBuf,
    /// The address to serve the wait endpoint, health and metrics on. Can be repeated.
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
    /// The kubelet's cgroup, as a path in cgroup v2. Without this flag, ebb searches for a cgroup named
    /// kubelet.service or kubelet. ebb takes every connection from this cgroup for a probe and does not wait
    /// for it. If the kubelet shares its cgroup with other processes (/system.slice/k3s.service), ebb does not
    /// wait for their connections to pods either: those of an ingress in the same service, for example.
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
    /// This node's name in the cluster (spec.nodeName). Without this flag, the host name.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// The socket of the node's system bus, on which systemd-logind says that the node is shutting down. Empty: do not ask.
    #[arg(
        long,
        env = "EBB_DBUS_SOCKET",
        default_value = "/proc/1/root/run/dbus/system_bus_socket",
        value_name = "SOCKET",
        value_parser = optional_socket
    )]
    dbus_socket: PathBuf,
    /// Hold the stop of a container also when ebb cannot tell whether its pod is terminating or the container
    /// is only being restarted. For nodes without an API server. The price: a container that fails its
    /// liveness probe is not restarted until its connections are gone or the deadline passes.
    #[arg(long, env = "EBB_HOLD_UNKNOWN")]
    hold_unknown: bool,
    /// Hold a pod for its whole max-hold if that is longer than its grace period, but no longer than the kubelet
    /// waits for an answer (the grace period and 2 minutes). The price: a pod may take longer to end than its
    /// terminationGracePeriodSeconds says.
    #[arg(long, env = "EBB_EXTEND")]
    extend: bool,
    /// How to write the log: auto (text, with colours on a terminal), text, or json (one object per line). The
    /// environment variable EBB_LOG sets the level: info, debug, or a list such as warn,h2=debug.
    #[arg(
        long,
        env = "EBB_LOG_FORMAT",
        default_value = "auto",
        value_name = "FORMAT"
    )]
    pub(super) log_format: LogFormat,
    /// Send a span of each drain to the OpenTelemetry collector at this address, by OTLP over gRPC without TLS, such as
    /// http://127.0.0.1:4317. Without this flag, nothing is sent.
    #[arg(long, env = "EBB_OTLP_ENDPOINT", value_name = "URL", value_parser = otlp_endpoint)]
    otlp_endpoint: Option<String>,
    /// Log the messages of the BPF programs (rare).
    #[arg(long, env = "EBB_BPF_LOG")]
    bpf_log: bool,
    /// Do not start the agent: remove what a killed agent has left in its run directory, and print whether BPF
    /// programs of ebb are loaded. Fails while an agent uses that directory.
    #[arg(long)]
    cleanup: bool,
    #[command(flatten)]
    policy: PolicyFlags,
}

/// The policy of pods without annotations.
#[derive(Args)]
#[command(next_help_heading = "Policy of pods that have no ebb.dev/ annotations")]
struct PolicyFlags {
    /// Whether the stops of pods are held: on, off, or observe (forward each stop at once, and report how long it would
    /// have been held and what it cut). The annotation ebb.dev/drain of a pod or of its namespace overrides it.
    #[arg(long, env = "EBB_DRAIN", default_value = "on", value_name = "MODE")]
    drain: DrainMode,
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
    /// The settle phase ends when no new connection has arrived for this long. Without this flag, ebb decides how long by
    /// how often clients connect to the pod, and uses 3s where it does not know that.
    #[arg(long, env = "EBB_QUIET", value_parser = within(policy::QUIET), value_name = "DURATION")]
    quiet: Option<Duration>,
    /// The settle phase lasts at least this long …
    #[arg(long, env = "EBB_SETTLE_MIN", default_value = "0s", value_parser = within(policy::SETTLE), value_name = "DURATION")]
    settle_min: Duration,
    /// … and at most this long.
    #[arg(long, env = "EBB_SETTLE_MAX", default_value = "15s", value_parser = within(policy::SETTLE), value_name = "DURATION")]
    settle_max: Duration,
    /// A connection without bytes for this long may be idle.
    #[arg(long, env = "EBB_IDLE_AFTER", default_value = "5s", value_parser = within(policy::IDLE_AFTER), value_name = "DURATION")]
    idle_after: Duration,
    /// A connection whose peer has not answered retransmissions for this long is lost: ebb does not wait for it.
    #[arg(long, env = "EBB_PEER_TIMEOUT", default_value = "20s", value_parser = within(policy::PEER_TIMEOUT), value_name = "DURATION")]
    peer_timeout: Duration,
    /// The part of the grace period to leave for the application's own shutdown; never more than a third of it.
    #[arg(long, env = "EBB_RESERVE", default_value = "5s", value_parser = within(policy::RESERVE), value_name = "DURATION")]
    reserve: Duration,
    /// The longest hold, if the grace period allows it.
    #[arg(long, env = "EBB_MAX_HOLD", default_value = "1h", value_parser = within(policy::MAX_HOLD), value_name = "DURATION")]
    max_hold: Duration,
}

/// Parses the path of a cgroup below the root of cgroup v2. The root itself is refused: every process is in it.
fn cgroup_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text.strip_prefix('/').unwrap_or(text));
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    if plain && path.components().next().is_some() {
        return Ok(Path::new("/").join(path));
    }
    Err("not the path of a cgroup below the root; write it as in /proc/PID/cgroup, such as /system.slice/k3s.service".into())
}

/// Parses an address with a port. An IPv6 address needs no brackets, because `$(NODE_IP):9690` has none on an IPv6-only
/// node. The port follows the last colon.
fn address(text: &str) -> Result<SocketAddr, String> {
    let unbracketed = || {
        let (ip, port) = text.rsplit_once(':')?;
        let ip: Ipv6Addr = ip.parse().ok()?;
        Some(SocketAddr::from((ip, port.parse().ok()?)))
    };
    let address = text.parse().ok().or_else(unbracketed);
    address.ok_or_else(|| "not an address with a port, such as 192.0.2.10:9690".into())
}

/// Parses the path of a socket; empty: none.
fn optional_socket(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Ok(PathBuf::new()),
        text => socket_path::parse(text),
    }
}

/// Checks the address of a collector.
fn otlp_endpoint(text: &str) -> Result<String, String> {
    let uri: Result<http::Uri, _> = text.parse();
    let is_http = |uri: &http::Uri| uri.scheme_str() == Some("http") && uri.host().is_some();
    match uri {
        Ok(uri) if is_http(&uri) => Ok(text.to_owned()),
        _ => Err("not the address of a collector, such as http://127.0.0.1:4317".into()),
    }
}

/// The node's name: that of the flag, or else the name that the kubelet takes without `--hostname-override`
/// (`GetHostname` in `pkg/util/node/node.go`): the host name in lower case.
fn node_name(flag: Option<String>, host: &CStr) -> Option<String> {
    let given = |name: &String| !name.is_empty();
    let of_host = || Some(host.to_str().ok()?.trim().to_lowercase());
    flag.filter(given).or_else(of_host).filter(given)
}

pub(super) async fn run(flags: AgentFlags) -> Result<()> {
    if flags.cleanup {
        for line in cleanup::cleanup(&flags.run_dir)? {
            println!("{line}");
        }
        return Ok(());
    }
    let stop = stop_on_signal().context("listening for signals")?;
    let p = flags.policy;
    let config = AgentConfig {
        cri_socket: flags.cri_socket,
        run_dir: flags.run_dir,
        http: flags.http,
        cgroup_root: flags.cgroup_root,
        kubelet_cgroup: flags.kubelet_cgroup,
        kube: flags.kube,
        dbus_socket: Some(flags.dbus_socket).filter(|path| !path.as_os_str().is_empty()),
        node_name: node_name(flags.node_name, uname().nodename()),
        hold_unknown: flags.hold_unknown,
        bpf_log: flags.bpf_log,
        otlp_endpoint: flags.otlp_endpoint,
        policy: Policy {
            drain: p.drain,
            until: p.until,
            idle_flows: p.idle_flows,
            quiet: p.quiet.unwrap_or(Policy::default().quiet),
            quiet_is_set: p.quiet.is_some(),
            settle_min: p.settle_min,
            settle_max: p.settle_max,
            idle_after: p.idle_after,
            peer_timeout: p.peer_timeout,
            reserve: p.reserve,
            // The default must not make `extend` extend all holds.
            max_hold: Some(p.max_hold).filter(|max| *max != DEFAULT_MAX_HOLD),
            extend: flags.extend,
            ..Policy::default()
        },
    };
    // A stop does not wait for a container runtime that is slow to answer.
    let running = tokio::select! {
        started = start::start(config) => started?,
        () = stop.cancelled() => return Ok(()),
    };
    running.serve(stop).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_needs_no_brackets() {
        let v6 = Ok("[2001:db8::10]:9690".parse().unwrap());
        assert_eq!(address("2001:db8::10:9690"), v6);
        assert_eq!(address("[2001:db8::10]:9690"), v6);
        assert_eq!(address("192.0.2.10:1"), Ok("192.0.2.10:1".parse().unwrap()));
        // A full address has eight groups, so the port is the ninth.
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
    fn the_nodes_name_is_the_hosts_in_lower_case_unless_the_flag_gives_one() {
        let of = |flag: Option<&str>, host| node_name(flag.map(Into::into), host);
        assert_eq!(of(None, c"Node-A").as_deref(), Some("node-a"));
        assert_eq!(of(Some(""), c"Node-A").as_deref(), Some("node-a"));
        assert_eq!(of(Some("Other"), c"Node-A").as_deref(), Some("Other"));
        assert_eq!(of(None, c""), None);
        assert_eq!(of(None, c" "), None);
        let own = uname();
        assert!(of(None, own.nodename()).is_some());
    }

    #[test]
    fn a_collector_has_an_http_address() {
        let good = "http://[::1]:4317";
        assert_eq!(otlp_endpoint(good).as_deref(), Ok(good));
        for bad in [
            "",
            "127.0.0.1:4317",
            "https://collector:4317",
            "http://",
            "/run/x.sock",
        ] {
            assert!(otlp_endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_kubelets_cgroup_is_below_the_root() {
        let k3s = Ok("/system.slice/k3s.service".into());
        assert_eq!(cgroup_path("/system.slice/k3s.service"), k3s);
        assert_eq!(cgroup_path("system.slice/k3s.service"), k3s);
        for bad in ["", "/", "//", ".", "/..", "a/../b", "/../kubelet"] {
            assert!(cgroup_path(bad).is_err(), "{bad}");
        }
    }
}
