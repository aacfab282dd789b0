//! The flows that count as open. Events add and remove them, and snapshots correct them.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use super::event::FlowEndpoints;
use crate::{clock::BootTime, flow::Flow, ids::SocketCookie};

/// For how long after its close event a snapshot may still show a flow. The kernel stores the state microseconds after
/// the event, so this is generous. A snapshot that shows the flow later than that contradicts the event, and the
/// snapshot is right.
const CLOSE_SETTLES: Duration = Duration::from_secs(1);

/// A moment that never comes: only its end stops the flow from blocking.
pub(super) const NEVER: BootTime = BootTime::from_nanos(u64::MAX);

/// A flow that an event announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) at: BootTime,
}

#[derive(Clone, Debug)]
struct OpenFlow {
    local: SocketAddr,
    remote: SocketAddr,
    /// The earliest moment at which the flow can stop blocking without an event; `None`: it does not block.
    blocks_until: Option<BootTime>,
    /// How it was announced, if by an event.
    opened: Option<Announced>,
    /// The last snapshot has not shown it, and no event has reported its end.
    missed: bool,
}

/// What a snapshot changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reconciled {
    /// Flows that ended without an event: two snapshots in a row have not shown them.
    pub(super) vanished: u32,
    /// Flows that this snapshot does not show, although no event has reported their end.
    pub(super) missed: u32,
    /// Flows in the snapshot that ended while it was being taken.
    pub(super) just_closed: u32,
}

/// The flows that count as open. Cookies are unique, so a flow that has closed stays closed. Adding or removing a flow
/// twice has no effect.
#[derive(Debug, Default)]
pub(super) struct OpenFlows {
    open: HashMap<SocketCookie, OpenFlow>,
    /// Those of them that block the release, by the earliest moment at which they can stop.
    blocking: BTreeSet<(BootTime, SocketCookie)>,
    /// How many of them the last snapshot has not shown.
    missed: usize,
    /// Closed lately.
    closed: HashMap<SocketCookie, BootTime>,
    /// Those that were open, until the kernel's tables have shown that they are gone.
    unconfirmed: HashMap<SocketCookie, (FlowEndpoints, BootTime)>,
    /// The number of remembered closed flows after the last snapshot.
    remembered: usize,
}

/// How many closed flows are remembered before a snapshot is made to remove them. They take some megabytes.
const MANY_CLOSED: usize = 16_384;

impl OpenFlows {
    /// Adds a flow that blocks at least until `blocks_until`. `false` if it was known, open or closed.
    pub(super) fn opened(
        &mut self,
        cookie: SocketCookie,
        how: Announced,
        blocks_until: BootTime,
    ) -> bool {
        if self.open.contains_key(&cookie) || self.closed.contains_key(&cookie) {
            return false;
        }
        self.insert(
            cookie,
            OpenFlow {
                local: how.local,
                remote: how.remote,
                blocks_until: Some(blocks_until),
                opened: Some(how),
                missed: false,
            },
        );
        true
    }

    /// Removes a flow. `false` if it was not among the open ones.
    pub(super) fn closed(&mut self, cookie: SocketCookie, at: BootTime) -> bool {
        self.closed.entry(cookie).or_insert(at);
        let Some(entry) = self.remove(cookie) else {
            return false;
        };
        self.unconfirmed
            .insert(cookie, (entry.endpoints(cookie), at));
        true
    }

    /// Whether so many have closed that a snapshot is needed to remove them.
    pub(super) fn are_many_closed(&self) -> bool {
        self.closed.len().max(self.unconfirmed.len()) > self.remembered + MANY_CLOSED
    }

    /// Whether a flow counts as open that the last snapshot has not shown.
    pub(super) fn is_one_missed(&self) -> bool {
        self.missed > 0
    }

