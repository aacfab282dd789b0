//! From the facts of a node to checks. Pure.

use std::path::{Path, PathBuf};

use super::{
    Check,
    Status::{Fail, Ok as Fine, Warn},
};
use crate::host::{
    install::CRIO_SUFFIX,
    kubelet::{FIRST_VERSION, Kubelet, same_socket},
};

/// The first kernel that has all that the BPF programs need.
const FIRST_KERNEL: (u32, u32) = (5, 12);

/// The capabilities that the agent needs, by their numbers (`include/uapi/linux/capability.h`). What each is for
/// is in deploy/daemonset.yaml.
pub const CAPABILITIES: [(u32, &str); 5] = [
    (2, "CAP_DAC_READ_SEARCH"),
    (10, "CAP_NET_BIND_SERVICE"),
    (12, "CAP_NET_ADMIN"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
];

/// A CRI socket and what answers there: the runtime's name and version, or what went wrong, in one line.
pub(super) type Answer = Result<String, String>;

/// A kubelet's version, or why it can't be had.
pub(super) type Version = Result<(u32, u32), String>;

/// What is known of the node.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// `uname -r`.
    pub(super) kernel: String,
    /// Whether the kernel's types are there, with all fields and the tracepoint.
    pub(super) btf: Result<(), String>,
    /// `CapEff` of this process, if it could be read.
    pub(super) capabilities: Option<u64>,
    /// Where cgroup v2 was looked for, and whether it is there.
    pub(super) cgroup2: (PathBuf, bool),
    /// The agent's version, or why it does not answer.
    pub(super) agent: Answer,
    /// Pods that the agent can't track, and why.
    pub(super) untracked: Vec<(String, String)>,
    /// The kubelet, and its version or why that can't be had.
    pub(super) kubelet: Option<(Kubelet, Version)>,
    /// The runtime's own socket.
    pub(super) runtime: (PathBuf, Answer),
    /// The proxy's socket; no answer if there is no such socket.
    pub(super) proxy: (PathBuf, Option<Answer>),
}

impl Facts {
    fn kubelet_uses_proxy(&self) -> bool {
        let kubelet = self.kubelet.as_ref();
        kubelet.is_some_and(|(k, _)| same_socket(&k.endpoint, &self.proxy.0))
    }
}

/// All checks of a node.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![
        kernel(facts),
        btf(facts),
        capabilities(facts),
        cgroup2(facts),
        runtime(facts),
        agent(facts),
    ];
    checks.extend(sandboxes(facts));
    checks.push(kubelet_version(facts));
    checks.push(proxy(facts));
    checks.extend(same_runtime(facts));
    checks.extend(crio_suffix(facts));
    checks.push(kubelet_endpoint(facts));
    checks
}

fn kernel(facts: &Facts) -> Check {
    let release = &facts.kernel;
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= FIRST_KERNEL => {
            Check::new("kernel", Fine, format!("Linux {release}"))
        }
        (Some(Ok(_)), Some(Ok(_))) => Check::new(
            "kernel",
            Fail,
            format!("Linux {release} is too old: ebb needs 5.12 or later"),
        ),
        _ => Check::new(
            "kernel",
            Warn,
            format!("{release:?} does not begin with a version: ebb needs Linux 5.12 or later"),
        ),
    }
}

fn btf(facts: &Facts) -> Check {
    match &facts.btf {
        Ok(()) => Check::new(
            "kernel types",
            Fine,
            "BTF has every field and the tracepoint inet_sock_set_state",
        ),
        Err(why) => Check::new("kernel types", Fail, why),
    }
}

fn capabilities(facts: &Facts) -> Check {
    let name = "capabilities";
    let Some(has) = facts.capabilities else {
        return Check::new(name, Warn, "/proc/self/status does not say which there are");
    };
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| has >> bit & 1 == 0)
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return Check::new(name, Fine, "those that the agent needs are there");
    }
    // It is this process that lacks them: the agent may have them.
    let status = if facts.agent.is_ok() { Warn } else { Fail };
    let missing = missing.join(", ");
    Check::new(
        name,
        status,
        format!("missing: {missing}; run as root, on the host or in a container that has them"),
    )
}

