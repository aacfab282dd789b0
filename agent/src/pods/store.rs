//! The pods of this node, which all callers share. One list runs at a time.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use ebb_core::{clock::BootTime, ids::ContainerId};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, timeout},
};
use tracing::debug;

use super::{
    cri::{Cri, CriError},
    discover::{Discovery, NodePaths},
    table::PodTable,
};

/// A list that failed. All callers that waited for it share it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot list this node's pods")]
pub struct RefreshError(#[source] pub Arc<CriError>);

/// The pods of this node.
#[derive(Debug)]
pub struct Pods {
    cri: Cri,
    /// The mount of cgroup v2.
    cgroup_root: PathBuf,
    lists: Mutex<Lists>,
    /// How many lists were started.
    started: AtomicU64,
    latest: watch::Sender<Arc<PodTable>>,
}

#[derive(Debug)]
struct Lists {
    discovery: Discovery,
    last: Option<Ended>,
}

/// The last list that ended.
#[derive(Debug)]
struct Ended {
    number: u64,
    at: Instant,
    outcome: Result<Arc<PodTable>, RefreshError>,
}

impl Pods {
    /// Starts with an empty table: [`Pods::refresh`] fills it.
    pub fn new(cri: Cri, node: NodePaths) -> Self {
        Self {
            cgroup_root: node.cgroup_root.clone(),
            lists: Mutex::new(Lists {
                discovery: Discovery::new(cri.clone(), node),
                last: None,
            }),
            cri,
            started: AtomicU64::new(0),
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

    /// Receives the table of the last successful list, and of every later one.
    pub fn subscribe(&self) -> watch::Receiver<Arc<PodTable>> {
        self.latest.subscribe()
    }

    /// The table of the last successful list; empty before the first.
    pub fn latest(&self) -> Arc<PodTable> {
        self.latest.borrow().clone()
    }

    /// Lists the pods. Callers share one list; none joins a list that started before its call.
    ///
    /// # Errors
    /// [`RefreshError`] if the list fails; [`Pods::latest`] stays as it was.
    pub async fn refresh(&self) -> Result<Arc<PodTable>, RefreshError> {
        let started = self.started.load(Ordering::SeqCst);
        let mut lists = self.lists.lock().await;
        if let Some(last) = &lists.last
            && last.number > started
        {
            return last.outcome.clone();
        }
        self.list(&mut lists).await
    }

    /// The outcome of the last list if it ended less than `age` ago, else of a new one. However many callers there
    /// are, this makes at most one list per `age`.
    ///
    /// # Errors
    /// [`RefreshError`] if the list failed.
    pub async fn recent(&self, age: Duration) -> Result<Arc<PodTable>, RefreshError> {
        let mut lists = self.lists.lock().await;
        if let Some(last) = &lists.last
            && last.at.elapsed() < age
        {
            return last.outcome.clone();
        }
        self.list(&mut lists).await
    }

    async fn list(&self, lists: &mut Lists) -> Result<Arc<PodTable>, RefreshError> {
        // If the caller is dropped, so is its list; the next caller starts another.
        let number = self.started.fetch_add(1, Ordering::SeqCst) + 1;
        let outcome = match lists.discovery.list().await {
            Ok(pods) => Ok(Arc::new(PodTable::new(pods))),
            Err(e) => Err(RefreshError(Arc::new(e))),
        };
        if let Ok(table) = &outcome {
            self.latest.send_replace(Arc::clone(table));
        }
        lists.last = Some(Ended {
            number,
            at: Instant::now(),
            outcome: outcome.clone(),
        });
        outcome
    }

    /// Like [`Pods::refresh`], but returns the last known pods if the list fails or takes longer than `limit`: one
    /// sandbox that hangs must not hide all the others.
    ///
    /// # Errors
    /// [`RefreshError`] if the list fails or is late, and no pod is known.
    pub async fn refresh_or_cached(&self, limit: Duration) -> Result<Arc<PodTable>, RefreshError> {
        let known = self.latest();
        match timeout(limit, self.refresh()).await {
            Ok(Err(e)) if known.is_empty() => Err(e),
            Ok(Err(e)) => {
                debug!(error = %e.0, "using the last known pods");
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

    /// When a container exited, by the runtime. `None` if it runs, the runtime does not know it, or does not answer.
    pub async fn exited_at(&self, id: &ContainerId) -> Option<BootTime> {
        let status = self.cri.container_status(id).await.ok()??.status?;
        let nanos = u64::try_from(status.finished_at).ok().filter(|n| *n > 0)?;
        Some(BootTime::from_system_time(
            SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use k8s_cri::v1;

    use super::*;
    use crate::pods::testing::FakeRuntime;
    use ebb_core::ids::NetnsInode;

    async fn pods(runtime: &FakeRuntime) -> Pods {
        let node = NodePaths {
            host_netns: NetnsInode(0),
            proc: "/proc".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
        };
        Pods::new(Cri::connect(runtime.path()).await.unwrap(), node)
    }

    fn add_pod(runtime: &FakeRuntime, n: u32) {
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
    async fn concurrent_callers_share_a_list_that_started_after_their_calls() {
        let runtime = FakeRuntime::start();
        let pods = Arc::new(pods(&runtime).await);
        runtime.state().delay = Duration::from_millis(50);
        let first = tokio::spawn({
            let pods = Arc::clone(&pods);
            async move { pods.refresh().await.unwrap().len() }
        });
        // During the first list, which may have the runtime's answer already.
        tokio::time::sleep(Duration::from_millis(80)).await;
        add_pod(&runtime, 1);
        let later = (0..20).map(|_| pods.refresh());
        for table in futures_util::future::join_all(later).await {
            assert_eq!(table.unwrap().len(), 1);
        }
        first.await.unwrap();
        // The first, one that the first of the twenty started, and one for the other nineteen.
        assert_eq!(runtime.calls("ListPodSandbox"), 3);
    }

    #[tokio::test]
    async fn a_caller_that_accepts_a_recent_list_starts_none() {
        let mut runtime = FakeRuntime::start();
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
        // A list that failed counts as recent, too.
        assert!(pods.recent(age).await.is_err());
    }

    #[tokio::test]
    async fn without_the_runtime_the_last_table_is_used_and_the_next_list_drops_removed_pods() {
        let mut runtime = FakeRuntime::start();
        let pods = pods(&runtime).await;
        add_pod(&runtime, 1);
        pods.refresh().await.unwrap();
        runtime.stop();
        assert!(pods.refresh().await.is_err());
        assert_eq!(pods.latest().len(), 1);
        runtime.restart();
        runtime.state().sandboxes.clear();
        assert!(pods.refresh().await.unwrap().is_empty());
        assert!(pods.latest().is_empty());
    }

    #[tokio::test]
    async fn a_caller_that_times_out_does_not_affect_the_next() {
        let runtime = FakeRuntime::start();
        let pods = pods(&runtime).await;
        add_pod(&runtime, 1);
        runtime.state().delay = Duration::from_millis(200);
        let timed_out = tokio::time::timeout(Duration::from_millis(50), pods.refresh()).await;
        assert!(timed_out.is_err());
        assert_eq!(pods.refresh().await.unwrap().len(), 1);
    }
}
