//! Explains why the stops of a pod were held or forwarded (`GET /v1/explain`).

use std::{collections::BTreeMap, time::Duration};

use ebb_core::{
    clock::{BootTime, millis},
    ids::PodName,
    policy::{CallLimits, DEFAULT_GRACE, DrainMode, Policy, annotations::PREFIX},
    time_budget::TimeBudget,
};
use ebb_protocol::views::{Explanation, PolicyView, SCHEMA, Setting, SettingSource};

use super::api::Api;
use crate::pods::{
    Pod,
    table::{FindError, PodTable, is_called},
};

/// How much longer than the stop's timeout the kubelet waits: the default of `runtimeRequestTimeout`.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// The shortest timeout of a StopContainer (`minimumGracePeriodInSeconds` in kubelet's
/// `pkg/kubelet/kuberuntime/kuberuntime_container.go`).
const SHORTEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Explains the pod of this name or UID, also one that is gone if its stops or its drain are remembered.
pub(super) fn explain(api: &Api, table: &PodTable, wanted: &str) -> Result<Explanation, FindError> {
    let listed = table.find(wanted);
    let removed = match &listed {
        Ok(pod) if is_called(&pod.name, wanted) => None,
        // `wanted` may be the whole name of a pod that is gone, and only the beginning of the other's name.
        _ => find_removed(api, wanted),
    };
    let (name, pod) = match (removed, listed) {
        (Some(name), _) => (name, None),
        (None, Ok(pod)) => (pod.name.clone(), Some(pod)),
        (None, Err(e)) => return Err(e),
    };
    let view = api.drains.view().borrow().clone();
    let over = || {
        let report = view.finished.iter().find(|r| r.pod.uid == name.uid);
        report.map(|r| r.as_ref().clone())
    };
    let drain = view
        .under_way(BootTime::now())
        .find(|r| r.pod.uid == name.uid)
        .or_else(over);
    let kube = api.flows.policies().kube().pods().borrow().clone();
    Ok(Explanation {
        schema: SCHEMA.into(),
        agent_since: api.started.rfc3339(),
        deleting: kube.synced.then(|| kube.is_deleting(&name.uid)),
        now: pod.map(|pod| policy(api, pod)),
        drain,
        lifetimes: vec![],
        stops: api.holds.stops().of(|stop| stop.pod.uid == name.uid),
        pod: name,
    })
}

/// Finds a pod that is no longer on the node, by its whole name or UID. Of several, the one that was stopped last.
fn find_removed(api: &Api, wanted: &str) -> Option<PodName> {
    let is = |pod: &PodName| is_called(pod, wanted);
    let stopped = api.holds.stops().of(|stop| is(&stop.pod)).into_iter();
    let stopped = stopped.map(|stop| stop.pod).next();
    let view = api.drains.view();
    let view = view.borrow();
    stopped.or_else(|| {
        let drained = view.finished.iter().find(|r| is(&r.pod));
        drained.map(|r| r.pod.clone())
    })
}

fn policy(api: &Api, pod: &Pod) -> PolicyView {
    let policies = api.flows.policies();
    let annotations = policies.annotations(pod);
    let (of_namespace, _) = policies.of_namespace(&pod.name.namespace);
    let (policy, warnings) = policies.policy_and_warnings(pod);
    let grace = policies.grace(pod);
    let sleeps = pod.containers.iter().filter(|c| c.running);
    let sleep = sleeps.map(|c| c.pre_stop_sleep).max().unwrap_or_default();
    // The kubelet takes whole seconds off, and leaves two.
    let whole = Duration::from_secs(sleep.as_secs());
    let timeout = grace.unwrap_or(DEFAULT_GRACE).saturating_sub(whole);
    let timeout = timeout.max(SHORTEST_TIMEOUT);
    let limits = CallLimits {
        grace: Some(timeout),
        rpc_timeout: Some(timeout.saturating_add(REQUEST_TIMEOUT)),
    };
    let never_held = never_held(&policy, limits, sleep);
    let deadline = match never_held {
        Some(_) => Duration::ZERO,
        None => policy.deadline(limits).after,
    };
    PolicyView {
        settings: settings(&policy, policies.node(), &of_namespace, &annotations),
        warnings,
        grace_ms: grace.map(millis),
        pre_stop_sleep_ms: Some(millis(sleep)).filter(|ms| *ms > 0),
        reserve_ms: millis(policy.effective_reserve(timeout)),
        deadline_ms: millis(deadline),
        never_held,
    }
}

