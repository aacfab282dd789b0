//! The workload of a pod, from the labels that controllers set on their pods. Metrics use it, because a series for
//! each pod would be too many.

use std::collections::{BTreeMap, HashMap};

use ebb_protocol::filter::OwnerKind;

/// Labels that controllers set, and how to get the workload's name.
const OWNERS: [(&str, OwnerKind, Rule); 5] = [
    // Deployment: NAME-HASH-SUFFIX (`getReplicaSetName` and `GenerateName`).
    (
        "pod-template-hash",
        OwnerKind::Deployment,
        Rule::BeforeValue,
    ),
    // StatefulSet: NAME-N.
    (
        "statefulset.kubernetes.io/pod-name",
        OwnerKind::StatefulSet,
        Rule::BeforeLast,
    ),
    // Job: the value is its name.
    ("batch.kubernetes.io/job-name", OwnerKind::Job, Rule::Job),
    ("job-name", OwnerKind::Job, Rule::Job),
    // DaemonSet: NAME-SUFFIX.
    (
        "controller-revision-hash",
        OwnerKind::DaemonSet,
        Rule::BeforeLast,
    ),
];

enum Rule {
    /// The pod's name up to the label's value.
    BeforeValue,
    /// The pod's name up to its last dash.
    BeforeLast,
    /// The label's value, without the time that a CronJob adds.
    Job,
}

/// The name of the Deployment, StatefulSet, DaemonSet, CronJob or Job that created the pod; `None` for any other pod.
pub(super) fn workload(pod: &str, labels: &HashMap<String, String>) -> Option<String> {
    let (value, rule) = OWNERS
        .iter()
        .find_map(|(label, _, rule)| Some((labels.get(*label)?, rule)))?;
    let name = match rule {
        Rule::BeforeValue => pod.split_once(&format!("-{value}"))?.0,
        Rule::BeforeLast => pod.rsplit_once('-')?.0,
        Rule::Job => match value.rsplit_once('-') {
            // Minutes since 1970 (`getJobName` in pkg/controller/cronjob/utils.go).
            Some((name, time)) if time.len() >= 8 && time.bytes().all(|b| b.is_ascii_digit()) => {
                name
            }
            _ => value,
        },
    };
    Some(name.to_owned())
}

/// The kind of the controller of a pod with these labels.
pub(super) fn kind(labels: &BTreeMap<String, String>) -> Option<OwnerKind> {
    let mut owners = OWNERS.iter();
    let owner = owners.find(|(label, ..)| labels.contains_key(*label));
    owner.map(|(_, kind, _)| *kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pod: &str, labels: &[(&str, &str)]) -> Option<String> {
        let labels = labels.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        workload(pod, &labels.collect())
    }

    #[test]
    fn controllers_are_named_by_their_labels() {
        let deployment = [("pod-template-hash", "7f9c"), ("app", "web")];
        assert_eq!(of("web-7f9c-x2x4v", &deployment).as_deref(), Some("web"));
        let set = [
            ("statefulset.kubernetes.io/pod-name", "db-main-0"),
            ("controller-revision-hash", "db-main-6b7"),
        ];
        assert_eq!(of("db-main-0", &set).as_deref(), Some("db-main"));
        let daemon = [("controller-revision-hash", "6b7d")];
        assert_eq!(of("log-agent-x2x4v", &daemon).as_deref(), Some("log-agent"));
        let job = [("job-name", "import-29384756")];
        assert_eq!(of("import-29384756-abcde", &job).as_deref(), Some("import"));
        let job = [("job-name", "migrate-v2")];
        assert_eq!(of("migrate-v2-abcde", &job).as_deref(), Some("migrate-v2"));
    }

    #[test]
    fn the_kind_follows_from_the_same_labels() {
        let kind_of = |labels: &[&str]| {
            let labels = labels.iter().map(|label| ((*label).into(), "x".into()));
            kind(&labels.collect())
        };
        assert_eq!(
            kind_of(&["pod-template-hash", "app"]),
            Some(OwnerKind::Deployment)
        );
        let set = [
            "controller-revision-hash",
            "statefulset.kubernetes.io/pod-name",
        ];
        assert_eq!(kind_of(&set), Some(OwnerKind::StatefulSet));
        assert_eq!(
            kind_of(&["controller-revision-hash"]),
            Some(OwnerKind::DaemonSet)
        );
        assert_eq!(kind_of(&["app"]), None);
    }

    #[test]
    fn a_pod_without_a_controller_has_none() {
        assert_eq!(of("debug", &[("app", "debug")]), None);
        assert_eq!(of("web", &[("pod-template-hash", "7f9c")]), None);
    }
}
