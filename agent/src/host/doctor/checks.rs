//! The checks of a node, made from its facts. Pure.

use std::path::{Path, PathBuf};

use super::{
    Check,
    CheckStatus::{Fail, Ok as Fine, Warn},
};
use crate::{
    host::{
        install::CRIO_SUFFIX,
        kubelet::{FIRST_VERSION, RunningKubelet, same_socket},
    },
    kernel::FIRST_KERNEL,
};

/// The capabilities that the agent needs, by their numbers (`include/uapi/linux/capability.h`). What each is for
/// is in deploy/daemonset.yaml.
pub const CAPABILITIES: [(u32, &str); 5] = [
    (2, "CAP_DAC_READ_SEARCH"),
    (5, "CAP_KILL"),
    (10, "CAP_NET_BIND_SERVICE"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
];

/// What a component answers with, such as the runtime's name and version; or the error, in one line.
pub(super) type ProbeResult = Result<String, String>;

/// A kubelet's version, or why it is unknown.
pub(super) type KubeletVersion = Result<(u32, u32), String>;

#[derive(Clone, Debug)]
pub(super) struct NodeFacts {
    /// `uname -r`.
    pub(super) kernel: String,
    /// Whether the kernel's BTF has all fields and the tracepoint.
    pub(super) btf: Result<(), String>,
    /// `/sys/kernel/security/lockdown`, if it could be read.
    pub(super) lockdown: Option<String>,
    /// `CapEff` of this process, if it could be read.
    pub(super) capabilities: Option<u64>,
    /// The expected mount of cgroup v2, and whether it is there.
    pub(super) cgroup2: (PathBuf, bool),
    /// The agent's version.
    pub(super) agent: ProbeResult,
    /// The pods that the agent can't track, with the reasons.
    pub(super) untracked: Vec<(String, String)>,
    pub(super) kubelet: Option<(RunningKubelet, KubeletVersion)>,
    /// The runtime's own socket.
    pub(super) runtime: (PathBuf, ProbeResult),
    /// The proxy's socket; `None` if it does not exist.
    pub(super) proxy: (PathBuf, Option<ProbeResult>),
    /// How many clients were connected to the proxy before this process was, if that is known.
    pub(super) proxy_clients: Option<usize>,
}

impl NodeFacts {
    fn kubelet_uses_proxy(&self) -> bool {
        let kubelet = self.kubelet.as_ref();
        kubelet.is_some_and(|(k, _)| k.unread.is_none() && same_socket(&k.endpoint, &self.proxy.0))
    }
}

/// All checks of a node.
pub(super) fn checks(facts: &NodeFacts) -> Vec<Check> {
    let mut checks = vec![kernel(facts), btf(facts), capabilities(facts)];
    checks.extend(lockdown(facts));
    checks.extend([cgroup2(facts), runtime(facts), agent(facts)]);
    checks.extend(cri_dockerd(facts));
    checks.extend(sandboxes(facts));
    checks.push(kubelet_version(facts));
    checks.push(proxy(facts));
    checks.extend(same_runtime(facts));
    checks.extend(crio_suffix(facts));
    checks.push(kubelet_endpoint(facts));
    checks
}

fn kernel(facts: &NodeFacts) -> Check {
    let release = &facts.kernel;
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= FIRST_KERNEL => {
            Check::new("kernel", Fine, format!("Linux {release}"))
        }
        (Some(Ok(_)), Some(Ok(_))) => Check::new(
            "kernel",
            Fail,
            format!("Linux {release} is too old: ebb needs Linux 5.15 or later"),
        ),
        _ => Check::new(
            "kernel",
            Warn,
            format!("{release:?} does not begin with a version: ebb needs Linux 5.15 or later"),
        ),
    }
}

fn btf(facts: &NodeFacts) -> Check {
    match &facts.btf {
        Ok(()) => Check::new(
            "kernel types",
            Fine,
            "BTF has every field and the tracepoint inet_sock_set_state",
        ),
        Err(why) => Check::new("kernel types", Fail, why),
    }
}

