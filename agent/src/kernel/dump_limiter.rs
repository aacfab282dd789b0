//! Shares dumps between callers, and limits how many run at a time.
//!
//! A dump shows one namespace, but visits the table of the whole node, so each costs the same. Concurrent callers for
//! one namespace share a dump, and at most two dumps run at a time. No caller joins a dump that started before it
//! called: that dump may be older than what the caller knows.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use ebb_core::{ids::NetnsInode, scope::Scope};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
};

use super::SocketDump;
use crate::linux::sync::lock;

/// More would only slow down each other and the node.
const MAX_CONCURRENT: usize = 2;

/// A caller that waits for a dump.
struct Caller {
    scope: Scope,
    reply: oneshot::Sender<io::Result<SocketDump>>,
}

pub(super) struct DumpLimiter {
    permits: Semaphore,
    /// The callers that wait for a dump to start. A namespace has an entry as long as a task serves it.
    waiting: Mutex<HashMap<NetnsInode, Vec<Caller>>>,
    /// Runs all dumps. A caller's own runtime may shut down before the other callers of its dump have their result.
    runtime: Handle,
}

impl DumpLimiter {
    pub(super) fn new(runtime: Handle) -> Self {
        Self {
            permits: Semaphore::new(MAX_CONCURRENT),
            waiting: Mutex::default(),
            runtime,
        }
    }

    /// A dump of `scope` in `netns` that starts after this call. `dump` makes one dump of the namespace for several
    /// scopes, and returns one result per scope, in the same order.
    pub(super) async fn dump<D>(
        self: &Arc<Self>,
        netns: NetnsInode,
        scope: Scope,
        dump: D,
    ) -> io::Result<SocketDump>
    where
        D: Fn(&[Scope]) -> io::Result<Vec<SocketDump>> + Clone + Send + 'static,
    {
        let (reply, dumped) = oneshot::channel();
        let caller = Caller { scope, reply };
        match self.waiting().entry(netns) {
            Entry::Occupied(mut waiting) => waiting.get_mut().push(caller),
            Entry::Vacant(none) => {
                none.insert(vec![caller]);
                self.runtime.spawn(Arc::clone(self).serve(netns, dump));
            }
        }
        dumped
            .await
            .unwrap_or_else(|_| Err(io::Error::other("the dump did not finish")))
    }

    /// Dumps `netns`. Stops when the last caller that waits for it is gone.
    async fn serve<D>(self: Arc<Self>, netns: NetnsInode, dump: D)
    where
        D: Fn(&[Scope]) -> io::Result<Vec<SocketDump>> + Clone + Send + 'static,
    {
        loop {
            // The semaphore is fair, so a namespace that was just dumped waits behind the others. It is never closed.
            let _permit = self.permits.acquire().await;
            let Some(callers) = self.next(netns) else {
                return;
            };
            let (scopes, replies): (Vec<_>, Vec<_>) =
                callers.into_iter().map(|c| (c.scope, c.reply)).unzip();
            let dump = dump.clone();
            let dumps = tokio::task::spawn_blocking(move || dump(&scopes))
                .await
                .unwrap_or_else(|e| Err(io::Error::other(e)));
            match dumps {
                Ok(dumps) => {
                    for (reply, dump) in replies.into_iter().zip(dumps) {
                        let _ = reply.send(Ok(dump));
                    }
                }
                Err(e) => {
                    for reply in replies {
                        let _ = reply.send(Err(io::Error::new(e.kind(), e.to_string())));
                    }
                }
            }
        }
    }

