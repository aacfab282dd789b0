//! What a drain tells about itself afterwards: gathered here, step by step.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::flows::OpenFlows;
use crate::{
    clock::{BootTime, millis},
    drain::report::{Change, CutFlow, LatePeer, Phase},
    flow::{Flow, FlowCounts, FlowState, Snapshot},
};

const MAX_CHANGES: usize = 256;
const MAX_CUT: usize = 256;
const MAX_LATE_PEERS: usize = 64;
/// Addresses that are counted; those that come after so many others are not.
const MAX_COUNTED_PEERS: usize = 4096;

/// The sums of a drain.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) flows_at_start: Option<FlowCounts>,
    pub(super) flows_now: Option<FlowCounts>,
    pub(super) changes: Vec<Change>,
    pub(super) arrived: u32,
    pub(super) ended: u32,
    pub(super) idle_closed: u32,
    late: HashMap<IpAddr, u32>,
    last_look: Option<Snapshot>,
}

impl Tally {
    /// A flow arrived from `remote`.
    pub(super) fn arrival(&mut self, remote: SocketAddr) {
        self.arrived = self.arrived.saturating_add(1);
        let address = remote.ip().to_canonical();
        if self.late.len() < MAX_COUNTED_PEERS || self.late.contains_key(&address) {
            *self.late.entry(address).or_default() += 1;
        }
    }

    /// Flows ended by themselves.
    pub(super) fn end(&mut self, flows: u32) {
        self.ended = self.ended.saturating_add(flows);
    }

    /// A look was made.
    pub(super) fn look(&mut self, look: Snapshot, since_start: Duration, phase: Phase) {
        let counts = look.counts();
        self.flows_at_start.get_or_insert(counts);
        self.flows_now = Some(counts);
        self.last_look = Some(look);
        self.change(since_start, phase);
    }

    /// The last look.
    pub(super) fn last_look(&self) -> Option<&Snapshot> {
        self.last_look.as_ref()
    }

    /// The moment of the last look.
    pub(super) fn looked_at(&self) -> Option<BootTime> {
        self.last_look.as_ref().map(|look| look.taken_at)
    }

    /// Notes the picture if it is another one than before. Without a look there is no picture.
    pub(super) fn change(&mut self, since_start: Duration, phase: Phase) {
        let Some(flows) = self.flows_now else { return };
        if self
            .changes
            .last()
            .is_some_and(|last| last.phase == phase && last.flows == flows)
        {
            return;
        }
        if self.changes.len() == MAX_CHANGES {
            // The newest picture is worth more than the one before it.
            self.changes.pop();
        }
        self.changes.push(Change {
            at_ms: millis(since_start),
            phase,
            flows,
        });
    }

    /// The busiest late peers first.
    pub(super) fn late_peers(&self) -> Vec<LatePeer> {
        let mut peers: Vec<_> = self
            .late
            .iter()
            .map(|(address, flows)| LatePeer {
                address: *address,
                flows: *flows,
            })
            .collect();
        peers.sort_unstable_by_key(|p| (Reverse(p.flows), p.address));
        peers.truncate(MAX_LATE_PEERS);
        peers
    }

    /// The flows that are open at `now`, as far as the last look and the edges since tell: the first few
    /// of them, and how many they are.
    pub(super) fn still_open(&self, open: &OpenFlows, now: BootTime) -> (Vec<CutFlow>, u32) {
        let shown: HashSet<_> = self
            .last_look
            .iter()
            .flat_map(Snapshot::holding)
            .map(|f| f.cookie)
            .collect();
        let seen = self.last_look.iter().flat_map(|look| {
            let since_look = now.since(look.taken_at);
            look.holding()
                .filter(|f| open.contains(f.cookie))
                .map(move |f| cut(f, since_look))
        });
        let unseen = open
            .announced()
            .filter(|(cookie, _)| !shown.contains(cookie))
            .map(|(_, how)| CutFlow {
                remote: how.remote,
                local: how.local,
                // What it was when last heard of.
                state: FlowState::Backlog,
                age_ms: Some(millis(now.since(how.at))),
                bytes_in: 0,
                bytes_out: 0,
            });
        let mut all: Vec<_> = seen.chain(unseen).collect();
        let total = u32::try_from(all.len()).unwrap_or(u32::MAX);
        all.truncate(MAX_CUT);
        (all, total)
    }
}

fn cut(flow: &Flow, since_look: Duration) -> CutFlow {
    CutFlow {
        remote: flow.remote,
        local: flow.local,
        state: flow.state,
        age_ms: flow.age.map(|age| millis(age + since_look)),
        bytes_in: flow.bytes_in,
        bytes_out: flow.bytes_out,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(active: u32) -> FlowCounts {
        FlowCounts {
            active,
            ..FlowCounts::default()
        }
    }

    #[test]
    fn a_picture_is_noted_only_when_it_changes() {
        let mut tally = Tally::default();
        tally.change(Duration::ZERO, Phase::Settle);
        assert_eq!(
            tally.changes,
            [],
            "there is no picture before the first look"
        );
        tally.flows_now = Some(counts(1));
        for (ms, phase) in [(1, Phase::Settle), (2, Phase::Settle), (3, Phase::Drain)] {
            tally.change(Duration::from_millis(ms), phase);
        }
        assert_eq!(
            tally.changes,
            [
                Change {
                    at_ms: 1,
                    phase: Phase::Settle,
                    flows: counts(1)
                },
                Change {
                    at_ms: 3,
                    phase: Phase::Drain,
                    flows: counts(1)
                },
            ]
        );
    }

    #[test]
    fn the_list_of_pictures_is_bounded_and_ends_with_the_newest() {
        let mut tally = Tally::default();
        for n in 0..1000 {
            tally.flows_now = Some(counts(n));
            tally.change(Duration::from_millis(n.into()), Phase::Drain);
        }
        assert_eq!(tally.changes.len(), MAX_CHANGES);
        assert_eq!(tally.changes[0].flows, counts(0));
        assert_eq!(tally.changes[MAX_CHANGES - 1].flows, counts(999));
    }

    #[test]
    fn the_busiest_late_peers_come_first_and_their_number_is_bounded() {
        let mut tally = Tally::default();
        for n in 0..10_000_u32 {
            tally.arrival(SocketAddr::new(IpAddr::from(n.to_be_bytes()), 1));
        }
        tally.arrival("[::ffff:0.0.0.7]:1".parse().expect("an address"));
        assert_eq!(tally.arrived, 10_001);
        assert_eq!(tally.late.len(), MAX_COUNTED_PEERS);
        let peers = tally.late_peers();
        assert_eq!(peers.len(), MAX_LATE_PEERS);
        assert_eq!(
            peers[0],
            LatePeer {
                address: IpAddr::from([0, 0, 0, 7]),
                flows: 2
            }
        );
    }
}
