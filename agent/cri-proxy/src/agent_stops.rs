//! Whether the last agent has said that it stops, so that another agent is likely to start soon.
//!
//! An agent says so in two ways: `release: shutdown` ends the holds that it has, and a note beside its socket
//! ([`stop_note`]) tells the calls that arrive when it is gone. An agent that crashes says nothing, and may not come
//! back.

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

/// The last time that an agent said that it stops.
#[derive(Clone, Debug)]
pub(crate) struct AgentStops {
    note: PathBuf,
    /// When a message said so, in nanoseconds since boot; zero if none did.
    told: Arc<AtomicU64>,
}

impl AgentStops {
    /// For the agent whose socket is `agent`.
    pub(crate) fn new(agent: &Path) -> Self {
        Self {
            note: stop_note(agent),
            told: Arc::default(),
        }
    }

    /// Records that the agent has said so at `now`, in a message.
    pub(crate) fn record(&self, now: BootTime) {
        self.told.fetch_max(now.as_nanos(), Ordering::Relaxed);
    }

    /// Until when a call waits for the next agent, if the last one said less than `within` ago that it stops.
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
        let told = Some(self.told.load(Ordering::Relaxed)).filter(|told| *told > 0);
        let last = noted.max(told.map(BootTime::from_nanos))?;
        Some(last + within).filter(|until| *until > now)
    }
}
