//! The flows believed open: kept by edges, put right by looks.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use crate::{clock::BootTime, flow::Flow, ids::SocketCookie};

/// For how long after its close edge a look may still show a flow. The edge is emitted just before the
/// kernel stores the state, so this is microseconds, and generous. A look that shows the flow later than
/// that contradicts the edge, and the look is right.
const CLOSE_SETTLES: Duration = Duration::from_secs(1);

/// A moment that never comes: the flow stops blocking by its end alone.
pub(super) const NEVER: BootTime = BootTime::from_nanos(u64::MAX);

/// A flow that an edge announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opened {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) at: BootTime,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// The earliest moment at which the flow can stop blocking without an edge; `None`: it does not block.
    blocks_until: Option<BootTime>,
    /// How it was announced, if by an edge.
    opened: Option<Opened>,
}

/// What a look changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reconciled {
    /// Flows that ended without an edge.
    pub(super) vanished: u32,
    /// Flows in the look that ended while it was being taken.
    pub(super) just_closed: u32,
}

/// The flows believed open. Cookies are unique, so that a flow which has closed stays closed; adding or
/// removing twice changes nothing.
#[derive(Debug, Default)]
pub(super) struct OpenFlows {
    open: HashMap<SocketCookie, Entry>,
    /// Those of them that block the release, by the earliest moment at which they can stop.
    blocking: BTreeSet<(BootTime, SocketCookie)>,
    /// Closed lately.
    closed: HashMap<SocketCookie, BootTime>,
}

impl OpenFlows {
    /// Adds a flow that blocks at least until `blocks_until`. `false` if it was known, open or closed.
    pub(super) fn opened(
        &mut self,
        cookie: SocketCookie,
        how: Opened,
        blocks_until: BootTime,
    ) -> bool {
        if self.open.contains_key(&cookie) || self.closed.contains_key(&cookie) {
            return false;
        }
        self.insert(
            cookie,
            Entry {
                blocks_until: Some(blocks_until),
                opened: Some(how),
            },
        );
        true
    }

    /// Removes a flow. `false` if it was not among the open ones.
    pub(super) fn closed(&mut self, cookie: SocketCookie, at: BootTime) -> bool {
        self.closed.entry(cookie).or_insert(at);
        self.remove(cookie)
    }

    /// Makes the set what a look of `taken_at` shows: `holding` flows, each with the moment until which
    /// it blocks. Flows announced since are kept, flows closed meanwhile stay out; flows in
    /// `exempt` leave it without having ended.
    pub(super) fn reconcile(
        &mut self,
        taken_at: BootTime,
        holding: &[(&Flow, Option<BootTime>)],
        exempt: &HashSet<SocketCookie>,
    ) -> Reconciled {
        let mut result = Reconciled::default();
        self.closed.retain(|_, at| *at + CLOSE_SETTLES > taken_at);
        let mut before = std::mem::take(&mut self.open);
        self.blocking.clear();
        for (flow, blocks_until) in holding {
            let known = before.remove(&flow.cookie);
            if self.closed.contains_key(&flow.cookie) {
                result.just_closed += 1;
            } else {
                let opened = known.and_then(|e| e.opened);
                self.insert(
                    flow.cookie,
                    Entry {
                        blocks_until: *blocks_until,
                        opened,
                    },
                );
            }
        }
        for (cookie, entry) in before {
            if entry.opened.is_some_and(|o| o.at >= taken_at) {
                self.insert(cookie, entry);
            } else if !exempt.contains(&cookie) {
                result.vanished += 1;
            }
        }
        result
    }

    /// Is this flow believed open?
    pub(super) fn contains(&self, cookie: SocketCookie) -> bool {
        self.open.contains_key(&cookie)
    }

    /// Does any flow block the release?
    pub(super) fn blocked(&self) -> bool {
        !self.blocking.is_empty()
    }

    /// The earliest moment at which none could block any more if no edge comes; `None` if none blocks.
    /// It is the latest of the flows' moments, since all must have stopped.
    pub(super) fn blocked_until(&self) -> Option<BootTime> {
        self.blocking.last().map(|(until, _)| *until)
    }

    /// The next moment at which a flow may become idle; `None` if none can.
    pub(super) fn next_idle(&self) -> Option<BootTime> {
        self.blocking
            .first()
            .map(|(until, _)| *until)
            .filter(|until| *until != NEVER)
    }

    /// The open flows that edges announced.
    pub(super) fn announced(&self) -> impl Iterator<Item = (SocketCookie, Opened)> {
        self.open
            .iter()
            .filter_map(|(cookie, e)| Some((*cookie, e.opened?)))
    }

    fn insert(&mut self, cookie: SocketCookie, entry: Entry) {
        self.remove(cookie);
        if let Some(until) = entry.blocks_until {
            self.blocking.insert((until, cookie));
        }
        self.open.insert(cookie, entry);
    }

    fn remove(&mut self, cookie: SocketCookie) -> bool {
        let Some(entry) = self.open.remove(&cookie) else {
            return false;
        };
        if let Some(until) = entry.blocks_until {
            self.blocking.remove(&(until, cookie));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOW: Opened = Opened {
        local: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80),
        remote: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4000),
        at: BootTime::from_nanos(10),
    };

    fn picture(flows: &OpenFlows) -> (BTreeSet<SocketCookie>, BTreeSet<(BootTime, SocketCookie)>) {
        (flows.open.keys().copied().collect(), flows.blocking.clone())
    }

    proptest! {
        #[test]
        fn doing_anything_twice_is_as_doing_it_once(
            ops in proptest::collection::vec((any::<bool>(), 0_u64..8, 0_u64..50), 0..40)
        ) {
            let (mut once, mut twice) = (OpenFlows::default(), OpenFlows::default());
            for (open, cookie, at) in ops {
                let (cookie, at) = (SocketCookie(cookie), BootTime::from_nanos(at));
                for (flows, times) in [(&mut once, 1), (&mut twice, 2)] {
                    for time in 0..times {
                        let changed = if open {
                            flows.opened(cookie, HOW, at)
                        } else {
                            flows.closed(cookie, at)
                        };
                        prop_assert!(time == 0 || !changed, "the second time changed something");
                    }
                }
                prop_assert_eq!(picture(&once), picture(&twice));
                prop_assert_eq!(once.blocking.len(), once.open.len());
            }
        }
    }

    #[test]
    fn a_close_that_overtakes_its_open_wins() {
        let mut flows = OpenFlows::default();
        assert!(!flows.closed(SocketCookie(1), BootTime::from_nanos(20)));
        assert!(!flows.opened(SocketCookie(1), HOW, NEVER));
        assert!(!flows.blocked());
    }

    #[test]
    fn a_look_keeps_what_was_announced_after_it() {
        let mut flows = OpenFlows::default();
        flows.opened(SocketCookie(1), HOW, NEVER);
        let none = HashSet::new();
        assert_eq!(
            flows.reconcile(BootTime::from_nanos(10), &[], &none),
            Reconciled::default()
        );
        assert!(flows.blocked());
        assert_eq!(
            flows
                .reconcile(BootTime::from_nanos(11), &[], &none)
                .vanished,
            1
        );
        assert!(!flows.blocked());
    }

    #[test]
    fn a_flow_that_turns_out_exempt_has_not_ended() {
        let mut flows = OpenFlows::default();
        flows.opened(SocketCookie(1), HOW, NEVER);
        let exempt = HashSet::from([SocketCookie(1)]);
        assert_eq!(
            flows
                .reconcile(BootTime::from_nanos(11), &[], &exempt)
                .vanished,
            0
        );
        assert!(!flows.blocked());
    }
}
