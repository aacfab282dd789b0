//! When the drains of this node's pods began: in memory, and in the journal if there is one.

use std::{collections::HashMap, sync::Arc};

use tokio::{sync::mpsc, task::spawn_blocking};
use tracing::warn;

use crate::{
    clock::BootTime,
    drain::journal::{Beginning, Journal, JournalError},
    ids::PodUid,
};

/// Beginnings by pod. A journal that fails costs no more than its entries: it never stops a hold.
pub(super) struct Memory {
    beginnings: HashMap<PodUid, Beginning>,
    writer: Option<mpsc::UnboundedSender<(PodUid, Beginning)>>,
}

impl Memory {
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

    /// The beginning of the pod's drain, if there was one that still matters.
    pub(super) fn recall(&mut self, uid: &PodUid, now: BootTime) -> Option<Beginning> {
        self.beginnings
            .retain(|_, beginning| !beginning.is_over(now));
        self.beginnings.get(uid).copied()
    }

    /// Keeps a beginning.
    pub(super) fn remember(&mut self, uid: &PodUid, beginning: Beginning) {
        if self.beginnings.insert(uid.clone(), beginning) == Some(beginning) {
            return;
        }
        if let Some(writer) = &self.writer {
            let _ = writer.send((uid.clone(), beginning));
        }
    }
}

/// Writes entries one after the other, so that the last one of a pod is the one that stays.
async fn write(journal: Arc<Journal>, mut entries: mpsc::UnboundedReceiver<(PodUid, Beginning)>) {
    let mut trouble = Trouble::default();
    while let Some((uid, beginning)) = entries.recv().await {
        let journal = journal.clone();
        let written = spawn_blocking(move || keep(&journal, &uid, beginning, BootTime::now()));
        // A task that panicked has said so itself.
        let Ok(written) = written.await else { continue };
        if let Some(error) = trouble.news(written) {
            let error = &error as &dyn std::error::Error;
            warn!(
                error,
                "can't journal a drain; after a restart its holds would begin anew"
            );
        }
    }
}

/// Removes what is over and writes one entry, in this order: on a full disk the one makes room for the other.
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

/// Whether the last entry could be written.
#[derive(Default)]
struct Trouble {
    is_known: bool,
}

impl Trouble {
    /// What there is to say of an outcome: the first failure, and the first one after it went well again.
    fn news<E>(&mut self, outcome: Result<(), E>) -> Option<E> {
        let known = std::mem::replace(&mut self.is_known, outcome.is_err());
        outcome.err().filter(|_| !known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_has_made_room_for_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let old = Beginning {
            started: BootTime::from_nanos(1),
            deadline: BootTime::from_nanos(2),
            released: None,
        };
        let now = BootTime::from_nanos(1 << 50);
        let new = Beginning {
            started: now,
            deadline: now,
            released: None,
        };
        keep(&journal, &PodUid::new("over"), old, old.started).unwrap();
        assert!(dir.path().join("over.json").exists());
        // Nothing can be renamed to this.
        std::fs::create_dir_all(dir.path().join("new.json/taken")).unwrap();
        assert!(keep(&journal, &PodUid::new("new"), new, now).is_err());
        assert!(!dir.path().join("over.json").exists());
        std::fs::remove_dir_all(dir.path().join("new.json")).unwrap();
        keep(&journal, &PodUid::new("new"), new, now).unwrap();
        assert_eq!(journal.load(now).unwrap()[&PodUid::new("new")], new);
    }

    #[test]
    fn a_failure_is_told_once_and_again_after_a_success() {
        let mut trouble = Trouble::default();
        let outcomes = [Ok(()), Err(1), Err(2), Ok(()), Ok(()), Err(3), Err(4)];
        let told: Vec<_> = outcomes
            .map(|o| trouble.news(o))
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(told, [1, 3]);
    }
}
