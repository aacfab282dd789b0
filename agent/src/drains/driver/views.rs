//! Publishes the view of the drains for the rest of the agent.

use std::sync::Arc;

use ebb_core::{clock::BootTime, drain_report::Report};
use tokio::time::Instant;

use super::{Changed, Drains, DrainsView, Kernel, VIEW_PACE};

impl<K: Kernel> Drains<K> {
    /// Publishes a view if it has changed, and the last one is old enough.
    pub(super) fn publish_if_due(&mut self) {
        match self.changed {
            Changed::Nothing => {}
            Changed::Flows if self.published.elapsed() < VIEW_PACE => {}
            Changed::Flows | Changed::Drains => self.publish(),
        }
    }

    /// Publishes a view.
    pub(super) fn publish(&mut self) {
        let now = BootTime::now();
        let active = self.active.iter().map(|a| {
            self.with_names(Report {
                holds: a.held_calls(),
                ..a.machine.report(now)
            })
        });
        let view = DrainsView {
            version: self.view.borrow().version + 1,
            at: now,
            active: active.collect(),
            finished: self.finished.reports().cloned().collect(),
            blind: self.blind.clone(),
        };
        self.view.send_replace(Arc::new(view));
        self.changed = Changed::Nothing;
        self.published = Instant::now();
    }

    /// The report with the names of its peers.
    pub(super) fn with_names(&self, mut report: Report) -> Report {
        report.name_peers(|ip| self.peer_names.get(&ip).map(ToString::to_string));
        report
    }
}
