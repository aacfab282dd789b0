//! The pods of this node at one moment, and the ways to find one.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{Pod, Scope};
use crate::ids::{ContainerId, PodUid, SandboxId};

/// The pods at one look at the runtime. Never changes; a new look makes a new one.
#[derive(Debug, Default)]
pub struct PodTable {
    pods: BTreeMap<PodUid, Arc<Pod>>,
    containers: HashMap<ContainerId, PodUid>,
    sandboxes: HashMap<SandboxId, PodUid>,
    ips: HashMap<IpAddr, PodUid>,
}

/// A pod that a user named and that can't be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// There is none.
    #[error("no pod on this node is called {wanted:?}; `ebb pods` lists them")]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// There are several.
    #[error("{wanted:?} may be any of {}; say which by namespace/name or UID", candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// Those it fits, as `namespace/name (uid)`.
        candidates: Vec<String>,
    },
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
            // Host-network pods share the node's addresses: theirs say nothing.
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

    /// The pod with this address of its own.
    pub fn by_ip(&self, ip: IpAddr) -> Option<&Arc<Pod>> {
        self.ips.get(&ip).and_then(|uid| self.pods.get(uid))
    }

    /// The pod that a user means by `namespace/name`, a bare name, or the beginning of a name or a UID.
    /// A whole name goes before a beginning.
    ///
    /// # Errors
    /// [`FindError`] if it is none or several.
    pub fn find(&self, wanted: &str) -> Result<&Arc<Pod>, FindError> {
        let not_found = || FindError::NotFound {
            wanted: wanted.into(),
        };
        let (namespace, name) = match wanted.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, wanted),
        };
        if name.is_empty() {
            return Err(not_found());
        }
        let fits = |test: &dyn Fn(&Pod) -> bool| -> Vec<&Arc<Pod>> {
            let here = |p: &&Arc<Pod>| namespace.is_none_or(|n| n == p.name.namespace);
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
            _ => Err(FindError::Ambiguous {
                wanted: wanted.into(),
                candidates: found
                    .iter()
                    .map(|p| format!("{}/{} ({})", p.name.namespace, p.name.name, p.name.uid))
                    .collect(),
            }),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        ids::{NetnsInode, PodName},
        pods::Container,
    };

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
            annotations: BTreeMap::new(),
            containers: containers
                .iter()
                .map(|id| Container {
                    id: ContainerId::new(*id),
                    name: (*id).into(),
                    running: true,
                    grace: None,
                    wait_port: Ok(None),
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
    fn the_nodes_address_is_no_pods() {
        let mut host = pod("u1", "proxy", &[]);
        host.scope = Scope::HostNetwork(vec![]);
        assert!(
            PodTable::new([host])
                .by_ip("10.88.0.7".parse().unwrap())
                .is_none()
        );
    }

    #[test]
    fn users_name_pods_as_they_please() {
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
        assert_eq!(
            candidates,
            ["shop/web-7f9c-x (aa11)", "test/web-7f9c-x (aa33)"]
        );
    }
}
