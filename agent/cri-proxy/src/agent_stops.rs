//! Whether the last agent has announced its stop, so that another agent is likely to start soon.
//!
//! An agent announces its stop in two ways: `release: shutdown` ends the holds that it has, and a note beside its
//! socket ([`stop_note`]) is for the calls that arrive when it is gone. An agent that crashes does neither, and may not
//! come back.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ebb_core::clock::BootTime;
use ebb_protocol::hold::{read_stop_note, stop_note};

/// The last time that an agent announced its stop.
#[derive(Clone, Debug)]
pub(crate) struct AgentStops {
    note: PathBuf,
    /// When the last message did so, in nanoseconds since boot; zero if none did.
    last_message: Arc<AtomicU64>,
}

impl AgentStops {
    /// For the agent whose socket is `agent`.
    pub(crate) fn new(agent: &Path) -> Self {
        Self {
            note: stop_note(agent),
            last_message: Arc::default(),
        }
    }

    /// Records that the agent has announced its stop at `now`, in a message.
    pub(crate) fn record(&self, now: BootTime) {
        self.last_message
            .fetch_max(now.as_nanos(), Ordering::Relaxed);
    }

    /// Until when a call waits for the next agent, if the last one announced its stop less than `within` ago.
    pub(crate) async fn wait_until(&self, within: Duration) -> Option<BootTime> {
        if within.is_zero() {
            return None;
        }
        let note = self.note.clone();
        // Usually a file in memory, but no task of the proxy may block.
        let noted = tokio::task::spawn_blocking(move || read_stop_note(&note)).await;
        let now = BootTime::now();
        // A note that is ahead of the clock is from before the last boot.
        let noted = noted.ok().flatten().filter(|noted| *noted <= now);
        let last_message = Some(self.last_message.load(Ordering::Relaxed)).filter(|at| *at > 0);
        let last = noted.max(last_message.map(BootTime::from_nanos))?;
        Some(last + within).filter(|until| *until > now)
    }
}