    /// Corrects the set by a snapshot of `taken_at`, with its flows that are not exempt, and the moment until which each
    /// blocks. Flows announced since stay, flows closed meanwhile stay out, and flows in `exempt` leave it without having
    /// ended.
    pub(super) fn reconcile(
        &mut self,
        taken_at: BootTime,
        not_exempt: &[(&Flow, Option<BootTime>)],
        exempt: &HashSet<SocketCookie>,
    ) -> Reconciled {
        let mut result = Reconciled::default();
        self.closed.retain(|_, at| *at + CLOSE_SETTLES > taken_at);
        let mut before = std::mem::take(&mut self.open);
        self.blocking.clear();
        self.missed = 0;
        self.unconfirmed.retain(|_, (_, at)| *at >= taken_at);
        self.remembered = self.closed.len().max(self.unconfirmed.len());
        for (flow, blocks_until) in not_exempt {
            let known = before.remove(&flow.cookie);
            let entry = OpenFlow {
                local: flow.local,
                remote: flow.remote,
                blocks_until: *blocks_until,
                opened: known.and_then(|e| e.opened),
                missed: false,
            };
            if let Some(at) = self.closed.get(&flow.cookie) {
                let endpoints = entry.endpoints(flow.cookie);
                self.unconfirmed.insert(flow.cookie, (endpoints, *at));
                result.just_closed += 1;
            } else {
                self.insert(flow.cookie, entry);
            }
        }
        for (cookie, mut entry) in before {
            if entry.opened.is_some_and(|o| o.at >= taken_at) {
                self.insert(cookie, entry);
            } else if entry.missed {
                result.vanished += u32::from(!exempt.contains(&cookie));
            } else if !exempt.contains(&cookie) {
                // A dump continues in a chain of the kernel's table after the number of sockets that it has shown.
                // If one of those has closed meanwhile, the dump skips another (`inet_diag_dump_icsk` in
                // net/ipv4/inet_diag.c). So one dump alone does not prove that a flow is gone.
                entry.missed = true;
                result.missed += 1;
                self.insert(cookie, entry);
            }
        }
        result
    }

    /// The flows that lookups must cover: those that count as open, and those whose end the kernel's tables have not
    /// confirmed. `None` if these are more than `few`.
    pub(super) fn to_look_up(&self, few: usize) -> Option<Vec<FlowEndpoints>> {
        if self.open.len() + self.unconfirmed.len() > few {
            return None;
        }
        let open = self.open.iter().map(|(cookie, e)| e.endpoints(*cookie));
        let gone = self.unconfirmed.values().map(|(endpoints, _)| *endpoints);
        let mut all: Vec<_> = open.chain(gone).collect();
        all.sort_unstable();
        Some(all)
    }

    /// Whether lookups of `taken_at` agree with the events: `found` has all flows that count as open, except those
    /// announced since, and none that closed long before.
    pub(super) fn agree(&self, taken_at: BootTime, found: &HashSet<SocketCookie>) -> bool {
        let open = self.open.iter().all(|(cookie, e)| {
            found.contains(cookie) || e.opened.is_some_and(|o| o.at >= taken_at)
        });
        let gone = self
            .unconfirmed
            .iter()
            .all(|(cookie, (_, at))| !found.contains(cookie) || *at + CLOSE_SETTLES > taken_at);
        open && gone
    }

    /// How the flow was announced, if it is open and was announced by an event.
    pub(super) fn opened_how(&self, cookie: SocketCookie) -> Option<Announced> {
        self.open.get(&cookie)?.opened
    }

    /// Those of `shown` whose end is not confirmed: an event has reported it, and lookups still show them.
    pub(super) fn closing(&self, shown: &HashSet<SocketCookie>) -> Vec<(FlowEndpoints, BootTime)> {
        let mut closing: Vec<_> = self.unconfirmed.values().copied().collect();
        closing.retain(|(ends, _)| shown.contains(&ends.cookie));
        closing
    }

    /// Has the end of these confirmed another time.
    pub(super) fn confirm_later(&mut self, closing: Vec<(FlowEndpoints, BootTime)>) {
        let closing = closing.into_iter().map(|c| (c.0.cookie, c));
        self.unconfirmed.extend(closing);
    }