fn cgroup2(facts: &Facts) -> Check {
    let (path, there) = &facts.cgroup2;
    let path = path.display();
    if *there {
        return Check::new("cgroup v2", Fine, format!("mounted at {path}"));
    }
    Check::new(
        "cgroup v2",
        Warn,
        format!(
            "not at {path}: pods on the host network will be untracked (--cgroup-root names another place)"
        ),
    )
}

fn runtime(facts: &Facts) -> Check {
    let (socket, answer) = &facts.runtime;
    match answer {
        Ok(name) => Check::new("runtime", Fine, format!("{name} at {}", socket.display())),
        Err(why) => Check::new("runtime", Fail, why),
    }
}

fn agent(facts: &Facts) -> Check {
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
            Warn,
            format!("{why}; without it nothing is held or shown"),
        ),
    }
}

fn sandboxes(facts: &Facts) -> Option<Check> {
    if facts.agent.is_err() {
        return None;
    }
    let Some((pod, why)) = facts.untracked.first() else {
        return Some(Check::new(
            "pods",
            Fine,
            "the connections of every pod can be seen",
        ));
    };
    let n = facts.untracked.len();
    Some(Check::new(
        "pods",
        Warn,
        format!("{n} untracked, which are held for the settle time alone; {pod}: {why}"),
    ))
}

fn kubelet_version(facts: &Facts) -> Check {
    let (major, minor) = FIRST_VERSION;
    match &facts.kubelet {
        None => Check::new(
            "kubelet",
            Warn,
            format!(
                "none runs here, or it can't be seen from here; the proxy needs {major}.{minor} or later"
            ),
        ),
        Some((_, Ok(v))) if *v >= FIRST_VERSION => {
            Check::new("kubelet", Fine, format!("version {}.{}", v.0, v.1))
        }
        Some((_, Ok(v))) => {
            // Of no harm as long as it talks to the runtime itself.
            let status = if facts.kubelet_uses_proxy() {
                Fail
            } else {
                Warn
            };
            let detail = format!(
                "version {}.{}: its calls don't get through the proxy, which needs {major}.{minor} or later",
                v.0, v.1
            );
            Check::new("kubelet", status, detail)
        }
        Some((_, Err(why))) => Check::new(
            "kubelet",
            Warn,
            format!("its version can't be had ({why}); the proxy needs {major}.{minor} or later"),
        ),
    }
}

fn proxy(facts: &Facts) -> Check {
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
                "the kubelet is told to use {}, and nothing is there",
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

fn same_runtime(facts: &Facts) -> Option<Check> {
    let (Some(Ok(through)), Ok(direct)) = (&facts.proxy.1, &facts.runtime.1) else {
        return None;
    };
    let name = "proxy's runtime";
    Some(if through == direct {
        Check::new(name, Fine, format!("{through}, the same as without it"))
    } else {
        Check::new(
            name,
            Fail,
            format!(
                "{through}, and at {} it is {direct}: set the proxy's --runtime",
                facts.runtime.0.display()
            ),
        )
    })
}

fn crio_suffix(facts: &Facts) -> Option<Check> {
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
                "the proxy's socket {} does not end with {CRIO_SUFFIX}: the kubelet would lose its statistics",
                socket.display()
            ),
        )
    })
}