fn capabilities(facts: &NodeFacts) -> Check {
    let name = "capabilities";
    let Some(has) = facts.capabilities else {
        return Check::new(name, Warn, "/proc/self/status has no CapEff");
    };
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| has >> bit & 1 == 0)
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return Check::new(name, Fine, "this process has those that the agent needs");
    }
    // This process lacks them; the agent may have them.
    let status = if facts.agent.is_ok() { Warn } else { Fail };
    let missing = missing.join(", ");
    Check::new(
        name,
        status,
        format!("missing: {missing}; run as root, on the host or in a container that has them"),
    )
}

/// With lockdown=confidentiality, BPF programs may not read the kernel's memory (`LOCKDOWN_BPF_READ_KERNEL`,
/// include/linux/security.h).
fn lockdown(facts: &NodeFacts) -> Option<Check> {
    let is_confidential = facts.lockdown.as_ref()?.contains("[confidentiality]");
    is_confidential.then(|| {
        Check::new(
            "lockdown",
            Fail,
            "the kernel runs with lockdown=confidentiality",
        )
        .because("no BPF program may read sockets then, so ebb sees no connections")
        .change("boot with lockdown=integrity")
    })
}

/// cri-dockerd's verbose statuses have no process ids.
fn cri_dockerd(facts: &NodeFacts) -> Option<Check> {
    let name = facts.runtime.1.as_ref().ok()?;
    name.starts_with("docker").then(|| {
        Check::new("cri-dockerd", Warn, format!("the runtime is {name}"))
            .because(
                "it does not tell the processes of containers, so all pods are untracked: stops are held for the \
                 settle time alone",
            )
            .change("use containerd or CRI-O as the kubelet's runtime")
    })
}

fn cgroup2(facts: &NodeFacts) -> Check {
    let (path, there) = &facts.cgroup2;
    let path = path.display();
    if *there {
        return Check::new("cgroup v2", Fine, format!("mounted at {path}"));
    }
    Check::new(
        "cgroup v2",
        Warn,
        format!(
            "not mounted at {path}: host-network pods will be untracked (--cgroup-root sets another path)"
        ),
    )
}

fn runtime(facts: &NodeFacts) -> Check {
    let (socket, answer) = &facts.runtime;
    match answer {
        Ok(name) => Check::new("runtime", Fine, format!("{name} at {}", socket.display())),
        Err(why) => Check::new("runtime", Fail, why),
    }
}

fn agent(facts: &NodeFacts) -> Check {
    let own = env!("CARGO_PKG_VERSION");
    match &facts.agent {
        Ok(version) if version == own => Check::new("agent", Fine, format!("version {version}")),
        Ok(version) => Check::new(
            "agent",
            Warn,
            format!("version {version}, and this is {own}: use one version on a node"),
        ),
        Err(why) => Check::new(
            "agent",
            // The kubelet's calls go through a proxy that has no agent to ask.
            if facts.kubelet_uses_proxy() {
                Fail
            } else {
                Warn
            },
            format!("{why}; without the agent, ebb neither holds stops nor shows connections"),
        ),
    }
}

fn sandboxes(facts: &NodeFacts) -> Option<Check> {
    if facts.agent.is_err() {
        return None;
    }
    let Some((pod, why)) = facts.untracked.first() else {
        return Some(Check::new(
            "pods",
            Fine,
            "the agent sees the connections of every pod",
        ));
    };
    let n = facts.untracked.len();
    Some(Check::new(
        "pods",
        Warn,
        format!("{n} untracked, held for the settle time alone; {pod}: {why}"),
    ))
}

