//! The pods of the cluster, or its namespaces, and their change history. No I/O.
//!
//! Every change has its own version, which becomes the object's resourceVersion. A client that has the state at one
//! version can get all later changes, as long as the history has them.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, Value, json};

use crate::kubelet::PodSpec;

/// A namespace and a name.
pub(super) type Key = (String, String);

/// The pods and their change history.
#[derive(Debug)]
pub(super) struct Store {
    version: u64,
    pods: BTreeMap<Key, Value>,
    changes: VecDeque<PodChange>,
    /// The version of the last change that was dropped.
    forgotten: u64,
}

/// One change of a pod.
#[derive(Debug, Clone)]
pub(super) struct PodChange {
    /// The version after it.
    pub(super) version: u64,
    /// `ADDED`, `MODIFIED` or `DELETED`.
    pub(super) kind: &'static str,
    /// The whole pod after it.
    pub(super) object: Value,
    /// When it happened.
    pub(super) at: Instant,
}

/// The history does not reach back to that version.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// A selector of pods: a JSON pointer of each field or label, and its value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selector(Vec<(String, String)>);

impl Selector {
    /// Reads a field selector and a label selector, both of `KEY=VALUE` parts.
    ///
    /// # Errors
    /// The part that is not supported.
    pub(super) fn parse(fields: &str, labels: &str) -> Result<Self, String> {
        let mut selector = Self::default();
        for part in fields.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some((
                    field @ ("spec.nodeName" | "metadata.name" | "metadata.namespace"),
                    value,
                )) => selector.require(field, value.trim_start_matches('=')),
                _ => return Err(format!("field selector {part:?} is not supported")),
            }
        }
        for part in labels.split(',').filter(|part| !part.is_empty()) {
            let (label, value) = part
                .split_once('=')
                .ok_or_else(|| format!("label selector {part:?} is not supported"))?;
            let pointer = format!("/metadata/labels/{}", label.replace('/', "~1"));
            selector.0.push((pointer, value.to_owned()));
        }
        Ok(selector)
    }

    /// Requires this value of a field, such as `metadata.namespace`.
    pub(super) fn require(&mut self, field: &str, value: &str) {
        let pointer = format!("/{}", field.replace('.', "/"));
        self.0.push((pointer, value.to_owned()));
    }

    fn matches(&self, pod: &Value) -> bool {
        self.0
            .iter()
            .all(|(pointer, value)| pod.pointer(pointer).and_then(Value::as_str) == Some(value))
    }
}

impl Store {
    pub(super) fn new() -> Self {
        // Not zero, so that tests find clients that take versions for counts.
        Self {
            version: 1000,
            pods: BTreeMap::new(),
            changes: VecDeque::new(),
            forgotten: 1000,
        }
    }

    /// The current version.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// The current pods.
    pub(super) fn list(&self, selector: &Selector) -> Vec<Value> {
        let pods = self.pods.values().filter(|pod| selector.matches(pod));
        pods.cloned().collect()
    }

    /// The current state of one pod.
    pub(super) fn get(&self, key: &Key) -> Option<&Value> {
        self.pods.get(key)
    }

    /// The first change after a version.
    pub(super) fn after(
        &self,
        version: u64,
        selector: &Selector,
    ) -> Result<Option<PodChange>, Gone> {
        if version < self.forgotten {
            return Err(Gone);
        }
        let mut changes = self.changes.iter();
        let next = changes.find(|c| c.version > version && selector.matches(&c.object));
        Ok(next.cloned())
    }

    /// The last change up to a version.
    pub(super) fn before(&self, version: u64, selector: &Selector) -> Option<PodChange> {
        let mut changes = self.changes.iter().rev();
        let last = changes.find(|c| c.version <= version && selector.matches(&c.object));
        last.cloned()
    }

    /// Drops the change history.
    pub(super) fn forget(&mut self) {
        // A new version, so that an up-to-date client must list again, too.
        self.version += 1;
        self.forgotten = self.version;
        self.changes.clear();
    }

