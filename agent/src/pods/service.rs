//! The shared way to the pods: one look at the runtime at a time, for all who need one.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, watch},
    time::{Instant, timeout},
};
use tracing::debug;

use super::{
    Pod,
    cri::{Cri, CriError},
    discover::{Discovery, Node},
    table::PodTable,
};
use crate::ids::ContainerId;

/// A look that failed. Shared by all who waited for it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot list this node's pods")]
pub struct RefreshError(#[source] pub Arc<CriError>);

/// The pods of this node.
#[derive(Debug)]
pub struct Pods {
    cri: Cri,
    /// The mount of cgroup v2.
    cgroup_root: PathBuf,
    looks: Mutex<Looks>,
    /// Looks begun so far.
    begun: AtomicU64,
    latest: watch::Sender<Arc<PodTable>>,
}

#[derive(Debug)]
struct Looks {
    discovery: Discovery,
    last: Option<Ended>,
}

/// The last look that came to an end.
#[derive(Debug)]
struct Ended {
    number: u64,
    at: Instant,
    outcome: Result<Arc<PodTable>, RefreshError>,
}

impl Pods {
    /// Starts with an empty table: [`Pods::refresh`] fills it.
    pub fn new(cri: Cri, node: Node) -> Self {
        Self {
            cgroup_root: node.cgroup_root.clone(),
            looks: Mutex::new(Looks {
                discovery: Discovery::new(cri.clone(), node),
                last: None,
            }),
            cri,
            begun: AtomicU64::new(0),
            latest: watch::Sender::new(Arc::default()),
        }
    }

    /// The mount of cgroup v2, where containers' cgroups are.
    pub fn cgroup_root(&self) -> &Path {
        &self.cgroup_root
    }

    /// The runtime's name and version.
    pub fn runtime(&self) -> &str {
        self.cri.runtime()
    }

    /// The pods as they were last seen, now and later: every look that succeeds, whoever made it.
    pub fn subscribe(&self) -> watch::Receiver<Arc<PodTable>> {
        self.latest.subscribe()
    }

    /// The pods as they were at the last successful look; empty before the first.
    pub fn latest(&self) -> Arc<PodTable> {
        self.latest.borrow().clone()
    }

    /// The pods as they are now: by a look that began after this call. Callers that wait at the same time
    /// share one.
    ///
    /// # Errors
    /// [`RefreshError`] if the runtime can't be asked; [`Pods::latest`] stays as it was.
    pub async fn refresh(&self) -> Result<Arc<PodTable>, RefreshError> {
        let begun = self.begun.load(Ordering::SeqCst);
        let mut looks = self.looks.lock().await;
        if let Some(last) = &looks.last
            && last.number > begun
        {
            return last.outcome.clone();
        }
        self.look(&mut looks).await
    }

    /// The outcome of the last look if it ended less than `age` ago, else of a new one. However many ask, and
    /// however often, the runtime is asked once in that time.
    ///
    /// # Errors
    /// [`RefreshError`] if the runtime could not be asked.
    pub async fn recent(&self, age: Duration) -> Result<Arc<PodTable>, RefreshError> {
        let mut looks = self.looks.lock().await;
        if let Some(last) = &looks.last
            && last.at.elapsed() < age
        {
            return last.outcome.clone();
        }
        self.look(&mut looks).await
    }

    async fn look(&self, looks: &mut Looks) -> Result<Arc<PodTable>, RefreshError> {
        // A caller that goes away in the middle takes its look along; the next one begins another.
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let outcome = match looks.discovery.list().await {
            Ok(pods) => Ok(Arc::new(PodTable::new(pods))),
            Err(e) => Err(RefreshError(Arc::new(e))),
        };
        if let Ok(table) = &outcome {
            self.latest.send_replace(Arc::clone(table));
        }
        looks.last = Some(Ended {
            number,
            at: Instant::now(),
            outcome: outcome.clone(),
        });
        outcome
    }

    /// The pods as they are now, or as they were last known if the runtime is away or takes longer than `limit`:
    /// one sandbox that is stuck must not hide all the others.
    ///
    /// # Errors
    /// [`RefreshError`] if the runtime can't be asked and no pod was ever known.
    pub async fn fresh(&self, limit: Duration) -> Result<Arc<PodTable>, RefreshError> {
        let known = self.latest();
        match timeout(limit, self.refresh()).await {
            Ok(Err(e)) if known.is_empty() => Err(e),
            Ok(Err(e)) => {
                debug!(error = %e.0, "going on with the pods known before");
                Ok(known)
            }
            Ok(Ok(table)) => Ok(table),
            Err(_) if known.is_empty() => {
                let late = self.cri.timed_out("ListPodSandbox", limit);
                Err(RefreshError(Arc::new(late)))
            }
            Err(_) => Ok(known),
        }
    }

    /// The pod that this container belongs to: from the last table if it is there, else by a new look.
    /// `None` if the runtime does not know it, or can't be asked.
    ///
    /// The pod may be from an earlier look: which of its containers run now, [`Pods::refresh`] tells.
    pub async fn by_container(&self, id: &ContainerId) -> Option<Arc<Pod>> {
        if let Some(pod) = self.latest().by_container(id) {
            return Some(Arc::clone(pod));
        }
        match self.refresh().await {
            Ok(table) => table.by_container(id).cloned(),
            Err(e) => {
                debug!(error = %e.0, container = %id, "cannot look an unknown container up");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use k8s_cri::v1;

    use super::*;
    use crate::{ids::NetnsInode, pods::testing::StandInRuntime};

    async fn pods(runtime: &StandInRuntime) -> Pods {
        let node = Node {
            host_netns: NetnsInode(0),
            proc: "/proc".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
        };
        Pods::new(Cri::connect(runtime.path()).await.unwrap(), node)
    }

    fn add_pod(runtime: &StandInRuntime, n: u32) {
        let mut state = runtime.state();
        let (sandbox, container) = (format!("s{n}"), format!("c{n}"));
        state.sandboxes.push(v1::PodSandbox {
            id: sandbox.clone(),
            labels: HashMap::from([("io.kubernetes.pod.uid".into(), format!("u{n}"))]),
            ..Default::default()
        });
        state
            .sandbox_status
            .insert(sandbox.clone(), v1::PodSandboxStatusResponse::default());
        state.containers.push(v1::Container {
            id: container,
            pod_sandbox_id: sandbox,
            ..Default::default()
        });
    }

    #[tokio::test]
    async fn callers_at_the_same_time_share_a_look_that_began_after_they_asked() {
        let runtime = StandInRuntime::start();
        let pods = Arc::new(pods(&runtime).await);
        runtime.state().delay = Duration::from_millis(50);
        let first = tokio::spawn({
            let pods = Arc::clone(&pods);
            async move { pods.refresh().await.unwrap().len() }
        });
        // In the middle of the first look, whose lists may have been made already.
        tokio::time::sleep(Duration::from_millis(80)).await;
        add_pod(&runtime, 1);
        let later = (0..20).map(|_| pods.refresh());
        for table in futures_util::future::join_all(later).await {
            assert_eq!(table.unwrap().len(), 1);
        }
        first.await.unwrap();
        // The first, the one that the first of the twenty began, and one for the other nineteen.
        assert_eq!(runtime.calls("ListPodSandbox"), 3);
    }

    #[tokio::test]
    async fn whoever_is_content_with_a_recent_look_costs_none() {
        let mut runtime = StandInRuntime::start();
        let pods = pods(&runtime).await;
        add_pod(&runtime, 1);
        let age = Duration::from_secs(3600);
        let all = futures_util::future::join_all((0..50).map(|_| pods.recent(age))).await;
        assert!(all.into_iter().all(|table| table.unwrap().len() == 1));
        assert_eq!(runtime.calls("ListPodSandbox"), 1);
        assert!(pods.recent(Duration::ZERO).await.is_ok());
        assert_eq!(runtime.calls("ListPodSandbox"), 2);
        runtime.stop();
        assert!(pods.recent(age).await.is_ok());
        assert!(pods.recent(Duration::ZERO).await.is_err());
        // A failure is as recent as any.
        assert!(pods.recent(age).await.is_err());
    }

    #[tokio::test]
    async fn an_unknown_container_is_looked_up_and_a_known_one_is_not() {
        let runtime = StandInRuntime::start();
        let pods = pods(&runtime).await;
        add_pod(&runtime, 1);
        let c1 = ContainerId::new("c1");
        for _ in 0..3 {
            assert_eq!(
                pods.by_container(&c1).await.unwrap().name.uid.as_str(),
                "u1"
            );
        }
        assert_eq!(runtime.calls("ListPodSandbox"), 1);
        assert!(pods.by_container(&ContainerId::new("c2")).await.is_none());
    }

    #[tokio::test]
    async fn without_the_runtime_the_last_table_serves_and_a_vanished_pod_goes_at_the_next_look() {
        let mut runtime = StandInRuntime::start();
        let pods = pods(&runtime).await;
        add_pod(&runtime, 1);
        pods.refresh().await.unwrap();
        runtime.stop();
        assert!(pods.refresh().await.is_err());
        assert_eq!(pods.latest().len(), 1);
        assert!(pods.by_container(&ContainerId::new("c1")).await.is_some());
        assert!(pods.by_container(&ContainerId::new("c9")).await.is_none());
        runtime.restart();
        runtime.state().sandboxes.clear();
        assert!(pods.refresh().await.unwrap().is_empty());
        assert!(pods.latest().is_empty());
    }

    #[tokio::test]
    async fn a_caller_that_gives_up_does_not_spoil_it_for_the_next() {
        let runtime = StandInRuntime::start();
        let pods = pods(&runtime).await;
        add_pod(&runtime, 1);
        runtime.state().delay = Duration::from_millis(200);
        let given_up = tokio::time::timeout(Duration::from_millis(50), pods.refresh()).await;
        assert!(given_up.is_err());
        assert_eq!(pods.refresh().await.unwrap().len(), 1);
    }
}
