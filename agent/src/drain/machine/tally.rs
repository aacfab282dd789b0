//! What a drain tells about itself afterwards: gathered here, step by step.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::flows::{OpenFlows, Opened};
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

/// The flows that arrived from one address.
#[derive(Clone, Copy, Debug, Default)]
struct Late {
    flows: u32,
    last: BootTime,
}

/// The sums of a drain.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) flows_at_start: Option<FlowCounts>,
    pub(super) flows_now: Option<FlowCounts>,
    pub(super) changes: Vec<Change>,
    pub(super) arrived: u32,
    pub(super) ended: u32,
    pub(super) idle_closed: u32,
    late: HashMap<IpAddr, Late>,
    last_look: Option<Snapshot>,
}

impl Tally {
    /// A flow arrived from `remote`.
    pub(super) fn arrival(&mut self, remote: SocketAddr, at: BootTime) {
        self.arrived = self.arrived.saturating_add(1);
        let address = remote.ip().to_canonical();
        if self.late.len() < MAX_COUNTED_PEERS || self.late.contains_key(&address) {
            let late = self.late.entry(address).or_default();
            late.flows += 1;
            late.last = late.last.max(at);
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
        self.change(counts, since_start, phase);
    }

    /// The last look.
    pub(super) fn last_look(&self) -> Option<&Snapshot> {
        self.last_look.as_ref()
    }

    /// The moment of the last look.
    pub(super) fn looked_at(&self) -> Option<BootTime> {
        self.last_look.as_ref().map(|look| look.taken_at)
    }

    /// The drain is over, with what is left of the last look's flows and what edges have announced since.
    /// Without a look there is no picture.
    pub(super) fn end_of(&mut self, open: &OpenFlows, since_start: Duration) {
        let Some(look) = &self.last_look else { return };
        let mut flows = FlowCounts::default();
        for state in left(look, open)
            .map(|f| f.state)
            .chain(announced(look, open).map(|_| UNSEEN))
        {
            flows.add(state);
        }
        self.change(flows, since_start, Phase::Released);
    }

    /// Notes the picture if it is another one than before.
    fn change(&mut self, flows: FlowCounts, since_start: Duration, phase: Phase) {
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

    /// The busiest late peers first, of those whose last flow did not arrive before `since`.
    pub(super) fn late_peers(&self, since: BootTime) -> Vec<LatePeer> {
        let late = self.late.iter().filter(|(_, late)| late.last >= since);
        let mut peers: Vec<_> = late
            .map(|(address, late)| LatePeer {
                address: *address,
                flows: late.flows,
            })
            .collect();
        peers.sort_unstable_by_key(|p| (Reverse(p.flows), p.address));
        peers.truncate(MAX_LATE_PEERS);
        peers
    }

    /// The flows that are open at `now`, as far as the last look and the edges since tell: the first few
    /// of them, and how many they are.
    pub(super) fn still_open(&self, open: &OpenFlows, now: BootTime) -> (Vec<CutFlow>, u32) {
        let seen = self.last_look.iter().flat_map(|look| {
            let since_look = now.since(look.taken_at);
            left(look, open).map(move |f| cut(f, since_look))
        });
        let nothing = Snapshot {
            taken_at: now,
            flows: vec![],
        };
        let look = self.last_look.as_ref().unwrap_or(&nothing);
        let unseen = announced(look, open).map(|how| CutFlow {
            remote: how.remote,
            local: how.local,
            state: UNSEEN,
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

/// What a flow was that no look has shown, when last heard of.
const UNSEEN: FlowState = FlowState::Backlog;

/// The flows of a look that are still open.
fn left<'a>(look: &'a Snapshot, open: &'a OpenFlows) -> impl Iterator<Item = &'a Flow> {
    look.holding().filter(|f| open.contains(f.cookie))
}

/// The open flows that edges have announced and the look does not show.
fn announced<'a>(look: &'a Snapshot, open: &'a OpenFlows) -> impl Iterator<Item = Opened> + 'a {
    let shown: HashSet<_> = look.holding().map(|f| f.cookie).collect();
    open.announced()
        .filter(move |(cookie, _)| !shown.contains(cookie))
        .map(|(_, how)| how)
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
        tally.end_of(&OpenFlows::default(), Duration::ZERO);
        assert_eq!(
            tally.changes,
            [],
            "there is no picture before the first look"
        );
        for (ms, phase) in [(1, Phase::Settle), (2, Phase::Settle), (3, Phase::Drain)] {
            tally.change(counts(1), Duration::from_millis(ms), phase);
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
            tally.change(counts(n), Duration::from_millis(n.into()), Phase::Drain);
        }
        assert_eq!(tally.changes.len(), MAX_CHANGES);
        assert_eq!(tally.changes[0].flows, counts(0));
        assert_eq!(tally.changes[MAX_CHANGES - 1].flows, counts(999));
    }

    const EARLY: BootTime = BootTime::from_nanos(1);

    #[test]
    fn the_busiest_late_peers_come_first_and_their_number_is_bounded() {
        let mut tally = Tally::default();
        for n in 0..10_000_u32 {
            tally.arrival(SocketAddr::new(IpAddr::from(n.to_be_bytes()), 1), EARLY);
        }
        tally.arrival("[::ffff:0.0.0.7]:1".parse().expect("an address"), EARLY);
        assert_eq!(tally.arrived, 10_001);
        assert_eq!(tally.late.len(), MAX_COUNTED_PEERS);
        let peers = tally.late_peers(BootTime::default());
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