    /// Takes the callers that still wait for `netns`; later callers wait for the next dump. Without any, removes the
    /// namespace and returns `None`.
    fn next(&self, netns: NetnsInode) -> Option<Vec<Caller>> {
        let mut all = self.waiting();
        let waiting = all.get_mut(&netns)?;
        waiting.retain(|caller| !caller.reply.is_closed());
        if waiting.is_empty() {
            all.remove(&netns);
            return None;
        }
        Some(std::mem::take(waiting))
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<NetnsInode, Vec<Caller>>> {
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
    use ebb_core::{clock::BootTime, ids::CgroupId};

    /// Makes slow dumps, and counts them.
    #[derive(Default)]
    struct Counted {
        started: AtomicU32,
        running: AtomicU32,
        most_running: AtomicU32,
    }

    impl Counted {
        fn dump(&self, scopes: &[Scope]) -> Vec<SocketDump> {
            self.started.fetch_add(1, Ordering::SeqCst);
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_running.fetch_max(running, Ordering::SeqCst);
            let taken_at = BootTime::now();
            std::thread::sleep(Duration::from_millis(20));
            self.running.fetch_sub(1, Ordering::SeqCst);
            let dump = SocketDump {
                taken_at,
                missed_changes: 0,
                samples: vec![],
                forwards: None,
            };
            scopes.iter().map(|_| dump.clone()).collect()
        }
    }

    fn limiter() -> Arc<DumpLimiter> {
        Arc::new(DumpLimiter::new(Handle::current()))
    }

    fn dump(
        limiter: &Arc<DumpLimiter>,
        counted: &Arc<Counted>,
        netns: u32,
    ) -> tokio::task::JoinHandle<io::Result<SocketDump>> {
        let (limiter, counted) = (Arc::clone(limiter), Arc::clone(counted));
        let scope = Scope::HostNetwork(vec![CgroupId(1)]);
        tokio::spawn(async move {
            let called = BootTime::now();
            let dump = move |scopes: &[Scope]| Ok(counted.dump(scopes));
            let dump = limiter.dump(NetnsInode(netns), scope, dump).await?;
            assert!(dump.taken_at >= called, "older than the call");
            Ok(dump)
        })
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn callers_of_one_namespace_share_the_next_dump() {
        let (limiter, counted) = (limiter(), Arc::default());
        let first = dump(&limiter, &counted, 1);
        while counted.started.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let others: Vec<_> = (0..10).map(|_| dump(&limiter, &counted, 1)).collect();
        for dump in others.into_iter().chain([first]) {
            dump.await.unwrap().unwrap();
        }
        // Some of them may call late, but not all.
        assert!(
            counted.started.load(Ordering::SeqCst) < 6,
            "no caller shared"
        );
        assert_eq!(counted.most_running.load(Ordering::SeqCst), 1);
        assert!(limiter.waiting().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn at_most_two_dumps_run_at_a_time_and_every_caller_gets_its_own() {
        let (limiter, counted) = (limiter(), Arc::default());
        let all: Vec<_> = (0..8).map(|n| dump(&limiter, &counted, n)).collect();
        for dump in all {
            dump.await.unwrap().unwrap();
        }
        assert_eq!(counted.started.load(Ordering::SeqCst), 8);
        assert!(counted.most_running.load(Ordering::SeqCst) <= 2);
    }

    #[test]
    fn a_caller_whose_runtime_has_shut_down_blocks_no_other_caller() {
        let own = tokio::runtime::Runtime::new().unwrap();
        let limiter = Arc::new(DumpLimiter::new(own.handle().clone()));
        let counted = Arc::<Counted>::default();
        let ended = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        ended.block_on(async {
            // The next caller may share it.
            let counted = Arc::clone(&counted);
            let dump = move |scopes: &[Scope]| Ok(counted.dump(scopes));
            tokio::select! {
                biased;
                _ = limiter.dump(NetnsInode(1), Scope::HostNetwork(vec![]), dump) => {}
                () = std::future::ready(()) => {}
            }
        });
        drop(ended);
        let dump = async {
            let dump = dump(&limiter, &counted, 1);
            tokio::time::timeout(Duration::from_secs(60), dump).await
        };
        own.block_on(dump).unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_dump_that_fails_or_panics_is_an_error_for_all_its_callers_and_the_next_dump_runs() {
        let limiter = limiter();
        let netns = NetnsInode(1);
        let scope = || Scope::HostNetwork(vec![]);
        let (a, b) = tokio::join!(
            limiter.dump(netns, scope(), |_: &[Scope]| Err(
                io::ErrorKind::NotFound.into()
            )),
            limiter.dump(netns, scope(), |_: &[Scope]| Err(
                io::ErrorKind::NotFound.into()
            )),
        );
        assert_eq!(a.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(b.unwrap_err().kind(), io::ErrorKind::NotFound);
        let panicked = limiter.dump(netns, scope(), |_: &[Scope]| panic!("as the test says"));
        assert!(panicked.await.is_err());
        while !limiter.waiting().is_empty() {
            tokio::task::yield_now().await;
        }
        let counted = Counted::default();
        let counted = Arc::new(counted);
        dump(&limiter, &counted, 1).await.unwrap().unwrap();
    }
}
