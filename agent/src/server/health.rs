//! Whether all tasks that the agent needs are alive (`/healthz`).
//!
//! A task that panics ends alone: the rest of the agent goes on without it, and without a restart it stays so. So each
//! task runs under a guard, which records the panic.

use std::{
    sync::{Arc, OnceLock},
    thread,
};

use tokio_util::sync::CancellationToken;

/// What is known of the agent's tasks. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct TaskHealth(Arc<OnceLock<String>>);

impl TaskHealth {
    /// Runs a task, and records it if it panics.
    pub(crate) async fn watch(self, name: &'static str, task: impl Future<Output = ()>) {
        let _guard = PanicGuard { health: self, name };
        task.await;
    }

    /// Runs a server, and records it if it panics or ends before `stop`.
    pub(crate) async fn watch_server(
        self,
        name: &'static str,
        stop: CancellationToken,
        server: impl Future<Output = ()>,
    ) {
        self.clone().watch(name, server).await;
        if !stop.is_cancelled() {
            self.record(format!("{name} has ended; restart the agent"));
        }
    }

    /// The first task that has failed, on one line.
    ///
    /// # Errors
    ///
    /// A task has failed, so only a restart of the agent helps.
    pub(super) fn check(&self) -> Result<(), String> {
        self.0.get().cloned().map_or(Ok(()), Err)
    }

    fn record(&self, why: String) {
        tracing::error!("{why}");
        let _ = self.0.set(why);
    }
}

/// Records a panic when it is dropped by one.
struct PanicGuard {
    health: TaskHealth,
    name: &'static str,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            self.health
                .record(format!("{} has panicked; restart the agent", self.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panicked_task_is_named_and_stays_so() {
        let health = TaskHealth::default();
        let watch = |task| tokio::spawn(health.clone().watch("the server of waits", task));
        watch(Box::pin(async {}) as std::pin::Pin<Box<dyn Future<Output = ()> + Send>>)
            .await
            .unwrap();
        assert_eq!(health.check(), Ok(()));
        let aborted = watch(Box::pin(std::future::pending()));
        aborted.abort();
        assert!(aborted.await.unwrap_err().is_cancelled());
        assert_eq!(health.check(), Ok(()));
        let panicked = watch(Box::pin(async { panic!("out of luck") }));
        assert!(panicked.await.unwrap_err().is_panic());
        let why = health.check().unwrap_err();
        assert_eq!(why, "the server of waits has panicked; restart the agent");
    }

    #[tokio::test]
    async fn a_server_may_end_only_at_the_stop() {
        let (health, stop) = (TaskHealth::default(), CancellationToken::new());
        stop.cancel();
        let server = health.clone().watch_server("the API", stop, async {});
        server.await;
        assert_eq!(health.check(), Ok(()));
        let server = health
            .clone()
            .watch_server("the API", CancellationToken::new(), async {});
        server.await;
        assert_eq!(
            health.check().unwrap_err(),
            "the API has ended; restart the agent"
        );
    }
}