fn kubelet_version(facts: &NodeFacts) -> Check {
    let (major, minor) = FIRST_VERSION;
    match &facts.kubelet {
        None => Check::new(
            "kubelet",
            Warn,
            format!(
                "not running, or not visible from here; the proxy needs {major}.{minor} or later"
            ),
        ),
        Some((_, Ok(v))) if *v >= FIRST_VERSION => {
            Check::new("kubelet", Fine, format!("version {}.{}", v.0, v.1))
        }
        Some((_, Ok(v))) => {
            // Harmless while it talks to the runtime directly.
            let status = if facts.kubelet_uses_proxy() {
                Fail
            } else {
                Warn
            };
            let detail = format!(
                "version {}.{}: the proxy can't serve it and needs {major}.{minor} or later",
                v.0, v.1
            );
            Check::new("kubelet", status, detail)
        }
        Some((_, Err(why))) => Check::new(
            "kubelet",
            Warn,
            format!("its version is unknown ({why}); the proxy needs {major}.{minor} or later"),
        ),
    }
}

fn proxy(facts: &NodeFacts) -> Check {
    let (socket, answer) = &facts.proxy;
    match answer {
        Some(Ok(_)) => Check::new("proxy", Fine, format!("answers at {}", socket.display())),
        Some(Err(why)) => Check::new(
            "proxy",
            Fail,
            format!("{why}; see `systemctl status ebb-cri.service`"),
        ),
        None if facts.kubelet_uses_proxy() => Check::new(
            "proxy",
            Fail,
            format!(
                "the kubelet is configured to use {}, which does not exist",
                socket.display()
            ),
        ),
        None => Check::new(
            "proxy",
            Warn,
            format!(
                "not installed at {}: stops are not held; see `ebb install-cri`",
                socket.display()
            ),
        ),
    }
}

fn same_runtime(facts: &NodeFacts) -> Option<Check> {
    let (Some(Ok(through)), Ok(direct)) = (&facts.proxy.1, &facts.runtime.1) else {
        return None;
    };
    let name = "proxy's runtime";
    Some(if through == direct {
        Check::new(
            name,
            Fine,
            format!("{through}, the same as without the proxy"),
        )
    } else {
        Check::new(
            name,
            Fail,
            format!(
                "{through}, but {} is {direct}: set the proxy's --runtime",
                facts.runtime.0.display()
            ),
        )
    })
}

fn crio_suffix(facts: &NodeFacts) -> Option<Check> {
    let Ok(name) = &facts.runtime.1 else {
        return None;
    };
    if !name.starts_with("cri-o") || facts.proxy.1.is_none() {
        return None;
    }
    let socket = &facts.proxy.0;
    let fits = socket.to_string_lossy().ends_with(CRIO_SUFFIX);
    Some(if fits {
        Check::new(
            "CRI-O",
            Fine,
            format!("the proxy's socket ends with {CRIO_SUFFIX}"),
        )
    } else {
        Check::new(
            "CRI-O",
            Fail,
            format!(
                "the proxy's socket {} does not end with {CRIO_SUFFIX}: the kubelet would lose CRI-O's statistics",
                socket.display()
            ),
        )
    })
}

