//! Reports invalid annotations as soon as the API server shows them, not only when the pod ends.

use std::{collections::HashMap, sync::Arc};

use ebb_core::{
    ids::{PodName, PodUid},
    policy::{Policy, annotations::PREFIX},
};
use tokio::sync::watch;

use super::pod_event::PodEvent;
use crate::pods::kube::KubePods;

/// Reports each fault once, until the watch ends.
pub(crate) async fn follow(
    mut pods: watch::Receiver<Arc<KubePods>>,
    node: Policy,
    report: impl Fn(PodEvent) + Send,
) {
    let mut reported = Reported::default();
    while pods.changed().await.is_ok() {
        let pods = Arc::clone(&pods.borrow_and_update());
        reported.events(&pods, &node).into_iter().for_each(&report);
    }
}

/// The faults that have been reported, by pod.
#[derive(Debug, Default)]
struct Reported(HashMap<PodUid, Vec<String>>);

impl Reported {
    fn events(&mut self, now: &KubePods, node: &Policy) -> Vec<PodEvent> {
        self.0.retain(|uid, _| now.pods.contains_key(uid));
        let mut events = Vec::new();
        for pod in now.pods.values() {
            let known = self.0.get(&pod.uid);
            if known.is_none() && !pod.annotations.keys().any(|k| k.starts_with(PREFIX)) {
                continue;
            }
            let (_, faults) = node.from_annotations(&pod.annotations);
            let name = PodName {
                uid: pod.uid.clone(),
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
            };
            let new = faults
                .iter()
                .filter(|fault| known.is_none_or(|known| !known.contains(fault)));
            events.extend(new.map(|fault| PodEvent::policy(&name, fault)));
            self.0.insert(pod.uid.clone(), faults);
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::kube::KubePod;

    fn pods(annotations: &[(&str, &str)]) -> KubePods {
        let pod = KubePod {
            uid: PodUid::new("u1"),
            namespace: "shop".into(),
            name: "web".into(),
            deletion: None,
            annotations: annotations
                .iter()
                .map(|(k, v)| ((*k).into(), (*v).into()))
                .collect(),
        };
        KubePods {
            synced: true,
            pods: HashMap::from([(pod.uid.clone(), pod)]),
        }
    }

    #[test]
    fn each_fault_is_reported_once_and_again_when_it_comes_back() {
        let node = Policy::default();
        let mut reported = Reported::default();
        let bad = pods(&[("ebb.dev/quiet", "soon"), ("ebb.dev/untill", "idle")]);
        let notes: Vec<_> = reported
            .events(&bad, &node)
            .into_iter()
            .map(|n| n.note)
            .collect();
        assert_eq!(notes.len(), 2);
        assert!(notes.iter().any(|n| n.contains("ebb.dev/untill")));
        assert_eq!(reported.events(&bad, &node), []);

        let one = pods(&[("ebb.dev/quiet", "soon")]);
        assert_eq!(reported.events(&one, &node), []);
        assert_eq!(reported.events(&bad, &node).len(), 1);
        assert_eq!(reported.events(&KubePods::default(), &node), []);
        assert!(reported.0.is_empty());
    }

    #[test]
    fn annotations_of_others_are_not_read() {
        let mut reported = Reported::default();
        let theirs = pods(&[("prometheus.io/scrape", "maybe")]);
        assert_eq!(reported.events(&theirs, &Policy::default()), []);
        assert!(reported.0.is_empty());
    }
}
