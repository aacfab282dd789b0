//! When the drains of this node's pods began: in memory, and in the journal if there is one.

use std::{collections::HashMap, sync::Arc};

use ebb_core::{clock::BootTime, ids::PodUid, pod_end::PodEnd};
use tokio::{sync::mpsc, task::spawn_blocking};
use tracing::warn;

use crate::drains::journal::{Beginning, Journal, JournalError};

/// Beginnings by pod. If the journal fails, only its entries are lost: it never stops a hold.
pub(super) struct History {
    beginnings: HashMap<PodUid, Beginning>,
    writer: Option<mpsc::UnboundedSender<(PodUid, Option<Beginning>)>>,
}

impl History {
    /// Reads the journal, and starts a task that writes to it.
    pub(super) fn new(journal: Option<Journal>) -> Self {
        let Some(journal) = journal else {
            return Self {
                beginnings: HashMap::new(),
                writer: None,
            };
        };
        let beginnings = journal.load(BootTime::now()).unwrap_or_else(|error| {
            warn!(
                error = &error as &dyn std::error::Error,
                "can't read the journal of drains"
            );
            HashMap::new()
        });
        let (writer, entries) = mpsc::unbounded_channel();
        tokio::spawn(write(Arc::new(journal), entries));
        Self {
            beginnings,
            writer: Some(writer),
        }
    }

    /// The beginning of the drain that a hold with `end` continues, if there was one.
    pub(super) fn recall(
        &mut self,
        uid: &PodUid,
        end: &PodEnd,
        now: BootTime,
    ) -> Option<&Beginning> {
        self.beginnings
            .retain(|_, beginning| !beginning.is_over(now));
        let beginning = self.beginnings.get(uid)?;
        beginning.includes(end, now).then_some(beginning)
    }

    /// Keeps a beginning.
    pub(super) fn remember(&mut self, uid: &PodUid, beginning: Beginning) {
        let before = self.beginnings.insert(uid.clone(), beginning.clone());
        if before.as_ref() != Some(&beginning) {
            self.write(uid.clone(), Some(beginning));
        }
    }

    /// Removes the pods that the runtime does not list any more and whose drains are not recent. The kubelet may repeat
    /// the calls of recent ones.
    pub(super) fn retain_pods(&mut self, listed: impl Fn(&PodUid) -> bool, now: BootTime) {
        let gone =
            |(uid, beginning): &(&PodUid, &Beginning)| !listed(uid) && !beginning.is_recent(now);
        let gone: Vec<_> = self.beginnings.iter().filter(gone).collect();
        for uid in gone
            .into_iter()
            .map(|(uid, _)| uid.clone())
            .collect::<Vec<_>>()
        {
            self.beginnings.remove(&uid);
            self.write(uid, None);
        }
    }

    fn write(&self, uid: PodUid, beginning: Option<Beginning>) {
        if let Some(writer) = &self.writer {
            let _ = writer.send((uid, beginning));
        }
    }
}

/// Writes entries one after the other, so that the last one of a pod stays.
async fn write(
    journal: Arc<Journal>,
    mut entries: mpsc::UnboundedReceiver<(PodUid, Option<Beginning>)>,
) {
    let mut failures = WriteFailures::default();
    while let Some((uid, beginning)) = entries.recv().await {
        let journal = journal.clone();
        let written = spawn_blocking(move || match beginning {
            Some(beginning) => keep(&journal, &uid, beginning, BootTime::now()),
            None => journal.forget(&uid),
        });
        // The panic hook has printed the panic.
        let Ok(written) = written.await else { continue };
        if let Some(error) = failures.record(written) {
            let error = &error as &dyn std::error::Error;
            warn!(
                error,
                "can't journal a drain; after a restart its holds would get a new deadline"
            );
        }
    }
}

/// Removes expired entries and writes one, in this order: on a full disk, the removal frees space for the entry.
fn keep(
    journal: &Journal,
    uid: &PodUid,
    beginning: Beginning,
    now: BootTime,
) -> Result<(), JournalError> {
    let pruned = journal.prune(now);
    journal.record(uid, beginning)?;
    pruned
}

/// Whether the last write failed.
#[derive(Default)]
struct WriteFailures {
    is_known: bool,
}

impl WriteFailures {
    /// Returns the error of the first failure in a row.
    fn record<E>(&mut self, outcome: Result<(), E>) -> Option<E> {
        let known = std::mem::replace(&mut self.is_known, outcome.is_err());
        outcome.err().filter(|_| !known)
    }
}

#[cfg(test)]
mod tests {
    use ebb_core::{drain_report::DeadlineCause, machine::Deadline, notification::Notified};

    use super::*;

    #[test]
    fn a_write_that_fails_has_made_room_for_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let beginning = |at| Beginning {
            started: at,
            deadline: Deadline {
                at,
                cause: DeadlineCause::Grace,
            },
            released: None,
            end: PodEnd::default(),
            notified: Notified::NOTHING,
        };
        let old = beginning(BootTime::from_nanos(1));
        let now = BootTime::from_nanos(1 << 50);
        let new = beginning(now);
        keep(&journal, &PodUid::new("over"), old.clone(), old.started).unwrap();
        assert!(dir.path().join("over.json").exists());
        // Nothing can be renamed to this.
        std::fs::create_dir_all(dir.path().join("new.json/taken")).unwrap();
        assert!(keep(&journal, &PodUid::new("new"), new.clone(), now).is_err());
        assert!(!dir.path().join("over.json").exists());
        std::fs::remove_dir_all(dir.path().join("new.json")).unwrap();
        keep(&journal, &PodUid::new("new"), new.clone(), now).unwrap();
        assert_eq!(journal.load(now).unwrap()[&PodUid::new("new")], new);
    }

    #[test]
    fn a_failure_is_logged_once_and_again_after_a_success() {
        let mut failures = WriteFailures::default();
        let outcomes = [Ok(()), Err(1), Err(2), Ok(()), Ok(()), Err(3), Err(4)];
        let logged: Vec<_> = outcomes
            .map(|o| failures.record(o))
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(logged, [1, 3]);
    }
}
