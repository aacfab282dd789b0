//! What the rest of the agent sees of the drains.

use std::sync::Arc;

use tokio::time::Instant;

use super::{Changed, Drains, DrainsView, Kernel, VIEW_PACE};
use crate::{clock::BootTime, drain::report::Report};

impl<K: Kernel> Drains<K> {
    /// Publishes a view if there is something new in it, and it is time.
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
        let active = self.active.values().map(|a| Report {
            holds: a.holds,
            ..a.machine.report(now)
        });
        let view = DrainsView {
            version: self.view.borrow().version + 1,
            at: now,
            active: active.collect(),
            finished: self.finished.iter().map(|f| f.report.clone()).collect(),
            blind: self.blind.clone(),
        };
        self.view.send_replace(Arc::new(view));
        self.changed = Changed::Nothing;
        self.published = Instant::now();
    }
}
