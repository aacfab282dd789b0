//! The pods of one list, and how to find one of them.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ebb_core::{
    ids::{ContainerId, PodName, PodUid, SandboxId},
    scope::Scope,
};

use super::Pod;

/// The pods of one list. Immutable: a new list makes a new table.
#[derive(Debug, Default)]
pub struct PodTable {
    pods: BTreeMap<PodUid, Arc<Pod>>,
    containers: HashMap<ContainerId, PodUid>,
    sandboxes: HashMap<SandboxId, PodUid>,
    ips: HashMap<IpAddr, PodUid>,
}

/// A name from a user that does not identify a pod.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// No pod matches.
    #[error("no pod on this node is called {wanted:?}; `ebb pods` lists them")]
    NotFound {
        /// The user's text.
        wanted: String,
    },
    /// Several pods match.
    #[error("{wanted:?} matches {} pods; give the whole name of one of them", candidates.len())]
    Ambiguous {
        /// The user's text.
        wanted: String,
        /// The pods that match, as `namespace/name`, with the UID where two pods have one name.
        candidates: Vec<String>,
    },
}

impl FindError {
    /// These pods match.
    pub fn ambiguous(wanted: &str, found: &[&PodName]) -> Self {
        Self::Ambiguous {
            wanted: wanted.into(),
            candidates: candidates(found),
        }
    }

    /// The pods that match, if several do.
    pub fn candidates(self) -> Vec<String> {
        match self {
            Self::NotFound { .. } => vec![],
            Self::Ambiguous { candidates, .. } => candidates,
        }
    }
}

/// Whether `wanted` is the pod's whole name or UID, alone or as `namespace/name`.
pub fn is_called(pod: &PodName, wanted: &str) -> bool {
    let (namespace, name) = namespace_and_name(wanted);
    namespace.is_none_or(|namespace| pod.namespace == namespace)
        && (pod.name == name || pod.uid.as_str() == name)
}

/// Splits `namespace/name`.
fn namespace_and_name(wanted: &str) -> (Option<&str>, &str) {
    match wanted.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, wanted),
    }
}

/// The names of pods, sorted, with the UID where two of them have one name.
fn candidates(found: &[&PodName]) -> Vec<String> {
    let is_unique = |pod: &PodName| {
        let name = |p: &&&PodName| (&p.namespace, &p.name) == (&pod.namespace, &pod.name);
        found.iter().filter(name).count() == 1
    };
    let mut names: Vec<_> = found
        .iter()
        .map(|pod| match is_unique(pod) {
            true => pod.to_string(),
            false => format!("{pod} (UID {})", pod.uid),
        })
        .collect();
    names.sort();
    names
}

impl PodTable {
    /// A table of these pods.
    pub fn new(pods: impl IntoIterator<Item = Pod>) -> Self {
        let mut table = Self::default();
        for pod in pods {
            let uid = &pod.name.uid;
            for container in &pod.containers {
                table.containers.insert(container.id.clone(), uid.clone());
            }
            table.sandboxes.insert(pod.sandbox.clone(), uid.clone());
            // Host-network pods share the node's addresses, which identify no pod.
            if !matches!(pod.scope, Scope::HostNetwork(_)) {
                table
                    .ips
                    .extend(pod.ips.iter().map(|ip| (*ip, uid.clone())));
            }
            table.pods.insert(uid.clone(), Arc::new(pod));
        }
        table
    }

    /// All pods, by UID.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pods.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// The pod with this UID.
    pub fn by_uid(&self, uid: &PodUid) -> Option<&Arc<Pod>> {
        self.pods.get(uid)
    }

    /// The pod that this container belongs to.
    pub fn by_container(&self, id: &ContainerId) -> Option<&Arc<Pod>> {
        self.containers.get(id).and_then(|uid| self.pods.get(uid))
    }

    /// The pod whose sandbox this is.
    pub fn by_sandbox(&self, id: &SandboxId) -> Option<&Arc<Pod>> {
        self.sandboxes.get(id).and_then(|uid| self.pods.get(uid))
    }

    /// The pod that owns this address; never a host-network pod.
    pub fn by_ip(&self, ip: IpAddr) -> Option<&Arc<Pod>> {
        self.ips.get(&ip).and_then(|uid| self.pods.get(uid))
    }

    /// The pod that matches `namespace/name`, a name, a UID, or a prefix of a name or UID. An exact match goes before
    /// a prefix.
    ///
    /// # Errors
    /// [`FindError`] if none or several match.
    pub fn find(&self, wanted: &str) -> Result<&Arc<Pod>, FindError> {
        self.find_in(wanted, None)
    }