    /// Creates a pod, bound to that node.
    pub(super) fn create(&mut self, spec: &PodSpec, node: &str) {
        let containers = spec
            .containers
            .iter()
            .map(|container| json!({"name": container.name, "image": container.image}));
        let pod = json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {
                "namespace": spec.namespace, "name": spec.name, "uid": spec.uid,
                "labels": spec.labels, "annotations": spec.annotations,
                "creationTimestamp": time(SystemTime::now()),
                "managedFields": [{"manager": "kubelet", "operation": "Update", "apiVersion": "v1",
                    "fieldsType": "FieldsV1", "fieldsV1": {"f:status": {}}}],
            },
            "spec": {
                "nodeName": node, "terminationGracePeriodSeconds": spec.grace.as_secs(),
                "containers": containers.collect::<Vec<_>>(),
            },
            "status": {"phase": "Running"},
        });
        let key = (spec.namespace.clone(), spec.name.clone());
        self.put("ADDED", key, pod);
    }

    /// Sets or removes an annotation of a namespace, which is created if it does not exist.
    pub(super) fn annotate_namespace(&mut self, name: &str, annotation: &str, value: Option<&str>) {
        let key = (String::new(), name.to_owned());
        if !self.pods.contains_key(&key) {
            let namespace = json!({
                "kind": "Namespace", "apiVersion": "v1",
                "metadata": {"name": name, "uid": format!("namespace-{name}")},
            });
            self.put("ADDED", key.clone(), namespace);
        }
        let patch = json!({"metadata": {"annotations": {annotation: value}}});
        self.modify(&key, |namespace| merge(namespace, patch));
    }

    /// Changes a pod with a function. Returns whether it exists.
    pub(super) fn modify(&mut self, key: &Key, change: impl FnOnce(&mut Value)) -> bool {
        let Some(mut pod) = self.pods.get(key).cloned() else {
            return false;
        };
        change(&mut pod);
        self.put("MODIFIED", key.clone(), pod);
        true
    }

    /// Deletes a pod with that grace period. A second delete can only shorten it, and the deletionTimestamp still counts
    /// from the first one (`BeforeDelete`, staging/src/k8s.io/apiserver/pkg/registry/rest/delete.go).
    pub(super) fn delete(&mut self, key: &Key, grace: Duration) -> bool {
        let Some(pod) = self.pods.get(key) else {
            return false;
        };
        let so_far = pod["metadata"]["deletionGracePeriodSeconds"].as_u64();
        if so_far.is_some_and(|so_far| so_far <= grace.as_secs()) {
            return true;
        }
        let ended_at = pod["metadata"]["deletionTimestamp"].as_str();
        let ended_at = ended_at.and_then(|at| humantime::parse_rfc3339(at).ok());
        let first = match (ended_at, so_far) {
            (Some(at), Some(so_far)) => at - Duration::from_secs(so_far),
            _ => SystemTime::now(),
        };
        self.modify(key, |pod| {
            pod["metadata"]["deletionTimestamp"] = time(first + grace).into();
            pod["metadata"]["deletionGracePeriodSeconds"] = grace.as_secs().into();
        })
    }

    /// Removes a pod.
    pub(super) fn remove(&mut self, key: &Key) -> bool {
        let Some(pod) = self.pods.remove(key) else {
            return false;
        };
        self.note("DELETED", pod);
        true
    }

    fn put(&mut self, kind: &'static str, key: Key, pod: Value) {
        let pod = self.note(kind, pod);
        self.pods.insert(key, pod);
    }

    fn note(&mut self, kind: &'static str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.changes.push_back(PodChange {
            version: self.version,
            kind,
            object: object.clone(),
            at: Instant::now(),
        });
        object
    }
}

/// The metadata of a pod alone.
pub(super) fn partial(pod: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": pod["metadata"]})
}

/// Merges a patch into an object (RFC 7386).
pub(super) fn merge(object: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *object = patch;
        return;
    };
    if !object.is_object() {
        *object = Map::new().into();
    }
    for (key, value) in patch {
        match (value, object.as_object_mut()) {
            (Value::Null, Some(object)) => drop(object.remove(&key)),
            (value, _) => merge(&mut object[key], value),
        }
    }
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("default".into(), name.into())
    }

    #[test]
    fn changes_are_available_from_any_version_in_the_history() {
        let mut store = Store::new();
        let all = Selector::default();
        let empty = store.version();
        store.create(&PodSpec::new("a"), "n1");
        store.delete(&key("a"), Duration::from_secs(30));
        let added = store.after(empty, &all).unwrap().unwrap();
        assert_eq!((added.kind, added.version), ("ADDED", empty + 1));
        let modified = store.after(added.version, &all).unwrap().unwrap();
        assert_eq!(modified.kind, "MODIFIED");
        let version = &modified.object["metadata"]["resourceVersion"];
        assert_eq!(*version, store.version().to_string());
        assert!(store.after(store.version(), &all).unwrap().is_none());
        store.forget();
        assert_eq!(store.after(modified.version, &all).unwrap_err(), Gone);
        assert!(store.after(store.version(), &all).unwrap().is_none());
    }

    #[test]
    fn a_selector_matches_only_its_nodes_pods() {
        let mut store = Store::new();
        store.create(&PodSpec::new("a"), "n1");
        store.create(&PodSpec::new("b"), "n2");
        let n2 = Selector::parse("spec.nodeName=n2", "").unwrap();
        assert_eq!(store.list(&n2).len(), 1);
        let change = store.after(1000, &n2).unwrap().unwrap();
        assert_eq!(change.object["metadata"]["name"], "b");
        assert!(Selector::parse("status.phase!=Running", "").is_err());
    }

    #[test]
    fn a_grace_period_is_never_prolonged() {
        let mut store = Store::new();
        store.create(&PodSpec::new("a"), "n1");
        for (asked, then) in [(30, 30), (60, 30), (5, 5)] {
            store.delete(&key("a"), Duration::from_secs(asked));
            let pod = store.get(&key("a")).unwrap();
            assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], then);
        }
    }

    #[test]
    fn the_deletion_timestamp_counts_from_the_first_delete() {
        let mut store = Store::new();
        store.create(&PodSpec::new("a"), "n1");
        let first = SystemTime::now() - Duration::from_secs(1000);
        store.modify(&key("a"), |pod| {
            let ends = time(first + Duration::from_secs(3600));
            pod["metadata"]["deletionTimestamp"] = ends.into();
            pod["metadata"]["deletionGracePeriodSeconds"] = 3600.into();
        });
        store.delete(&key("a"), Duration::from_secs(60));
        let pod = store.get(&key("a")).unwrap();
        let ends = time(first + Duration::from_secs(60));
        assert_eq!(pod["metadata"]["deletionTimestamp"], ends);
    }

    #[test]
    fn a_patch_adds_replaces_and_removes() {
        let mut object = json!({"a": {"b": 1, "c": 2}, "d": 3});
        merge(
            &mut object,
            json!({"a": {"b": null, "e": {"f": 4}}, "d": 5}),
        );
        assert_eq!(object, json!({"a": {"c": 2, "e": {"f": 4}}, "d": 5}));
    }
}
