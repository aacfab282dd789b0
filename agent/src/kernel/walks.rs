//! Who walks the node's connection table, and when.
//!
//! A walk costs the same whatever the namespace, and shows one namespace only. So those who ask for the same
//! namespace at the same time share one walk, and no more than two are made at a time, those of audits included. Nobody gets a walk
//! that had begun when he asked: what it shows may be older than what he knows.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit, oneshot},
};
use tokio_util::sync::CancellationToken;

use super::Look;
use crate::{ids::NetnsInode, lock::lock, pods::Scope};

/// More would only slow each other down, and the node.
const AT_ONCE: usize = 2;

/// Somebody who waits for a walk.
pub(super) struct Asker {
    /// Whose sockets are wanted.
    pub(super) scope: Scope,
    answer: oneshot::Sender<io::Result<Look>>,
}

/// The walks under way, and those to come.
pub(super) struct Walks {
    permits: Semaphore,
    /// Those who wait for a walk that has not begun. A namespace is here as long as somebody sees to it.
    waiting: Mutex<HashMap<NetnsInode, Vec<Asker>>>,
}

impl Default for Walks {
    fn default() -> Self {
        Self {
            permits: Semaphore::new(AT_ONCE),
            waiting: Mutex::default(),
        }
    }
}

impl Walks {
    /// The look of a walk of `netns` that begins from now on. `walk` looks for all these scopes, of one
    /// namespace, and gives each its look, in their order.
    pub(super) async fn look<W>(
        self: &Arc<Self>,
        netns: NetnsInode,
        scope: Scope,
        walk: W,
    ) -> io::Result<Look>
    where
        W: Fn(&[Scope]) -> io::Result<Vec<Look>> + Clone + Send + 'static,
    {
        let (answer, look) = oneshot::channel();
        let asker = Asker { scope, answer };
        match self.waiting().entry(netns) {
            Entry::Occupied(mut waiting) => waiting.get_mut().push(asker),
            Entry::Vacant(none) => {
                none.insert(vec![asker]);
                tokio::spawn(Arc::clone(self).see_to(netns, walk));
            }
        }
        look.await
            .unwrap_or_else(|_| Err(io::Error::other("the walk came to no end")))
    }

