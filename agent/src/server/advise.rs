//! `GET /v1/advice`: what the drains that this agent knows say about each workload.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ebb_core::{
    advice::{WorkloadHistory, advise, is_usable},
    drain_report::Report,
    policy::{IdleFlows, Policy},
};
use ebb_protocol::views::{AdviceList, SCHEMA, WorkloadAdvice};

use super::api::Api;
use crate::{
    kernel::Tracker,
    pods::{Pod, table::PodTable},
    telemetry::workloads::Workloads,
};

/// The counters of connections, for how long they last.
pub(crate) struct ConnectionLifetimes {
    tracker: Tracker,
    workloads: Workloads,
}

impl ConnectionLifetimes {
    /// `tracker` has the counters, `workloads` the sums of earlier pods.
    pub(crate) const fn new(tracker: Tracker, workloads: Workloads) -> Self {
        Self { tracker, workloads }
    }

    /// Adds what was counted since the last time.
    async fn update(&self, table: &PodTable) {
        let tracker = self.tracker.clone();
        // Without the newest counts, the sums are those of the last time.
        let counts = tokio::task::spawn_blocking(move || tracker.counts()).await;
        self.workloads.learn(table.iter().map(|pod| &**pod));
        if let Ok(counts) = counts {
            self.workloads.count(&counts);
        }
    }
}

/// The advice for each workload with drains, by namespace and name.
pub(super) async fn list(api: &Api, table: &PodTable) -> AdviceList {
    api.lifetimes.update(table).await;
    let view = Arc::clone(&api.drains.view().borrow());
    let mut drains: BTreeMap<(String, String), Vec<&Report>> = BTreeMap::new();
    for report in view.finished.iter().filter(|r| is_usable(r)) {
        let workload = report.workload.clone();
        // A pod without a controller stands for itself.
        let workload = workload.unwrap_or_else(|| report.pod.name.clone());
        let key = (report.pod.namespace.clone(), workload);
        drains.entry(key).or_default().push(report);
    }
    let workloads = drains.into_iter().map(|((namespace, workload), drains)| {
        let running = table.iter().find(|pod| is_of(pod, &namespace, &workload));
        let policies = api.flows.policies();
        let policy = match running {
            Some(pod) => policies.policy(pod),
            None => policies.of_namespace(&namespace).0,
        };
        let history = history(
            drains,
            api.lifetimes.workloads.lifetimes(&namespace, &workload),
            running.and_then(|pod| policies.grace(pod)),
            &policy,
        );
        WorkloadAdvice {
            advice: advise(&history),
            namespace,
            workload,
        }
    });
    AdviceList {
        schema: SCHEMA.into(),
        workloads: workloads.collect(),
    }
}

fn is_of(pod: &Pod, namespace: &str, workload: &str) -> bool {
    let name = pod.workload.as_deref().unwrap_or(&pod.name.name);
    pod.name.namespace == namespace && name == workload
}

fn history<'a>(
    drains: Vec<&'a Report>,
    lifetimes: Vec<(Option<Duration>, u64)>,
    grace: Option<Duration>,
    policy: &Policy,
) -> WorkloadHistory<'a> {
    WorkloadHistory {
        drains,
        lifetimes,
        grace,
        reserve: policy.reserve,
        closes_idle: policy.idle_flows == IdleFlows::Close,
    }
}
