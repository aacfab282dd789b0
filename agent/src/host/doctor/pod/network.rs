//! The checks of what lies between a pod's clients and its application: a mesh's proxy, and the backlog. Pure.

use super::super::{
    Check,
    CheckStatus::{Ok as Fine, Warn},
};

/// The containers that service meshes add to pods.
const SIDECARS: [(&str, &str); 4] = [
    ("istio-proxy", "Istio"),
    ("linkerd-proxy", "Linkerd"),
    ("consul-dataplane", "Consul"),
    ("kuma-sidecar", "Kuma"),
];

/// Whether a mesh's proxy keeps the pod from draining. `until` and `idle_flows` are settings of its policy.
pub(super) fn mesh(containers: &[&str], until: &str, idle_flows: &str) -> Option<Check> {
    let (container, mesh) = SIDECARS
        .iter()
        .find(|(name, _)| containers.contains(name))?;
    let what = format!("the connections of its clients end at {mesh}'s proxy {container}");
    Some(if until == "zero" && idle_flows == "keep" {
        let why = "other proxies of the mesh keep idle connections open for up to an hour, so the pod drains only at \
                   its deadline";
        Check::new("mesh", Warn, what)
            .because(why)
            .change("annotate the pod with ebb.dev/until: idle")
    } else {
        Check::new("mesh", Fine, what)
    })
}

/// Whether connections were dropped because a listening socket's backlog was full, from `/proc/PID/net/netstat`.
/// `None` if there is no such counter.
pub(super) fn backlog(netstat: &str) -> Option<Check> {
    let overflows = counter(netstat, "TcpExt:", "ListenOverflows")?;
    if overflows == 0 {
        return None;
    }
    let what = format!(
        "{overflows} times since the pod's start, a connection was dropped because a listening socket's queue was full"
    );
    let why = "the client tries again after 1 s, then 3 s; while the pod drains, its last clients wait so, too";
    Some(Check::new("backlog", Warn, what).because(why).change(
        "raise the application's listen backlog and the sysctl net.core.somaxconn in the pod, or let it accept faster",
    ))
}

/// A counter of a group. A group has two lines, the names and the values, each after the group's name.
fn counter(netstat: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix(group));
    let (names, values) = (lines.next()?, lines.next()?);
    let mut pairs = names
        .split_ascii_whitespace()
        .zip(values.split_ascii_whitespace());
    pairs.find(|(n, _)| *n == name)?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_needs_a_drain_that_does_not_wait_for_idle_connections() {
        let names = ["app", "istio-proxy"];
        let change = |until, idle| mesh(&names, until, idle).unwrap().change;
        assert!(change("zero", "keep").unwrap().contains("until: idle"));
        assert_eq!(change("idle", "keep"), None);
        assert_eq!(change("zero", "close"), None);
        assert_eq!(mesh(&["app"], "zero", "keep"), None);
    }

    #[test]
    fn overflows_of_a_backlog_are_counted() {
        let text = |n: u64| {
            format!(
                "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 {n} 9\nIpExt: InOctets\nIpExt: 4\n"
            )
        };
        assert_eq!(backlog(&text(0)), None);
        assert!(backlog(&text(3)).unwrap().detail.contains("3 times"));
        assert_eq!(backlog("TcpExt: SyncookiesSent\nTcpExt: 1\n"), None);
        let own = std::fs::read_to_string("/proc/self/net/netstat").unwrap();
        assert!(counter(&own, "TcpExt:", "ListenOverflows").is_some());
    }
}
