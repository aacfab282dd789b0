//! Putting together what the agent knows of a pod's stops (`GET /v1/explain`).

use std::{collections::BTreeMap, time::Duration};

use crate::{
    agent::Agent,
    clock::{BootTime, millis},
    drain::policy::{CallLimits, DEFAULT_GRACE, Policy, annotations::PREFIX},
    ids::PodName,
    pods::{
        Pod,
        table::{FindError, PodTable},
    },
    report::view::{Explanation, Origin, PolicyView, SCHEMA, Setting, rfc3339},
};

/// How much longer than the timeout the kubelet waits (`runtimeRequestTimeout`), unless it was told otherwise.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// Explains the pod that is called so, also one that is gone, if its stops are remembered.
pub(super) fn explain(
    agent: &Agent,
    table: &PodTable,
    wanted: &str,
) -> Result<Explanation, FindError> {
    let (name, pod) = match table.find(wanted) {
        Ok(pod) => (pod.name.clone(), Some(pod)),
        Err(e) => match gone(agent, wanted) {
            Some(name) => (name, None),
            None => return Err(e),
        },
    };
    let view = agent.drains.view().borrow().clone();
    let over = || {
        let report = view.finished.iter().find(|r| r.pod.uid == name.uid);
        report.map(|r| r.as_ref().clone())
    };
    let drain = view
        .under_way(BootTime::now())
        .find(|r| r.pod.uid == name.uid)
        .or_else(over);
    let kube = agent.kube.pods().borrow().clone();
    Ok(Explanation {
        schema: SCHEMA.into(),
        agent_since: rfc3339(agent.started),
        deleting: kube.synced.then(|| kube.is_deleting(&name.uid)),
        now: pod.map(|pod| policy(agent, pod)),
        drain,
        stops: agent.judgements.of(|stop| stop.pod.uid == name.uid),
        pod: name,
    })
}

/// Whether this is the whole name of the pod, or its UID.
pub(super) fn is_called(pod: &PodName, wanted: &str) -> bool {
    pod.name == wanted || pod.uid.as_str() == wanted || pod.to_string() == wanted
}

/// A pod that is not on the node any more, by its whole name or UID: the one that was stopped last.
fn gone(agent: &Agent, wanted: &str) -> Option<PodName> {
    let is = |pod: &PodName| is_called(pod, wanted);
    let stopped = agent.judgements.of(|stop| is(&stop.pod)).into_iter();
    let stopped = stopped.map(|stop| stop.pod).next();
    let view = agent.drains.view();
    let view = view.borrow();
    stopped.or_else(|| {
        let drained = view.finished.iter().find(|r| is(&r.pod));
        drained.map(|r| r.pod.clone())
    })
}

fn policy(agent: &Agent, pod: &Pod) -> PolicyView {
    let annotations = agent.annotations_of(pod);
    let (policy, warnings) = agent.policy.from_annotations(&annotations);
    let grace = agent.grace_of(pod);
    let timeout = grace.unwrap_or(DEFAULT_GRACE);
    let limits = CallLimits {
        grace: Some(timeout),
        patience: Some(timeout.saturating_add(REQUEST_TIMEOUT)),
    };
    PolicyView {
        settings: settings(&policy, &agent.policy, &annotations),
        warnings,
        grace_ms: grace.map(millis),
        reserve_ms: millis(policy.effective_reserve(timeout)),
        deadline_ms: millis(policy.deadline(limits)),
    }
}

/// The settings of a pod's policy on a node with `node`'s, and where each comes from. An annotation that could
/// not be obeyed is no source.
fn settings(
    policy: &Policy,
    node: &Policy,
    annotations: &BTreeMap<String, String>,
) -> Vec<Setting> {
    let defaults = Policy::default().settings();
    let of_node = node.settings();
    let mut settings = Vec::new();
    for (i, (name, value)) in policy.settings().into_iter().enumerate() {
        let annotation = format!("{PREFIX}{name}");
        let alone = annotations
            .get_key_value(&annotation)
            .map(|(k, v)| BTreeMap::from([(k.clone(), v.clone())]));
        // Read by itself it must be accepted; that it is of no use beside another is another matter.
        let obeyed = alone.is_some_and(|a| {
            let (read, warnings) = node.from_annotations(&a);
            warnings.is_empty() || read != *node
        });
        let from = if obeyed {
            Origin::Annotation
        } else if of_node[i].1 == defaults[i].1 {
            Origin::Default
        } else {
            Origin::Node
        };
        settings.push(Setting {
            name: name.into(),
            value,
            from,
        });
    }
    settings.push(Setting {
        name: "extend".into(),
        value: if policy.extend { "on" } else { "off" }.into(),
        from: if policy.extend {
            Origin::Node
        } else {
            Origin::Default
        },
    });
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_is_told_with_its_source() {
        let node = Policy {
            reserve: Duration::from_secs(7),
            quiet: Duration::from_secs(1),
            ..Policy::default()
        };
        let annotations: BTreeMap<String, String> = [
            ("ebb.dev/until", "idle"),
            ("ebb.dev/quiet", "2s"),
            ("ebb.dev/max-hold", "forever"),
            // The same as without it, and still the pod's own word.
            ("ebb.dev/idle-flows", "keep"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
        let (policy, _) = node.from_annotations(&annotations);
        let told = settings(&policy, &node, &annotations);
        let of = |name: &str| {
            let setting = told.iter().find(|s| s.name == name).unwrap();
            (setting.value.as_str(), setting.from)
        };
        assert_eq!(of("until"), ("idle", Origin::Annotation));
        assert_eq!(of("quiet"), ("2s", Origin::Annotation));
        assert_eq!(of("idle-flows"), ("keep", Origin::Annotation));
        assert_eq!(of("max-hold"), ("none", Origin::Default));
        assert_eq!(of("reserve"), ("7s", Origin::Node));
        assert_eq!(of("ports"), ("all", Origin::Default));
        assert_eq!(of("extend"), ("off", Origin::Default));
    }
}