/// Why the proxy forwards each stop of the pod at once, even one with these limits, its whole grace period.
fn never_held(policy: &Policy, limits: CallLimits, sleep: Duration) -> Option<String> {
    match policy.drain {
        DrainMode::On => {}
        DrainMode::Observe => {
            return Some(
                "its policy is drain: observe, so ebb forwards each stop at once, and reports how long it would have held the \
                 pod and what the stop cut"
                    .into(),
            );
        }
        DrainMode::Off => return Some("its policy is drain: off".into()),
    }
    let budget = TimeBudget {
        timeout: limits.grace,
        rpc_timeout: limits.rpc_timeout,
    };
    let what = match sleep.is_zero() {
        true => "its grace period is",
        false => "of its grace period, the sleep of its preStop hook leaves",
    };
    (!budget.allows_hold()).then(|| {
        format!(
            "{what} 2 s or less, as in a forced kill or a hard eviction, and ebb holds no such stop"
        )
    })
}

/// The settings of a pod's policy on a node with the policy `node`, in a namespace whose pods have the policy
/// `of_namespace`, and the source of each. An invalid annotation is no source.
fn settings(
    policy: &Policy,
    node: &Policy,
    of_namespace: &Policy,
    annotations: &BTreeMap<String, String>,
) -> Vec<Setting> {
    let defaults = Policy::default().settings();
    let of_node = node.settings();
    let in_namespace = of_namespace.settings();
    let mut settings = Vec::new();
    for (i, (name, value)) in policy.settings().into_iter().enumerate() {
        let annotation = format!("{PREFIX}{name}");
        let alone = annotations
            .get_key_value(&annotation)
            .map(|(k, v)| BTreeMap::from([(k.clone(), v.clone())]));
        // Parsed alone, because a warning about two annotations together does not make one of them invalid.
        let obeyed = alone.is_some_and(|a| {
            let (read, warnings) = of_namespace.from_annotations(&a);
            warnings.is_empty() || read != *of_namespace
        });
        let from = if obeyed {
            SettingSource::Annotation
        } else if in_namespace[i].1 != of_node[i].1 {
            SettingSource::Namespace
        } else if of_node[i].1 == defaults[i].1 {
            SettingSource::Default
        } else {
            SettingSource::Node
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
            SettingSource::Node
        } else {
            SettingSource::Default
        },
    });
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_whose_grace_period_is_too_short_is_never_held() {
        let limits = |seconds| {
            let grace = Duration::from_secs(seconds);
            CallLimits {
                grace: Some(grace),
                rpc_timeout: Some(grace + REQUEST_TIMEOUT),
            }
        };
        let on = Policy::default();
        let why = never_held(&on, limits(2), Duration::ZERO).unwrap();
        assert!(why.contains("2 s or less"), "{why}");
        let why = never_held(&on, limits(2), Duration::from_secs(30)).unwrap();
        assert!(why.contains("preStop"), "{why}");
        assert_eq!(never_held(&on, limits(3), Duration::ZERO), None);
        let off = Policy {
            drain: DrainMode::Off,
            ..on
        };
        assert!(
            never_held(&off, limits(30), Duration::ZERO)
                .unwrap()
                .contains("drain: off")
        );
    }

    #[test]
    fn each_setting_has_its_source() {
        let node = Policy {
            reserve: Duration::from_secs(7),
            quiet: Duration::from_secs(1),
            ..Policy::default()
        };
        let annotations: BTreeMap<String, String> = [
            ("ebb.dev/until", "idle"),
            ("ebb.dev/quiet", "2s"),
            ("ebb.dev/max-hold", "forever"),
            // The default, but set by the annotation.
            ("ebb.dev/idle-flows", "keep"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
        let of_namespace = Policy {
            drain: DrainMode::Observe,
            ..node.clone()
        };
        let (policy, _) = of_namespace.from_annotations(&annotations);
        let all = settings(&policy, &node, &of_namespace, &annotations);
        let of = |name: &str| {
            let setting = all.iter().find(|s| s.name == name).unwrap();
            (setting.value.as_str(), setting.from)
        };
        assert_eq!(of("drain"), ("observe", SettingSource::Namespace));
        assert_eq!(of("until"), ("idle", SettingSource::Annotation));
        assert_eq!(of("quiet"), ("2s", SettingSource::Annotation));
        assert_eq!(of("idle-flows"), ("keep", SettingSource::Annotation));
        assert_eq!(of("max-hold"), ("1h", SettingSource::Default));
        assert_eq!(of("reserve"), ("7s", SettingSource::Node));
        assert_eq!(of("ports"), ("all", SettingSource::Default));
        assert_eq!(of("extend"), ("off", SettingSource::Default));
    }
}