    /// The same, in this namespace only if there is one.
    ///
    /// # Errors
    /// [`FindError`] if none or several match.
    pub fn find_in(&self, wanted: &str, only: Option<&str>) -> Result<&Arc<Pod>, FindError> {
        let not_found = || FindError::NotFound {
            wanted: wanted.into(),
        };
        let (namespace, name) = namespace_and_name(wanted);
        if name.is_empty() {
            return Err(not_found());
        }
        let fits = |test: &dyn Fn(&Pod) -> bool| -> Vec<&Arc<Pod>> {
            let here = |p: &&Arc<Pod>| {
                let is_in = |n: &str| n == p.name.namespace;
                namespace.is_none_or(is_in) && only.is_none_or(is_in)
            };
            self.pods
                .values()
                .filter(here)
                .filter(|p| test(p))
                .collect()
        };
        let mut found = fits(&|p| p.name.name == name || p.name.uid.as_str() == name);
        if found.is_empty() {
            found =
                fits(&|p| p.name.name.starts_with(name) || p.name.uid.as_str().starts_with(name));
        }
        match found[..] {
            [] => Err(not_found()),
            [pod] => Ok(pod),
            _ => {
                let names: Vec<_> = found.iter().map(|p| &p.name).collect();
                Err(FindError::ambiguous(wanted, &names))
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::pods::Container;
    use ebb_core::ids::{NetnsInode, PodName};

    /// A pod `shop/NAME` of running containers.
    pub(crate) fn pod(uid: &str, name: &str, containers: &[&str]) -> Pod {
        Pod {
            name: PodName {
                uid: PodUid::new(uid),
                namespace: "shop".into(),
                name: name.into(),
            },
            sandbox: SandboxId::new(format!("sandbox-of-{uid}")),
            scope: Scope::Netns {
                inode: NetnsInode(1),
                pid: 1,
            },
            ips: vec!["10.88.0.7".parse().unwrap()],
            workload: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            containers: containers
                .iter()
                .map(|id| Container {
                    id: ContainerId::new(*id),
                    name: (*id).into(),
                    running: true,
                    grace: None,
                    wait_port: Ok(None),
                    pre_stop_sleep: std::time::Duration::ZERO,
                })
                .collect(),
        }
    }

    fn in_namespace(namespace: &str, mut pod: Pod) -> Pod {
        pod.name.namespace = namespace.into();
        pod
    }

    #[test]
    fn a_pod_is_found_by_all_its_ids() {
        let table = PodTable::new([pod("u1", "web-0", &["a", "b"])]);
        let uid = Some(&PodUid::new("u1"));
        let name = |p: Option<&Arc<Pod>>| p.map(|p| p.name.uid.clone());
        assert_eq!(
            name(table.by_container(&ContainerId::new("b"))).as_ref(),
            uid
        );
        assert_eq!(
            name(table.by_sandbox(&SandboxId::new("sandbox-of-u1"))).as_ref(),
            uid
        );
        assert_eq!(
            name(table.by_ip("10.88.0.7".parse().unwrap())).as_ref(),
            uid
        );
        assert!(table.by_container(&ContainerId::new("c")).is_none());
    }

    #[test]
    fn the_nodes_address_belongs_to_no_pod() {
        let mut host = pod("u1", "proxy", &[]);
        host.scope = Scope::HostNetwork(vec![]);
        assert!(
            PodTable::new([host])
                .by_ip("10.88.0.7".parse().unwrap())
                .is_none()
        );
    }

    #[test]
    fn a_pod_is_found_by_name_uid_or_prefix() {
        let table = PodTable::new([
            pod("aa11", "web-7f9c-x", &[]),
            pod("bb22", "web", &[]),
            in_namespace("test", pod("aa33", "web-7f9c-x", &[])),
        ]);
        let uid = |wanted| table.find(wanted).map(|p| p.name.uid.as_str().to_owned());
        assert_eq!(uid("shop/web-7f9c-x").as_deref(), Ok("aa11"));
        assert_eq!(uid("test/web").as_deref(), Ok("aa33"));
        // Exact before prefix.
        assert_eq!(uid("web").as_deref(), Ok("bb22"));
        assert_eq!(uid("aa3").as_deref(), Ok("aa33"));
        assert_eq!(uid("bb22").as_deref(), Ok("bb22"));
        for wanted in ["nobody", "", "/", "shop/", "other/web"] {
            assert_eq!(
                uid(wanted),
                Err(FindError::NotFound {
                    wanted: wanted.into()
                })
            );
        }
        let Err(FindError::Ambiguous { candidates, .. }) = uid("web-7f9c-x") else {
            panic!()
        };
        assert_eq!(candidates, ["shop/web-7f9c-x", "test/web-7f9c-x"]);
        // Only the UID tells a new pod from an old one with its name.
        let table = PodTable::new([pod("aa11", "db-0", &[]), pod("bb22", "db-0", &[])]);
        let Err(FindError::Ambiguous { candidates, .. }) = table.find("db-0") else {
            panic!()
        };
        assert_eq!(candidates, ["shop/db-0 (UID aa11)", "shop/db-0 (UID bb22)"]);
    }

    #[test]
    fn a_whole_name_is_no_prefix() {
        let pod = pod("aa11", "web-7f9c", &[]).name;
        for wanted in ["web-7f9c", "shop/web-7f9c", "aa11", "shop/aa11"] {
            assert!(is_called(&pod, wanted), "{wanted}");
        }
        for wanted in [
            "web",
            "shop/web",
            "shop/",
            "aa",
            "",
            "test/web-7f9c",
            "test/aa11",
        ] {
            assert!(!is_called(&pod, wanted), "{wanted}");
        }
    }
}
