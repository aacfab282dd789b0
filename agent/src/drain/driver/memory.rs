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
    let mut warned = false;
    while let Some((uid, beginning)) = entries.recv().await {
        let journal = journal.clone();
        let written = spawn_blocking(move || -> Result<(), JournalError> {
            journal.record(&uid, beginning)?;
            journal.prune(BootTime::now())
        });
        if let Ok(Err(error)) = written.await
            && !std::mem::replace(&mut warned, true)
        {
            let error = &error as &dyn std::error::Error;
            warn!(
                error,
                "can't journal a drain; after a restart its holds would begin anew"
            );
        }
    }
}
