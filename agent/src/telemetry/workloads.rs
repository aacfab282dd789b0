//! Connections, drains and pods by namespace and workload, for metrics. Those of connections are sums of the programs'
//! counters, which are by cgroup and network namespace, over the pods of a Deployment or another controller.
//!
//! The sums keep what pods that are gone have counted, because a Prometheus counter must not decrease.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use ebb_common::LIFETIMES_MS;
use ebb_core::{
    drain_report::Report,
    ids::{CgroupId, NetnsInode},
    scope::Scope,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, MetricEncoder, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use crate::{kernel::WorkloadCount, linux::sync::lock, pods::Pod};

/// How many workloads have sums of their own. Further ones are counted together, as [`OTHERS`].
const MOST: usize = 512;

/// The workload and the namespace of those without sums of their own. Prometheus takes an empty label for none.
const OTHERS: &str = "others";

/// The label of a pod without a controller.
const BARE: &str = "none";

/// The labels of a sum. A pod's name is not one of them, because a node sees too many pods.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
pub(crate) struct WorkloadLabels {
    namespace: String,
    workload: String,
}

impl WorkloadLabels {
    fn new(namespace: &str, workload: Option<&str>) -> Self {
        Self {
            namespace: namespace.to_owned(),
            workload: workload.unwrap_or(BARE).to_owned(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkloadSums {
    /// Connections that the workload's pods have accepted.
    pub(crate) opened: u64,
    pub(crate) closed: u64,
    pub(crate) open: u64,
    /// The total lifetime of the connections that have ended.
    pub(crate) lifetime_sum: Duration,
    /// How many connections have ended, by the buckets of [`LIFETIMES_MS`].
    pub(crate) lifetimes: [u64; LIFETIMES_MS.len() + 1],
}

/// What identifies a pod's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum SocketKey {
    Netns(NetnsInode),
    Cgroup(CgroupId),
}

/// The sums of all workloads of the node. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Workloads(Arc<Mutex<WorkloadState>>);

#[derive(Debug, Default)]
struct WorkloadState {
    labels: HashMap<SocketKey, WorkloadLabels>,
    /// The counters as they were last added to the sums.
    counted: HashMap<(CgroupId, NetnsInode), WorkloadCount>,
    sums: BTreeMap<WorkloadLabels, WorkloadSums>,
    /// The pods of the last list.
    listed: BTreeMap<WorkloadLabels, PodCounts>,
    drains: BTreeMap<WorkloadLabels, DrainSums>,
    /// Of drains that were only observed.
    observed: BTreeMap<WorkloadLabels, DrainSums>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PodCounts {
    pods: u64,
    untracked: u64,
}

/// The drains of a workload that have ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct DrainSums {
    by_reason: BTreeMap<&'static str, u64>,
    /// Flows that were open at the release.
    cut: u64,
    /// Flows that opened during a drain.
    late: u64,
}

/// These labels, or [`others`] if the map has enough already.
fn bounded<T>(map: &BTreeMap<WorkloadLabels, T>, labels: &WorkloadLabels) -> WorkloadLabels {
    let is_full = map.len() >= MOST && !map.contains_key(labels);
    if is_full { others() } else { labels.clone() }
}

impl Workloads {
    /// Records the workloads of these pods. A pod that is gone is remembered until its last counters are added.
    pub(crate) fn learn<'a>(&self, pods: impl Iterator<Item = &'a Pod>) {
        let mut state = lock(&self.0);
        state.listed.clear();
        for pod in pods {
            let labels = WorkloadLabels::new(&pod.name.namespace, pod.workload.as_deref());
            for key in socket_keys(&pod.scope) {
                state.labels.insert(key, labels.clone());
            }
            let shown = bounded(&state.listed, &labels);
            let counts = state.listed.entry(shown).or_default();
            counts.pods += 1;
            counts.untracked += u64::from(matches!(pod.scope, Scope::Untracked(_)));
        }
    }

    /// How many connections of a workload have ended, by how long they lasted: the upper bound of each bucket, and its
    /// connections. Empty if the workload has no sums of its own.
    pub(crate) fn lifetimes(
        &self,
        namespace: &str,
        workload: &str,
    ) -> Vec<(Option<Duration>, u64)> {
        let state = lock(&self.0);
        let labels = WorkloadLabels {
            namespace: namespace.into(),
            workload: workload.into(),
        };
        let bounds = LIFETIMES_MS
            .iter()
            .map(|ms| Some(Duration::from_millis(*ms)));
        let sums = state.sums.get(&labels);
        sums.map_or_else(Vec::new, |sums| {
            bounds.chain([None]).zip(sums.lifetimes).collect()
        })
    }

    /// A drain has ended.
    pub(crate) fn drain_ended(&self, report: &Report) {
        add_drain(&mut lock(&self.0).drains, report);
    }

    /// A drain that was only observed has ended.
    pub(crate) fn drain_observed(&self, report: &Report) {
        add_drain(&mut lock(&self.0).observed, report);
    }

    /// Adds a workload, so that every metric has a series.
    pub(super) fn add_example(&self, reason: &'static str) {
        let (mut state, labels) = (lock(&self.0), others());
        state.sums.insert(labels.clone(), WorkloadSums::default());
        state.listed.insert(labels.clone(), PodCounts::default());
        let drains = DrainSums {
            by_reason: BTreeMap::from([(reason, 1)]),
            ..DrainSums::default()
        };
        state.observed.insert(labels.clone(), drains.clone());
        state.drains.insert(labels, drains);
    }

    /// Adds what was counted since the last time.
    pub(crate) fn count(&self, counts: &[WorkloadCount]) {
        let mut state = lock(&self.0);
        let state = &mut *state;
        for sums in state.sums.values_mut() {
            sums.open = 0;
        }
        let mut counted = HashMap::new();
        for now in counts {
            let by_netns = state.labels.get(&SocketKey::Netns(now.netns));
            let labels = by_netns.or_else(|| state.labels.get(&SocketKey::Cgroup(now.cgroup)));
            // Not a pod's, or not known yet. In that case, a later call adds the whole counter.
            let Some(labels) = labels else { continue };
            let key = (now.cgroup, now.netns);
            let before = state.counted.get(&key);
            let labels = bounded(&state.sums, labels);
            state.sums.entry(labels).or_default().add(now, before);
            counted.insert(key, *now);
        }
        state.counted = counted;
        // `learn` adds the pods that still exist again.
        let has_counters: HashSet<_> = counts
            .iter()
            .flat_map(|c| [SocketKey::Netns(c.netns), SocketKey::Cgroup(c.cgroup)])
            .collect();
        state.labels.retain(|key, _| has_counters.contains(key));
    }
}

impl WorkloadState {
    fn encode_pods(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Pods on the node.";
        let mut pods = encoder.encode_descriptor("pods", help, None, MetricType::Gauge)?;
        for (labels, counts) in &self.listed {
            encode_gauge(&mut pods, labels, counts.pods)?;
        }
        let help = "Pods whose connections ebb cannot see, so that it holds them for the settle time alone.";
        let mut untracked =
            encoder.encode_descriptor("untracked_pods", help, None, MetricType::Gauge)?;
        for (labels, counts) in &self.listed {
            encode_gauge(&mut untracked, labels, counts.untracked)?;
        }
        Ok(())
    }

    fn encode_drains(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Drains that have ended, by reason.";
        encode_reasons(encoder, "drains", help, &self.drains)?;
        let help = "Drains that were only observed and have ended, by reason.";
        encode_reasons(encoder, "observed_drains", help, &self.observed)?;
        let help = "Connections that were open when a drain was released, and so were cut.";
        self.encode_sums(encoder, "flows_cut", help, &self.drains, |sums| sums.cut)?;
        let help = "Connections that were cut by stops that were only observed.";
        self.encode_sums(
            encoder,
            "observed_flows_cut",
            help,
            &self.observed,
            |sums| sums.cut,
        )?;
        let help = "Connections that opened during a drain.";
        self.encode_sums(encoder, "flows_late", help, &self.drains, |sums| sums.late)
    }

    /// Encodes a counter for each workload. Those that had no drain are among them, because `increase()` does not see
    /// the first value of a series.
    fn encode_sums(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        drains: &BTreeMap<WorkloadLabels, DrainSums>,
        value: fn(&DrainSums) -> u64,
    ) -> fmt::Result {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        let workloads: BTreeSet<_> = self.listed.keys().chain(drains.keys()).collect();
        for labels in workloads {
            let n = drains.get(labels).map_or(0, value);
            ConstCounter::new(n).encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }
}

fn add_drain(drains: &mut BTreeMap<WorkloadLabels, DrainSums>, report: &Report) {
    let labels = WorkloadLabels::new(&report.pod.namespace, report.workload.as_deref());
    let labels = bounded(drains, &labels);
    let sums = drains.entry(labels).or_default();
    let reason = report.reason.map_or("unknown", |r| r.name());
    *sums.by_reason.entry(reason).or_default() += 1;
    sums.cut += u64::from(report.cut_total.unwrap_or(0));
    sums.late += u64::from(report.arrived.unwrap_or(0));
}

fn encode_reasons(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    drains: &BTreeMap<WorkloadLabels, DrainSums>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, sums) in drains {
        for (reason, n) in &sums.by_reason {
            let labels = [
                ("namespace", &*labels.namespace),
                ("workload", &*labels.workload),
                ("reason", *reason),
            ];
            ConstCounter::new(*n).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_gauge(family: &mut MetricEncoder<'_>, labels: &WorkloadLabels, n: u64) -> fmt::Result {
    let n = i64::try_from(n).unwrap_or(i64::MAX);
    ConstGauge::new(n).encode(family.encode_family(labels)?)
}

impl Collector for Workloads {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = lock(&self.0);
        state.encode_pods(&mut encoder)?;
        state.encode_drains(&mut encoder)?;
        let help = "TCP connections that pods have accepted.";
        let mut opened =
            encoder.encode_descriptor("connections_opened", help, None, MetricType::Counter)?;
        for (labels, sums) in &state.sums {
            ConstCounter::new(sums.opened).encode(opened.encode_family(labels)?)?;
        }
        let help = "Accepted TCP connections that have ended.";
        let mut closed =
            encoder.encode_descriptor("connections_closed", help, None, MetricType::Counter)?;
        for (labels, sums) in &state.sums {
            ConstCounter::new(sums.closed).encode(closed.encode_family(labels)?)?;
        }
        let help = "Accepted TCP connections that are open.";
        let mut open =
            encoder.encode_descriptor("connections_open", help, None, MetricType::Gauge)?;
        for (labels, sums) in &state.sums {
            encode_gauge(&mut open, labels, sums.open)?;
        }
        let help = "Lifetime of the accepted TCP connections that were opened and closed while the agent ran.";
        let unit = Some(&Unit::Seconds);
        let mut lifetime =
            encoder.encode_descriptor("connection_lifetime", help, unit, MetricType::Histogram)?;
        for (labels, sums) in &state.sums {
            let bounds = LIFETIMES_MS.iter().map(|ms| *ms as f64 / 1000.0);
            let bounds = bounds.chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(sums.lifetimes).collect();
            lifetime
                .encode_family(labels)?
                .encode_histogram::<NoLabelSet>(
                    sums.lifetime_sum.as_secs_f64(),
                    sums.lifetimes.iter().sum(),
                    &buckets,
                    None,
                )?;
        }
        Ok(())
    }
}

fn socket_keys(scope: &Scope) -> Vec<SocketKey> {
    match scope {
        Scope::Netns { inode, .. } => vec![SocketKey::Netns(*inode)],
        Scope::HostNetwork(cgroups) => cgroups.iter().copied().map(SocketKey::Cgroup).collect(),
        Scope::Untracked(_) => vec![],
    }
}

fn others() -> WorkloadLabels {
    WorkloadLabels {
        namespace: OTHERS.into(),
        workload: OTHERS.into(),
    }
}

impl WorkloadSums {
    fn add(&mut self, now: &WorkloadCount, before: Option<&WorkloadCount>) {
        // A counter that has shrunk was removed, because its cgroup is gone, and started again at zero.
        let before = before.filter(|b| b.opened <= now.opened && b.closed <= now.closed);
        let since = |now: u64, before: Option<u64>| now.saturating_sub(before.unwrap_or(0));
        self.opened += since(now.opened, before.map(|b| b.opened));
        self.closed += since(now.closed, before.map(|b| b.closed));
        self.open += now.open;
        self.lifetime_sum += now
            .lifetime_sum
            .saturating_sub(before.map_or(Duration::ZERO, |b| b.lifetime_sum));
        for (n, sum) in self.lifetimes.iter_mut().enumerate() {
            let before = before.map(|b| b.lifetimes[n]);
            *sum += since(now.lifetimes[n], before);
        }
    }
}

#[cfg(test)]
mod tests {
    use ebb_core::drain_report::{ReleaseReason, testing::report};

    use super::*;
    use crate::pods::table::tests::pod;

    fn pod_of(workload: &str, netns: u32) -> Pod {
        Pod {
            workload: Some(workload.into()),
            scope: Scope::Netns {
                inode: NetnsInode(netns),
                pid: 1,
            },
            ..pod("u", "web", &[])
        }
    }

    fn count(netns: u32, opened: u64, closed: u64) -> WorkloadCount {
        let mut lifetimes = [0; LIFETIMES_MS.len() + 1];
        lifetimes[2] = closed;
        WorkloadCount {
            cgroup: CgroupId(1),
            netns: NetnsInode(netns),
            opened,
            closed,
            open: opened - closed,
            lifetime_sum: Duration::from_secs(closed),
            lifetimes,
        }
    }

    fn summed(
        workloads: &Workloads,
        counts: &[WorkloadCount],
    ) -> BTreeMap<WorkloadLabels, WorkloadSums> {
        workloads.count(counts);
        lock(&workloads.0).sums.clone()
    }

    fn of(sums: &BTreeMap<WorkloadLabels, WorkloadSums>, workload: &str) -> (u64, u64, u64) {
        let found = sums.iter().find(|(labels, _)| labels.workload == workload);
        let (_, sums) = found.unwrap();
        assert_eq!(sums.lifetime_sum, Duration::from_secs(sums.closed));
        assert_eq!(sums.lifetimes[2], sums.closed);
        (sums.opened, sums.closed, sums.open)
    }

    #[test]
    fn the_sums_of_a_workload_include_its_pods_that_are_gone() {
        let workloads = Workloads::default();
        workloads.learn([&pod_of("web", 1), &pod_of("web", 2), &pod_of("db", 3)].into_iter());
        let sums = summed(
            &workloads,
            &[count(1, 5, 2), count(2, 1, 0), count(3, 7, 7)],
        );
        assert_eq!(of(&sums, "web"), (6, 2, 4));
        assert_eq!(of(&sums, "db"), (7, 7, 0));
        let lasted = workloads.lifetimes("shop", "web");
        assert_eq!(lasted.len(), LIFETIMES_MS.len() + 1);
        assert_eq!(lasted[2], (Some(Duration::from_secs(1)), 2));
        assert_eq!(lasted[LIFETIMES_MS.len()], (None, 0));
        assert_eq!(workloads.lifetimes("other", "web"), []);
        let sums = summed(&workloads, &[count(1, 6, 6)]);
        assert_eq!(of(&sums, "web"), (7, 6, 0));
        assert_eq!(of(&sums, "db"), (7, 7, 0));
    }

    #[test]
    fn a_counter_that_started_again_is_added_whole() {
        let workloads = Workloads::default();
        workloads.learn([&pod_of("web", 1)].into_iter());
        workloads.count(&[count(1, 100, 100)]);
        let sums = summed(&workloads, &[count(1, 3, 2)]);
        assert_eq!(of(&sums, "web"), (103, 102, 1));
    }

    #[test]
    fn sockets_are_not_counted_before_their_pod_is_known() {
        let workloads = Workloads::default();
        assert!(summed(&workloads, &[count(1, 5, 2)]).is_empty());
        workloads.learn([&pod_of("web", 1)].into_iter());
        assert_eq!(of(&summed(&workloads, &[count(1, 5, 2)]), "web"), (5, 2, 3));
    }

    fn text(workloads: &Workloads) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(workloads.clone()));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn drains_count_for_their_workloads_and_a_workload_without_any_has_series_too() {
        let workloads = Workloads::default();
        workloads.learn([&pod_of("db", 2)].into_iter());
        let mut ended = report(Some(ReleaseReason::Deadline));
        ended.workload = Some("web".into());
        ended.cut_total = Some(3);
        workloads.drain_ended(&ended);
        ended.workload = None;
        workloads.drain_ended(&ended);
        workloads.drain_observed(&ended);
        let text = text(&workloads);
        for series in [
            "drains_total{namespace=\"shop\",workload=\"web\",reason=\"deadline\"} 1",
            "observed_drains_total{namespace=\"shop\",workload=\"none\",reason=\"deadline\"} 1",
            "flows_cut_total{namespace=\"shop\",workload=\"web\"} 3",
            "flows_cut_total{namespace=\"shop\",workload=\"none\"} 3",
            "flows_cut_total{namespace=\"shop\",workload=\"db\"} 0",
            "flows_late_total{namespace=\"shop\",workload=\"web\"} 2",
            "observed_flows_cut_total{namespace=\"shop\",workload=\"none\"} 3",
            "observed_flows_cut_total{namespace=\"shop\",workload=\"db\"} 0",
        ] {
            assert!(
                text.lines().any(|line| line == series),
                "no {series} in {text}"
            );
        }
    }

    #[test]
    fn pods_are_counted_by_the_last_list() {
        let workloads = Workloads::default();
        let hidden = Pod {
            scope: Scope::Untracked("runsc".into()),
            ..pod_of("web", 9)
        };
        workloads.learn([&pod_of("web", 1), &hidden, &pod_of("db", 2)].into_iter());
        workloads.learn([&pod_of("web", 1), &hidden].into_iter());
        let listed: Vec<_> = lock(&workloads.0).listed.clone().into_iter().collect();
        let counts = PodCounts {
            pods: 2,
            untracked: 1,
        };
        assert_eq!(listed.len(), 1);
        assert_eq!((&*listed[0].0.workload, listed[0].1), ("web", counts));
    }

    #[test]
    fn the_number_of_label_sets_is_bounded() {
        let workloads = Workloads::default();
        let pods: Vec<_> = (0..2 * MOST as u32)
            .map(|n| pod_of(&format!("w{n}"), n + 1))
            .collect();
        workloads.learn(pods.iter());
        let counts: Vec<_> = (0..2 * MOST as u32).map(|n| count(n + 1, 1, 0)).collect();
        let sums = summed(&workloads, &counts);
        assert_eq!(sums.len(), MOST + 1);
        assert_eq!(of(&sums, OTHERS).0, MOST as u64);
        assert_eq!(lock(&workloads.0).listed.len(), MOST + 1);
        for n in 0..2 * MOST {
            let mut report = report(Some(ReleaseReason::Drained));
            report.pod.namespace = format!("n{n}");
            workloads.drain_ended(&report);
        }
        assert_eq!(lock(&workloads.0).drains.len(), MOST + 1);
    }
}
