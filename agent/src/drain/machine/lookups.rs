//! Lookups: as good as a walk, if they fit with what edges have told since the last one.

use std::collections::HashSet;

use super::Machine;
use crate::{
    clock::BootTime,
    flow::{Direction, Flow, Since, Snapshot},
    ids::SocketCookie,
};

impl Machine {
    /// Takes in what lookups have shown, and says whether nothing is in the way.
    pub(super) fn looked_up(&mut self, found: Snapshot, now: BootTime) -> bool {
        self.looks.looked_up(now);
        let cookies = found.flows.iter().map(|f| f.cookie).collect();
        let closing = self.flows.closing(&cookies);
        let Some(look) = self.whole(found, &cookies) else {
            self.looks.unclear(now);
            return false;
        };
        let agrees = self.looked(look, now);
        self.flows.confirm_later(closing);
        agrees
    }

    /// The picture that lookups have made whole. `None` if they contradict the edges.
    ///
    /// No flow is missing from it: what had opened by then was in the last walk or has been announced, since
    /// no edge was outstanding, and is believed open, hence found, or closed. Of what has closed just now the
    /// edge is believed.
    fn whole(&self, found: Snapshot, cookies: &HashSet<SocketCookie>) -> Option<Snapshot> {
        let last = self.tally.last_look()?;
        if self.looks.base.is_none() || !self.flows.agree(found.taken_at, cookies) {
            return None;
        }
        let (exempt, holding): (Vec<_>, Vec<_>) =
            last.flows.iter().partition(|f| f.exempt.is_some());
        let known_exempt: HashSet<_> = exempt.iter().map(|f| f.cookie).collect();
        let now = found
            .flows
            .into_iter()
            .filter(|f| self.flows.contains(f.cookie) && !known_exempt.contains(&f.cookie))
            .map(|flow| {
                let before = holding.iter().find(|f| f.cookie == flow.cookie).copied();
                self.identified(flow, before, last.taken_at, found.taken_at)
            });
        let flows = now.chain(exempt.iter().copied().cloned()).collect();
        Some(Snapshot {
            taken_at: found.taken_at,
            flows,
        })
    }

    /// A lookup says what a flow does, not whose it is and since when: that is known from before.
    fn identified(
        &self,
        flow: Flow,
        before: Option<&Flow>,
        looked_at: BootTime,
        now: BootTime,
    ) -> Flow {
        let opened = self.flows.opened_how(flow.cookie);
        let age = match (before, opened) {
            (Some(before), _) => before.age.map(|age| age + now.since(looked_at)),
            (None, Some(opened)) => Some(now.since(opened.at)),
            (None, None) => None,
        };
        Flow {
            direction: before.map_or(Direction::Inbound, |f| f.direction),
            age,
            since: before.map_or(Since::Opening, |f| f.since),
            exempt: None,
            cgroup: before.map_or(flow.cgroup, |f| f.cgroup),
            ..flow
        }
    }
}