    /// Waits for the turn of a single walk, which lasts as long as the permit. `None` if nobody wants it any more.
    /// For threads of the runtime that may block.
    pub(super) fn turn(&self, unwanted: &CancellationToken) -> Option<SemaphorePermit<'_>> {
        let turn = unwanted.run_until_cancelled(self.permits.acquire());
        Handle::current().block_on(turn)?.ok()
    }

    /// A turn for one more walk at once, if there is one.
    pub(super) fn spare(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.try_acquire().ok()
    }

    /// Walks `netns` for as long as there is somebody who waits for it.
    async fn see_to<W>(self: Arc<Self>, netns: NetnsInode, walk: W)
    where
        W: Fn(&[Scope]) -> io::Result<Vec<Look>> + Clone + Send + 'static,
    {
        loop {
            // Fair: who has walked goes to the end of the queue. It is never closed.
            let _permit = self.permits.acquire().await;
            let Some(askers) = self.next(netns) else {
                return;
            };
            let (scopes, answers): (Vec<_>, Vec<_>) =
                askers.into_iter().map(|a| (a.scope, a.answer)).unzip();
            let walk = walk.clone();
            let looks = tokio::task::spawn_blocking(move || walk(&scopes))
                .await
                .unwrap_or_else(|e| Err(io::Error::other(e)));
            match looks {
                Ok(looks) => {
                    for (answer, look) in answers.into_iter().zip(looks) {
                        let _ = answer.send(Ok(look));
                    }
                }
                Err(e) => {
                    for answer in answers {
                        let _ = answer.send(Err(io::Error::new(e.kind(), e.to_string())));
                    }
                }
            }
        }
    }

    /// Those who wait for `netns`, and still do. From here on the walk has begun. `None`, and it is no longer
    /// seen to, if there is nobody.
    fn next(&self, netns: NetnsInode) -> Option<Vec<Asker>> {
        let mut all = self.waiting();
        let waiting = all.get_mut(&netns)?;
        waiting.retain(|asker| !asker.answer.is_closed());
        if waiting.is_empty() {
            all.remove(&netns);
            return None;
        }
        Some(std::mem::take(waiting))
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<NetnsInode, Vec<Asker>>> {
        lock(&self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        time::Duration,
    };

    use super::*;
    use crate::{clock::BootTime, ids::CgroupId};

    /// Walks that take a while, and are counted.
    #[derive(Default)]
    struct Counted {
        begun: AtomicU32,
        now: AtomicU32,
        most: AtomicU32,
    }

    impl Counted {
        fn walk(&self, scopes: &[Scope]) -> Vec<Look> {
            self.begun.fetch_add(1, Ordering::SeqCst);
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            let taken_at = BootTime::now();
            std::thread::sleep(Duration::from_millis(20));
            self.now.fetch_sub(1, Ordering::SeqCst);
            let look = Look {
                taken_at,
                samples: vec![],
            };
            scopes.iter().map(|_| look.clone()).collect()
        }
    }

    fn ask(
        walks: &Arc<Walks>,
        counted: &Arc<Counted>,
        netns: u32,
    ) -> tokio::task::JoinHandle<io::Result<Look>> {
        let (walks, counted) = (Arc::clone(walks), Arc::clone(counted));
        let scope = Scope::HostNetwork(vec![CgroupId(1)]);
        tokio::spawn(async move {
            let asked = BootTime::now();
            let walk = move |scopes: &[Scope]| Ok(counted.walk(scopes));
            let look = walks.look(NetnsInode(netns), scope, walk).await?;
            assert!(look.taken_at >= asked, "older than the question");
            Ok(look)
        })
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn those_who_ask_for_one_namespace_meanwhile_share_the_next_walk() {
        let (walks, counted) = (Arc::default(), Arc::default());
        let first = ask(&walks, &counted, 1);
        while counted.begun.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let others: Vec<_> = (0..10).map(|_| ask(&walks, &counted, 1)).collect();
        for look in others.into_iter().chain([first]) {
            look.await.unwrap().unwrap();
        }
        // Some of them may be slow to ask, but not all.
        assert!(counted.begun.load(Ordering::SeqCst) < 6, "nobody shared");
        assert_eq!(counted.most.load(Ordering::SeqCst), 1);
        assert!(walks.waiting().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_more_than_two_walks_are_made_at_a_time_and_all_get_theirs() {
        let (walks, counted) = (Arc::default(), Arc::default());
        let all: Vec<_> = (0..8).map(|n| ask(&walks, &counted, n)).collect();
        for look in all {
            look.await.unwrap().unwrap();
        }
        assert_eq!(counted.begun.load(Ordering::SeqCst), 8);
        assert!(counted.most.load(Ordering::SeqCst) <= 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_audit_takes_turns_with_looks_and_one_that_nobody_wants_gets_none() {
        let (walks, counted): (Arc<Walks>, Arc<Counted>) = (Arc::default(), Arc::default());
        let unwanted = CancellationToken::new();
        let audits: Vec<_> = (0..4)
            .map(|_| {
                let (walks, counted) = (Arc::clone(&walks), Arc::clone(&counted));
                let unwanted = unwanted.clone();
                tokio::task::spawn_blocking(move || {
                    let _turn = walks.turn(&unwanted).unwrap();
                    counted.walk(&[]);
                })
            })
            .collect();
        let looks: Vec<_> = (0..4).map(|n| ask(&walks, &counted, n)).collect();
        for audit in audits {
            audit.await.unwrap();
        }
        for look in looks {
            look.await.unwrap().unwrap();
        }
        assert_eq!(counted.begun.load(Ordering::SeqCst), 8);
        assert!(counted.most.load(Ordering::SeqCst) <= 2);
        // Who has walked looks for more to do, in his turn, before he ends.
        while !walks.waiting().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(walks.permits.acquire_many(2).await.unwrap());
        assert!(walks.spare().is_some(), "nobody walks");
        let all = walks.permits.acquire_many(2).await.unwrap();
        assert!(walks.spare().is_none(), "a third one");
        let late = tokio::task::spawn_blocking({
            let (walks, unwanted) = (Arc::clone(&walks), unwanted.clone());
            move || walks.turn(&unwanted).is_none()
        });
        unwanted.cancel();
        assert!(late.await.unwrap(), "got a turn");
        drop(all);
    }

    #[tokio::test]
    async fn a_walk_that_fails_or_panics_is_an_error_for_all_and_the_next_one_is_made() {
        let walks = Arc::new(Walks::default());
        let netns = NetnsInode(1);
        let scope = || Scope::HostNetwork(vec![]);
        let (a, b) = tokio::join!(
            walks.look(netns, scope(), |_: &[Scope]| Err(
                io::ErrorKind::NotFound.into()
            )),
            walks.look(netns, scope(), |_: &[Scope]| Err(
                io::ErrorKind::NotFound.into()
            )),
        );
        assert_eq!(a.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(b.unwrap_err().kind(), io::ErrorKind::NotFound);
        let panicked = walks.look(netns, scope(), |_: &[Scope]| panic!("as the test says"));
        assert!(panicked.await.is_err());
        while !walks.waiting().is_empty() {
            tokio::task::yield_now().await;
        }
        let counted = Counted::default();
        let counted = Arc::new(counted);
        ask(&walks, &counted, 1).await.unwrap().unwrap();
    }
}
