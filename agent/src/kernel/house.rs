//! Keeping house: audits, forgetting what is gone, finding the kubelet again.

use std::{
    collections::HashSet,
    io,
    path::Path,
    sync::{Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use ebb_common::{LOST_EVENT, WorkloadKey};
use tokio_util::sync::CancellationToken;

use super::{Audit, earlier, inhabited, inner::Inner, programs::walk, prune};
use crate::{
    clock::boot_id,
    ids::{CgroupId, NetnsInode},
    lock::lock,
    pods::Scope,
};

/// How often the counters of pods that are gone are forgotten. The map has room for 16,384 workloads.
const PRUNE_EVERY: Duration = Duration::from_secs(600);

/// Now and then forgets what is gone, and makes good what was lost.
pub(super) async fn keep_house(inner: Weak<Inner>) {
    let mut uncounted_before = 0;
    loop {
        tokio::time::sleep(PRUNE_EVERY).await;
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let kept = tokio::task::spawn_blocking(move || {
            inner.find_kubelet();
            inner.prune();
            let uncounted = inner.uncounted();
            // There may be room or memory by now.
            if uncounted != uncounted_before {
                let _ = inner.audit(None, &CancellationToken::new());
            }
            uncounted
        });
        // Failing means panicking, which has been reported; the next time may go well.
        uncounted_before = kept.await.unwrap_or(uncounted_before);
    }
}

impl Inner {
    pub(super) fn find_kubelet(&self) {
        if let Some(search) = &self.kubelet {
            search.run(|ids| lock(&self.programs).set_kubelets(ids));
        }
    }

    pub(super) fn prune(&self) -> usize {
        let mut inhabited = inhabited::inodes();
        inhabited.insert(self.host.netns().inode());
        inhabited.extend(lock(&self.watched).keys());
        let cgroups = self.cgroup_root.as_deref().and_then(prune::cgroups);
        let counts = self.workloads.iter().filter_map(Result::ok);
        let gone = lock(&self.pruner).gone(counts, &inhabited, cgroups.as_ref());
        let mut programs = lock(&self.programs);
        let forgotten = gone
            .iter()
            .filter(|gone| programs.forgettable.remove(&gone.key).is_ok());
        forgotten
            .inspect(|gone| {
                if gone.leaked > 0 {
                    tracing::warn!(
                        "forgot {} flows of network namespace {}, which is gone: their ends were not counted",
                        gone.leaked,
                        gone.key.netns
                    );
                    self.drift.fetch_add(gone.leaked, Ordering::Relaxed);
                }
            })
            .count()
    }

    /// The namespaces in which something was counted.
    fn counted_namespaces(&self) -> HashSet<NetnsInode> {
        let keys = self.workloads.keys().filter_map(Result::ok);
        keys.map(|key| NetnsInode(key.netns)).collect()
    }

    /// Walks until there is no more time, then writes down what was found.
    pub(super) fn remember(&self, path: &Path, within: Duration) -> io::Result<usize> {
        let begun = Instant::now();
        let known = self.counted_namespaces();
        let mut flows = Vec::new();
        for one in inhabited::namespaces() {
            if begun.elapsed() < within && known.contains(&one.netns.inode()) {
                let link = lock(&self.programs).iterator("remember");
                match walk(link.map_err(io::Error::other)?, &one.netns) {
                    Ok(found) => flows.extend(found),
                    // That of a pod which ends just now: the others' are worth as much as before.
                    Err(e) => tracing::debug!("network namespace {}: {e}", one.netns.inode().0),
                }
            }
        }
        earlier::write(path, &boot_id()?, &flows)
    }

    /// Losses that left a flow uncounted.
    fn uncounted(&self) -> u64 {
        let losses = lock(&self.programs).losses().unwrap_or_default();
        losses.iter().sum::<u64>() - losses.get(LOST_EVENT as usize).unwrap_or(&0)
    }

    /// Until it is `unwanted`: then it ends with the walk under way.
    pub(super) fn audit(
        &self,
        scope: Option<&Scope>,
        unwanted: &CancellationToken,
    ) -> io::Result<Audit> {
        let mut auditor = lock(&self.auditor);
        if unwanted.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let turn = || self.walks.turn(unwanted);
        let found = match scope {
            Some(Scope::HostNetwork(cgroups)) => {
                let theirs = |key: &WorkloadKey| cgroups.contains(&CgroupId(key.cgroup));
                auditor.audit(&self.programs, &[self.host.netns()], theirs, turn)
            }
            Some(scope) => {
                let pool = self.pool(scope)?;
                auditor.audit(&self.programs, &[pool.netns()], |_| true, turn)
            }
            None => {
                let known = self.counted_namespaces();
                let mut there = inhabited::namespaces();
                // Neither a flow nor a counter: nothing to compare.
                there.retain(|n| known.contains(&n.netns.inode()) || !n.has_no_tcp());
                let namespaces: Vec<_> = there.iter().map(|n| &n.netns).collect();
                let mut found = auditor.audit(&self.programs, &namespaces, |_| true, turn);
                let inodes: HashSet<_> = namespaces.iter().map(|n| n.inode()).collect();
                let unseen = known.difference(&inodes).count();
                found.unseen += u32::try_from(unseen).unwrap_or(u32::MAX);
                found
            }
        };
        self.drift.fetch_add(found.drift, Ordering::Relaxed);
        if found.drift > 0 {
            tracing::warn!(
                "the counters were wrong by {} flows and have been corrected",
                found.drift
            );
        }
        Ok(found)
    }
}