fn kubelet_endpoint(facts: &Facts) -> Check {
    let name = "kubelet's endpoint";
    let Some((kubelet, _)) = &facts.kubelet else {
        return Check::new(name, Warn, "unknown");
    };
    let endpoint = kubelet.endpoint.display();
    if facts.kubelet_uses_proxy() {
        return Check::new(
            name,
            Fine,
            format!("{endpoint}, the proxy, by {}", kubelet.source),
        );
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
            "{endpoint}, {what}, by {}: stops are not held; see `ebb install-cri`",
            kubelet.source
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{doctor::Status, kubelet::Source};

    fn kubelet(endpoint: &str, version: (u32, u32)) -> Option<(Kubelet, Version)> {
        let kubelet = Kubelet {
            pid: 1,
            endpoint: endpoint.into(),
            source: Source::Flag,
            config_dir: None,
            config: None,
        };
        Some((kubelet, Ok(version)))
    }

    /// A node where all is well.
    fn well() -> Facts {
        Facts {
            kernel: "6.1.0-13-amd64".into(),
            btf: Ok(()),
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
        }
    }

    fn not_fine(change: impl FnOnce(&mut Facts)) -> Vec<(String, Status)> {
        let mut facts = well();
        change(&mut facts);
        let checks = checks(&facts).into_iter();
        let odd = checks.filter(|c| c.status != Fine);
        odd.map(|c| (c.name, c.status)).collect()
    }

    fn one(name: &str, status: Status) -> Vec<(String, Status)> {
        vec![(name.into(), status)]
    }

    #[test]
    fn a_node_where_all_is_well_has_nothing_to_complain_of() {
        assert_eq!(not_fine(|_| ()), []);
    }

    #[test]
    fn what_the_kernel_lacks_fails() {
        let kernel = |release: &str| not_fine(|f| f.kernel = release.into());
        assert_eq!(kernel("5.11.22-x"), one("kernel", Fail));
        assert_eq!(kernel("4.19"), one("kernel", Fail));
        assert_eq!(kernel("5.12.0"), []);
        assert_eq!(kernel("6-custom"), one("kernel", Warn));
        let btf = not_fine(|f| f.btf = Err("no field".into()));
        assert_eq!(btf, one("kernel types", Fail));
        let v1 = not_fine(|f| f.cgroup2.1 = false);
        assert_eq!(v1, one("cgroup v2", Warn));
    }

    #[test]
    fn missing_capabilities_are_named_and_fail_where_no_agent_has_them() {
        let without_ptrace = Some(!(1 << 19));
        let mut facts = well();
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
    fn an_agent_that_is_away_or_of_another_version_is_a_warning() {
        assert_eq!(
            not_fine(|f| f.agent = Err("away".into())),
            one("agent", Warn)
        );
        assert_eq!(
            not_fine(|f| f.agent = Ok("0.0.1".into())),
            one("agent", Warn)
        );
        let untracked = not_fine(|f| f.untracked.push(("a/b".into(), "Kata".into())));
        assert_eq!(untracked, one("pods", Warn));
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
    fn a_proxy_that_is_missing_fails_only_where_the_kubelet_needs_it() {
        let needed = not_fine(|f| f.proxy.1 = None);
        assert_eq!(needed, one("proxy", Fail));
        let spare = not_fine(|f| {
            f.proxy.1 = None;
            f.kubelet = kubelet("/var/run/containerd/containerd.sock", (1, 31));
        });
        let warn = |name: &str| (name.to_owned(), Warn);
        assert_eq!(spare, [warn("proxy"), warn("kubelet's endpoint")]);
        let dumb = not_fine(|f| f.proxy.1 = Some(Err("UNAVAILABLE".into())));
        assert_eq!(dumb, one("proxy", Fail));
    }

    #[test]
    fn a_proxy_in_front_of_another_runtime_fails() {
        let other = not_fine(|f| f.proxy.1 = Some(Ok("cri-o 1.31".into())));
        assert_eq!(other, one("proxy's runtime", Fail));
    }

    #[test]
    fn in_front_of_crio_the_path_has_to_end_as_its_own_does() {
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
    fn a_runtime_that_is_away_fails() {
        let away = not_fine(|f| f.runtime.1 = Err("nobody".into()));
        assert_eq!(away, one("runtime", Fail));
    }
}