fn kubelet_endpoint(facts: &NodeFacts) -> Check {
    let name = "kubelet's endpoint";
    let Some((kubelet, _)) = &facts.kubelet else {
        return Check::new(name, Warn, "unknown");
    };
    if let Some(path) = &kubelet.unread {
        return Check::new(
            name,
            Warn,
            format!(
                "unknown: its configuration {} can't be read from here; run this on the host, or in a container with \
                 the host's processes and CAP_SYS_PTRACE",
                path.display()
            ),
        );
    }
    let endpoint = kubelet.endpoint.display();
    if facts.kubelet_uses_proxy() {
        let detail = format!("{endpoint} (the proxy), set by {}", kubelet.source);
        // A running kubelet is always connected.
        return match (facts.proxy_clients, &facts.proxy.1) {
            (Some(0), Some(Ok(_))) => Check::new(name, Warn, detail)
                .because("no client is connected to the proxy: stops are not held")
                .change("systemctl restart kubelet"),
            _ => Check::new(name, Fine, detail),
        };
    }
    let known = same_socket(&kubelet.endpoint, Path::new(&facts.runtime.0));
    let what = if known {
        "the runtime"
    } else {
        "neither the proxy nor the runtime"
    };
    Check::new(
        name,
        Warn,
        format!(
            "{endpoint} ({what}), set by {}: stops are not held; see `ebb install-cri`",
            kubelet.source
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{doctor::CheckStatus, kubelet::EndpointSource};

    fn kubelet(endpoint: &str, version: (u32, u32)) -> Option<(RunningKubelet, KubeletVersion)> {
        let kubelet = RunningKubelet {
            pid: 1,
            endpoint: endpoint.into(),
            source: EndpointSource::Flag,
            config_dir: None,
            config: None,
            unread: None,
        };
        Some((kubelet, Ok(version)))
    }

    /// A node where every check is fine.
    fn healthy() -> NodeFacts {
        NodeFacts {
            kernel: "6.1.0-13-amd64".into(),
            btf: Ok(()),
            lockdown: Some("none [integrity] confidentiality\n".into()),
            capabilities: Some(u64::MAX),
            cgroup2: ("/sys/fs/cgroup".into(), true),
            agent: Ok(env!("CARGO_PKG_VERSION").into()),
            untracked: vec![],
            kubelet: kubelet("/run/ebb/cri.sock", (1, 31)),
            runtime: (
                "/run/containerd/containerd.sock".into(),
                Ok("containerd 1.7".into()),
            ),
            proxy: (
                "/run/ebb/cri.sock".into(),
                Some(Ok("containerd 1.7".into())),
            ),
            proxy_clients: Some(1),
        }
    }

    fn not_fine(change: impl FnOnce(&mut NodeFacts)) -> Vec<(String, CheckStatus)> {
        let mut facts = healthy();
        change(&mut facts);
        let checks = checks(&facts).into_iter();
        let odd = checks.filter(|c| c.status != Fine);
        odd.map(|c| (c.name, c.status)).collect()
    }

    fn one(name: &str, status: CheckStatus) -> Vec<(String, CheckStatus)> {
        vec![(name.into(), status)]
    }

    #[test]
    fn a_healthy_node_passes_every_check() {
        assert_eq!(not_fine(|_| ()), []);
    }

    #[test]
    fn an_old_kernel_and_missing_btf_fail_and_missing_cgroup_v2_warns() {
        let kernel = |release: &str| not_fine(|f| f.kernel = release.into());
        assert_eq!(kernel("5.14.21-x"), one("kernel", Fail));
        assert_eq!(kernel("4.19"), one("kernel", Fail));
        assert_eq!(kernel("5.15.0"), []);
        assert_eq!(kernel("6-custom"), one("kernel", Warn));
        let btf = not_fine(|f| f.btf = Err("no field".into()));
        assert_eq!(btf, one("kernel types", Fail));
        let v1 = not_fine(|f| f.cgroup2.1 = false);
        assert_eq!(v1, one("cgroup v2", Warn));
    }

    #[test]
    fn lockdown_of_the_kernels_memory_fails_and_cri_dockerd_warns() {
        let locked = "none integrity [confidentiality]\n";
        let lockdown = not_fine(|f| f.lockdown = Some(locked.into()));
        assert_eq!(lockdown, one("lockdown", Fail));
        assert_eq!(not_fine(|f| f.lockdown = None), []);
        let docker = not_fine(|f| {
            f.runtime.1 = Ok("docker 27.0.3".into());
            f.proxy.1 = Some(Ok("docker 27.0.3".into()));
        });
        assert_eq!(docker, one("cri-dockerd", Warn));
    }

    #[test]
    fn missing_capabilities_are_named_and_fail_if_no_agent_answers() {
        let without_ptrace = Some(!(1 << 19));
        let mut facts = healthy();
        facts.capabilities = without_ptrace;
        let check = capabilities(&facts);
        assert_eq!(check.status, Warn);
        assert!(
            check.detail.starts_with("missing: CAP_SYS_PTRACE;"),
            "{}",
            check.detail
        );
        facts.agent = Err("away".into());
        assert_eq!(capabilities(&facts).status, Fail);
    }

    #[test]
    fn a_configuration_that_cannot_be_read_leaves_the_endpoint_unknown() {
        let mut facts = healthy();
        if let Some((kubelet, _)) = &mut facts.kubelet {
            kubelet.unread = Some("/var/lib/kubelet/config.yaml".into());
        }
        let check = kubelet_endpoint(&facts);
        assert_eq!(check.status, Warn);
        assert!(
            check.detail.starts_with("unknown") && check.detail.contains("config.yaml"),
            "{}",
            check.detail
        );
    }

    #[test]
    fn an_agent_that_is_away_fails_if_the_kubelet_uses_the_proxy_and_one_of_another_version_warns()
    {
        assert_eq!(
            not_fine(|f| f.agent = Err("away".into())),
            one("agent", Fail)
        );
        let mut facts = healthy();
        facts.agent = Err("away".into());
        facts.kubelet = kubelet("/run/containerd/containerd.sock", (1, 31));
        assert_eq!(agent(&facts).status, Warn);
        assert_eq!(
            not_fine(|f| f.agent = Ok("0.0.1".into())),
            one("agent", Warn)
        );
        let untracked = not_fine(|f| f.untracked.push(("a/b".into(), "Kata".into())));
        assert_eq!(untracked, one("pods", Warn));
    }

    #[test]
    fn a_kubelet_that_was_not_restarted_warns() {
        let clients = |clients| not_fine(|f| f.proxy_clients = clients);
        assert_eq!(clients(Some(0)), one("kubelet's endpoint", Warn));
        assert_eq!(clients(None), []);
    }

    #[test]
    fn an_old_kubelet_fails_only_behind_the_proxy() {
        let old = |endpoint| not_fine(|f| f.kubelet = kubelet(endpoint, (1, 30)));
        assert_eq!(old("/run/ebb/cri.sock"), one("kubelet", Fail));
        let direct = old("/run/containerd/containerd.sock");
        assert!(
            direct.iter().all(|(_, status)| *status == Warn),
            "{direct:?}"
        );
    }

    #[test]
    fn a_missing_proxy_fails_only_if_the_kubelet_uses_it() {
        let needed = not_fine(|f| f.proxy.1 = None);
        assert_eq!(needed, one("proxy", Fail));
        let unused = not_fine(|f| {
            f.proxy.1 = None;
            f.kubelet = kubelet("/var/run/containerd/containerd.sock", (1, 31));
        });
        let warn = |name: &str| (name.to_owned(), Warn);
        assert_eq!(unused, [warn("proxy"), warn("kubelet's endpoint")]);
        let broken = not_fine(|f| f.proxy.1 = Some(Err("UNAVAILABLE".into())));
        assert_eq!(broken, one("proxy", Fail));
    }

    #[test]
    fn a_proxy_in_front_of_another_runtime_fails() {
        let other = not_fine(|f| f.proxy.1 = Some(Ok("cri-o 1.31".into())));
        assert_eq!(other, one("proxy's runtime", Fail));
    }

    #[test]
    fn in_front_of_crio_the_proxys_path_must_end_like_crios() {
        let crio = |socket: &str| {
            not_fine(|f| {
                f.runtime.1 = Ok("cri-o 1.31".into());
                f.proxy = (socket.into(), Some(Ok("cri-o 1.31".into())));
                f.kubelet = kubelet(socket, (1, 31));
            })
        };
        assert_eq!(crio("/run/ebb/run/crio/crio.sock"), []);
        assert_eq!(crio("/run/ebb/cri.sock"), one("CRI-O", Fail));
    }

    #[test]
    fn an_unreachable_runtime_fails() {
        let away = not_fine(|f| f.runtime.1 = Err("no listener".into()));
        assert_eq!(away, one("runtime", Fail));
    }
}
