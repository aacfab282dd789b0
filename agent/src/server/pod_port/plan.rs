//! Decides on which ports of which pods ebb listens. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};

use ebb_core::{
    ids::{ContainerId, NetnsInode, PodUid, SandboxId},
    policy::Policy,
    scope::Scope,
};

use crate::pods::{Pod, hook::WAIT_PATH};

/// A port of a pod's sandbox. The same port of a new sandbox is another one, even if the pod's UID is the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct WaitPort {
    pub(super) uid: PodUid,
    pub(super) sandbox: SandboxId,
    pub(super) netns: NetnsInode,
    pub(super) number: u16,
}

/// The wait ports of one pod.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PortPlan {
    pub(super) ports: BTreeSet<WaitPort>,
    /// Why ebb can't listen on some of the ports that the pod wants.
    pub(super) warnings: Vec<String>,
}

impl PortPlan {
    /// A pod's policy (annotation `wait-port`) and the preStop hooks of its containers name its wait ports.
    pub(super) fn of(pod: &Pod, policy: &Policy) -> Self {
        let mut plan = Self::default();
        let mut numbers: BTreeSet<u16> = policy.wait_port.into_iter().collect();
        for container in &pod.containers {
            match &container.wait_port {
                Ok(number) => numbers.extend(number),
                Err(e) => plan.warn(format!("container {}: {e}", container.name)),
            }
        }
        if numbers.is_empty() {
            return plan;
        }
        match &pod.scope {
            Scope::Netns { inode, .. } => {
                let wait_port = |number| WaitPort {
                    uid: pod.name.uid.clone(),
                    sandbox: pod.sandbox.clone(),
                    netns: *inode,
                    number,
                };
                plan.ports.extend(numbers.into_iter().map(wait_port));
            }
            Scope::HostNetwork(_) => plan.warn(format!(
                "a pod on the host network has no wait port of its own; use an exec hook that calls {WAIT_PATH} on the \
                 node port at 127.0.0.1"
            )),
            Scope::Untracked(why) => {
                plan.warn(format!("ebb can't listen inside the pod for its preStop hook: {why}"));
            }
        }
        plan
    }

    /// Adds a warning once: a restarted container and the one that it replaces have the same hook.
    fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }
}

/// The containers that a pod has had since ebb listens in it, by name. A restarted container has another id.
#[derive(Debug, Default)]
pub(super) struct Containers(HashMap<String, HashSet<ContainerId>>);

impl Containers {
    pub(super) fn of(pod: &Pod) -> Self {
        let mut all = Self::default();
        all.follow(pod);
        all
    }

    /// Adds the pod's current containers, and returns whether one of them is new and replaces another. The pod's first
    /// container may appear after its sandbox, in which ebb already listens, and together with the one that replaces it.
    pub(super) fn follow(&mut self, pod: &Pod) -> bool {
        let mut restarted = false;
        for container in &pod.containers {
            let ids = self.0.entry(container.name.clone()).or_default();
            let is_first = ids.is_empty();
            restarted |= ids.insert(container.id.clone()) && !is_first;
        }
        restarted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::{hook::HookError, table::tests::pod};

    fn ports(plan: &PortPlan) -> Vec<u16> {
        plan.ports.iter().map(|p| p.number).collect()
    }

    #[test]
    fn wait_ports_come_from_the_annotation_and_from_hooks() {
        let mut pod = pod("u1", "web", &["a", "b"]);
        let nothing = Policy::default();
        assert_eq!(PortPlan::of(&pod, &nothing), PortPlan::default());
        let annotated = Policy {
            wait_port: Some(9690),
            ..Policy::default()
        };
        assert_eq!(ports(&PortPlan::of(&pod, &annotated)), [9690]);
        pod.containers[0].wait_port = Ok(Some(9690));
        pod.containers[1].wait_port = Ok(Some(9691));
        assert_eq!(ports(&PortPlan::of(&pod, &annotated)), [9690, 9691]);
        assert_eq!(ports(&PortPlan::of(&pod, &nothing)), [9690, 9691]);
    }

    #[test]
    fn a_port_of_another_sandbox_is_another_wait_port() {
        let mut pod = pod("u1", "web", &["a"]);
        pod.containers[0].wait_port = Ok(Some(9690));
        let before = PortPlan::of(&pod, &Policy::default());
        pod.sandbox = SandboxId::new("another");
        assert_ne!(before.ports, PortPlan::of(&pod, &Policy::default()).ports);
    }

    #[test]
    fn a_pod_that_wants_a_wait_port_is_warned_where_ebb_can_not_listen() {
        let mut pod = pod("u1", "web", &["a"]);
        pod.scope = Scope::HostNetwork(vec![]);
        assert_eq!(PortPlan::of(&pod, &Policy::default()), PortPlan::default());
        pod.containers[0].wait_port = Ok(Some(9690));
        let plan = PortPlan::of(&pod, &Policy::default());
        assert!(plan.ports.is_empty());
        assert!(plan.warnings[0].contains("host network"), "{plan:?}");
        pod.scope = Scope::Untracked("it is in a gVisor sandbox".into());
        let plan = PortPlan::of(&pod, &Policy::default());
        assert!(plan.warnings[0].contains("gVisor"), "{plan:?}");
    }

    #[test]
    fn a_hook_that_can_not_be_served_is_one_warning_for_all_attempts() {
        let mut pod = pod("u1", "web", &["a1", "a2"]);
        for container in &mut pod.containers {
            container.name = "a".into();
            container.wait_port = Err(HookError::Https);
        }
        let plan = PortPlan::of(&pod, &Policy::default());
        assert_eq!(plan.warnings.len(), 1, "{plan:?}");
        assert!(plan.warnings[0].starts_with("container a: "), "{plan:?}");
    }

    #[test]
    fn a_restart_is_another_container_of_the_same_name() {
        let mut known = Containers::of(&pod("u1", "web", &["a"]));
        // The pod's next container, after an init container.
        assert!(!known.follow(&pod("u1", "web", &["a", "b"])));
        let mut again = pod("u1", "web", &["a", "a2"]);
        again.containers[1].name = "a".into();
        assert!(known.follow(&again));
        assert!(!Containers::of(&again).follow(&again));
    }

    #[test]
    fn a_restart_is_found_if_the_first_container_came_after_the_listener() {
        let mut known = Containers::of(&pod("u1", "web", &[]));
        assert!(!known.follow(&pod("u1", "web", &["a"])));
        let mut again = pod("u1", "web", &["a2"]);
        again.containers[0].name = "a".into();
        assert!(known.follow(&again));
        assert!(!known.follow(&again));
    }

    #[test]
    fn a_restart_is_found_if_the_first_container_has_failed_before_the_next_list() {
        let mut known = Containers::of(&pod("u1", "web", &[]));
        let mut both = pod("u1", "web", &["a", "a2"]);
        both.containers[0].running = false;
        both.containers[1].name = "a".into();
        assert!(known.follow(&both));
        assert!(!known.follow(&both));
    }
}
