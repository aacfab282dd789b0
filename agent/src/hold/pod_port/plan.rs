//! Which ports of which pods ebb is to listen on. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::{
    drain::policy::Policy,
    ids::{ContainerId, NetnsInode, PodUid, SandboxId},
    pods::{Pod, Scope, hook::WAIT_PATH},
};

/// A port of a pod's sandbox. A new sandbox is another place, also under the same UID.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) uid: PodUid,
    pub(super) sandbox: SandboxId,
    pub(super) netns: NetnsInode,
    pub(super) port: u16,
}

/// What one pod asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) places: BTreeSet<Place>,
    /// Why it does not get all of it.
    pub(super) warnings: Vec<String>,
}

impl Plan {
    /// A pod asks by its policy (annotation `wait-port`), by the preStop hooks of its containers, or by both.
    pub(super) fn of(pod: &Pod, policy: &Policy) -> Self {
        let mut plan = Self::default();
        let mut ports: BTreeSet<u16> = policy.wait_port.into_iter().collect();
        for container in &pod.containers {
            match &container.wait_port {
                Ok(port) => ports.extend(port),
                Err(e) => plan.warn(format!("container {}: {e}", container.name)),
            }
        }
        if ports.is_empty() {
            return plan;
        }
        match &pod.scope {
            Scope::Netns { inode, .. } => {
                let place = |port| Place {
                    uid: pod.name.uid.clone(),
                    sandbox: pod.sandbox.clone(),
                    netns: *inode,
                    port,
                };
                plan.places.extend(ports.into_iter().map(place));
            }
            Scope::HostNetwork(_) => plan.warn(format!(
                "a pod on the host network has no wait port of its own; let its hook call {WAIT_PATH} at the node port \
                 of 127.0.0.1, from within"
            )),
            Scope::Untracked(why) => {
                plan.warn(format!("ebb can't listen inside it for its preStop hook: {why}"));
            }
        }
        plan
    }

    /// A restarted container and the one it replaces have the same hook, and that is one warning.
    fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }
}

/// The containers of a pod, by name: a restarted one has another id.
pub(super) fn by_name(pod: &Pod) -> HashMap<String, HashSet<ContainerId>> {
    let mut names: HashMap<String, HashSet<ContainerId>> = HashMap::new();
    for container in &pod.containers {
        let ids = names.entry(container.name.clone()).or_default();
        ids.insert(container.id.clone());
    }
    names
}

/// Whether a container has been made anew since these were its pod's.
pub(super) fn was_restarted(pod: &Pod, before: &HashMap<String, HashSet<ContainerId>>) -> bool {
    let anew =
        |c: &crate::pods::Container| before.get(&c.name).is_some_and(|ids| !ids.contains(&c.id));
    pod.containers.iter().any(anew)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::{hook::HookError, table::tests::pod};

    fn ports(plan: &Plan) -> Vec<u16> {
        plan.places.iter().map(|p| p.port).collect()
    }

    #[test]
    fn a_pod_asks_by_annotation_by_hook_or_by_both_and_most_do_not() {
        let mut pod = pod("u1", "web", &["a", "b"]);
        let nothing = Policy::default();
        assert_eq!(Plan::of(&pod, &nothing), Plan::default());
        let annotated = Policy {
            wait_port: Some(9690),
            ..Policy::default()
        };
        assert_eq!(ports(&Plan::of(&pod, &annotated)), [9690]);
        pod.containers[0].wait_port = Ok(Some(9690));
        pod.containers[1].wait_port = Ok(Some(9691));
        assert_eq!(ports(&Plan::of(&pod, &annotated)), [9690, 9691]);
        assert_eq!(ports(&Plan::of(&pod, &nothing)), [9690, 9691]);
    }

    #[test]
    fn another_sandbox_is_another_place() {
        let mut pod = pod("u1", "web", &["a"]);
        pod.containers[0].wait_port = Ok(Some(9690));
        let before = Plan::of(&pod, &Policy::default());
        pod.sandbox = SandboxId::new("another");
        assert_ne!(before.places, Plan::of(&pod, &Policy::default()).places);
    }

    #[test]
    fn where_ebb_can_not_listen_it_says_so_and_only_to_those_who_asked() {
        let mut pod = pod("u1", "web", &["a"]);
        pod.scope = Scope::HostNetwork(vec![]);
        assert_eq!(Plan::of(&pod, &Policy::default()), Plan::default());
        pod.containers[0].wait_port = Ok(Some(9690));
        let plan = Plan::of(&pod, &Policy::default());
        assert!(plan.places.is_empty());
        assert!(plan.warnings[0].contains("host network"), "{plan:?}");
        pod.scope = Scope::Untracked("it is in a gVisor sandbox".into());
        let plan = Plan::of(&pod, &Policy::default());
        assert!(plan.warnings[0].contains("gVisor"), "{plan:?}");
    }

    #[test]
    fn a_hook_that_can_not_be_served_is_one_warning_for_all_attempts() {
        let mut pod = pod("u1", "web", &["a1", "a2"]);
        for container in &mut pod.containers {
            container.name = "a".into();
            container.wait_port = Err(HookError::Https);
        }
        let plan = Plan::of(&pod, &Policy::default());
        assert_eq!(plan.warnings.len(), 1, "{plan:?}");
        assert!(plan.warnings[0].starts_with("container a: "), "{plan:?}");
    }

    #[test]
    fn a_restart_is_another_container_of_the_same_name() {
        let first = pod("u1", "web", &["a"]);
        let before = by_name(&first);
        assert!(!was_restarted(&first, &before));
        // The next one of the pod, after an init container.
        assert!(!was_restarted(&pod("u1", "web", &["a", "b"]), &before));
        let mut again = pod("u1", "web", &["a", "a2"]);
        again.containers[1].name = "a".into();
        assert!(was_restarted(&again, &before));
        assert!(!was_restarted(&again, &by_name(&again)));
    }
}