    /// Whether this flow counts as open.
    pub(super) fn contains(&self, cookie: SocketCookie) -> bool {
        self.open.contains_key(&cookie)
    }

    /// Whether any flow blocks the release.
    pub(super) fn blocked(&self) -> bool {
        !self.blocking.is_empty()
    }

    /// The earliest moment at which none could block any more if no event comes; `None` if none blocks.
    /// It is the latest of the flows' moments, because all must have stopped.
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

    /// The open flows that events announced.
    pub(super) fn announced(&self) -> impl Iterator<Item = (SocketCookie, Announced)> {
        self.open
            .iter()
            .filter_map(|(cookie, e)| Some((*cookie, e.opened?)))
    }

    fn insert(&mut self, cookie: SocketCookie, entry: OpenFlow) {
        self.remove(cookie);
        if let Some(until) = entry.blocks_until {
            self.blocking.insert((until, cookie));
        }
        self.missed += usize::from(entry.missed);
        self.open.insert(cookie, entry);
    }

    fn remove(&mut self, cookie: SocketCookie) -> Option<OpenFlow> {
        let entry = self.open.remove(&cookie)?;
        if let Some(until) = entry.blocks_until {
            self.blocking.remove(&(until, cookie));
        }
        self.missed -= usize::from(entry.missed);
        Some(entry)
    }
}

impl OpenFlow {
    const fn endpoints(&self, cookie: SocketCookie) -> FlowEndpoints {
        FlowEndpoints {
            cookie,
            local: self.local,
            remote: self.remote,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOW: Announced = Announced {
        local: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80),
        remote: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4000),
        at: BootTime::from_nanos(10),
    };

    fn ms(ms: u64) -> BootTime {
        BootTime::from_nanos(ms * 1_000_000)
    }

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
    fn a_snapshot_keeps_what_was_announced_after_it() {
        let mut flows = OpenFlows::default();
        flows.opened(SocketCookie(1), HOW, NEVER);
        let none = HashSet::new();
        assert_eq!(
            flows.reconcile(BootTime::from_nanos(10), &[], &none),
            Reconciled::default()
        );
        assert!(flows.blocked());
        for (vanished, missed) in [(0, 1), (1, 0)] {
            let changed = flows.reconcile(BootTime::from_nanos(11), &[], &none);
            assert_eq!((changed.vanished, changed.missed), (vanished, missed));
            assert_eq!(flows.blocked(), missed > 0, "one dump may pass over it");
            assert_eq!(flows.is_one_missed(), missed > 0);
        }
    }

    #[test]
    fn a_missed_flow_that_closes_or_is_shown_again_is_missed_no_more() {
        let none = HashSet::new();
        let mut flows = OpenFlows::default();
        flows.opened(SocketCookie(1), HOW, NEVER);
        flows.reconcile(BootTime::from_nanos(11), &[], &none);
        assert!(flows.closed(SocketCookie(1), BootTime::from_nanos(12)));
        assert!(!flows.is_one_missed() && !flows.blocked());
    }

    #[test]
    fn so_many_closes_want_a_snapshot_and_that_forgets_them() {
        let none = HashSet::new();
        let mut flows = OpenFlows::default();
        let close = |flows: &mut OpenFlows, when: u64| {
            for n in 0..MANY_CLOSED as u64 {
                let (cookie, at) = (SocketCookie((when << 32) | n), ms(when));
                flows.opened(cookie, HOW, NEVER);
                flows.closed(cookie, at);
            }
        };
        close(&mut flows, 1);
        assert!(!flows.are_many_closed());
        flows.closed(SocketCookie(7 << 48), ms(1));
        assert!(flows.are_many_closed());
        // Within a second of their close a snapshot may still show them, so they are remembered.
        flows.reconcile(ms(500), &[], &none);
        assert!(!flows.are_many_closed());
        flows.reconcile(ms(2000), &[], &none);
        assert!(flows.closed.is_empty() && flows.unconfirmed.is_empty());
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
