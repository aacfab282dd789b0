//! Telling of annotations that can't be obeyed as soon as the API server shows them, and not only when the pod ends.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::watch;

use super::news::News;
use crate::{
    drain::policy::{Policy, annotations::PREFIX},
    ids::{PodName, PodUid},
    pods::kube::KubePods,
};

/// Tells, once for each fault, until the watch ends.
pub async fn follow(
    mut pods: watch::Receiver<Arc<KubePods>>,
    node: Policy,
    tell: impl Fn(News) + Send,
) {
    let mut told = Told::default();
    while pods.changed().await.is_ok() {
        let pods = Arc::clone(&pods.borrow_and_update());
        told.news(&pods, &node).into_iter().for_each(&tell);
    }
}

/// What has been told of the pods that are there.
#[derive(Debug, Default)]
struct Told(HashMap<PodUid, Vec<String>>);

impl Told {
    fn news(&mut self, now: &KubePods, node: &Policy) -> Vec<News> {
        self.0.retain(|uid, _| now.pods.contains_key(uid));
        let mut news = Vec::new();
        for pod in now.pods.values() {
            let told = self.0.get(&pod.uid);
            if told.is_none() && !pod.annotations.keys().any(|k| k.starts_with(PREFIX)) {
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
                .filter(|fault| told.is_none_or(|told| !told.contains(fault)));
            news.extend(new.map(|fault| News::policy(&name, fault)));
            self.0.insert(pod.uid.clone(), faults);
        }
        news
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
    fn each_fault_is_told_once_and_again_when_it_comes_back() {
        let node = Policy::default();
        let mut told = Told::default();
        let bad = pods(&[("ebb.dev/quiet", "soon"), ("ebb.dev/untill", "idle")]);
        let notes: Vec<_> = told.news(&bad, &node).into_iter().map(|n| n.note).collect();
        assert_eq!(notes.len(), 2);
        assert!(notes.iter().any(|n| n.contains("ebb.dev/untill")));
        assert_eq!(told.news(&bad, &node), []);

        let one = pods(&[("ebb.dev/quiet", "soon")]);
        assert_eq!(told.news(&one, &node), []);
        assert_eq!(told.news(&bad, &node).len(), 1);
        assert_eq!(told.news(&KubePods::default(), &node), []);
        assert!(told.0.is_empty());
    }

    #[test]
    fn other_peoples_annotations_are_not_read() {
        let mut told = Told::default();
        let theirs = pods(&[("prometheus.io/scrape", "maybe")]);
        assert_eq!(told.news(&theirs, &Policy::default()), []);
        assert!(told.0.is_empty());
    }
}
