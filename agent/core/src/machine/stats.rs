//! The counts of a drain, for its report.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::flows::{Announced, OpenFlows};
use crate::{
    clock::{BootTime, millis},
    drain_report::{CutFlow, FlowsChange, LatePeer, Phase},
    flow::{Age, Flow, FlowCounts, FlowState, Snapshot},
    ids::SocketCookie,
};

const MAX_CHANGES: usize = 256;
const MAX_CUT: usize = 256;
const MAX_LATE_PEERS: usize = 64;
/// The most addresses that are counted separately.
const MAX_COUNTED_PEERS: usize = 4096;

/// The flows that arrived from one address.
#[derive(Clone, Copy, Debug, Default)]
struct Late {
    flows: u32,
    last: BootTime,
}

/// The sums of a drain.
#[derive(Debug, Default)]
pub(super) struct DrainStats {
    pub(super) flows_at_start: Option<FlowCounts>,
    pub(super) flows_now: Option<FlowCounts>,
    pub(super) changes: Vec<FlowsChange>,
    pub(super) arrived: u32,
    pub(super) ended: u32,
    pub(super) idle_closed: u32,
    late: HashMap<IpAddr, Late>,
    last_snapshot: Option<Snapshot>,
}

impl DrainStats {
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
    pub(super) fn flows_ended(&mut self, flows: u32) {
        self.ended = self.ended.saturating_add(flows);
    }

    /// A snapshot was made.
    pub(super) fn record(&mut self, snapshot: Snapshot, since_start: Duration, phase: Phase) {
        let counts = snapshot.counts();
        self.flows_at_start.get_or_insert(counts);
        self.flows_now = Some(counts);
        self.last_snapshot = Some(snapshot);
        self.change(counts, since_start, phase);
    }

    /// The last snapshot.
    pub(super) fn last_snapshot(&self) -> Option<&Snapshot> {
        self.last_snapshot.as_ref()
    }

    /// The moment of the last snapshot.
    pub(super) fn last_taken_at(&self) -> Option<BootTime> {
        self.last_snapshot
            .as_ref()
            .map(|snapshot| snapshot.taken_at)
    }

    /// The drain is over, with what is left of the last snapshot's flows and what events have announced since.
    /// Without a snapshot the flows are unknown.
    pub(super) fn drain_ended(&mut self, open: &OpenFlows, since_start: Duration) {
        let Some(snapshot) = &self.last_snapshot else {
            return;
        };
        let mut flows = FlowCounts::default();
        for state in left(snapshot, open)
            .map(|f| f.state)
            .chain(announced(snapshot, open).map(|_| UNSEEN))
        {
            flows.add(state);
        }
        self.change(flows, since_start, Phase::Released);
    }

    /// Adds a change to the report, if the phase or the counts differ from the last one.
    fn change(&mut self, flows: FlowCounts, since_start: Duration, phase: Phase) {
        if self
            .changes
            .last()
            .is_some_and(|last| last.phase == phase && last.flows == flows)
        {
            return;
        }
        if self.changes.len() == MAX_CHANGES {
            // The list is full. The newest entry matters more than the one before it.
            self.changes.pop();
        }
        self.changes.push(FlowsChange {
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
                peer: None,
                flows: late.flows,
            })
            .collect();
        peers.sort_unstable_by_key(|p| (Reverse(p.flows), p.address));
        peers.truncate(MAX_LATE_PEERS);
        peers
    }

    /// What is known of this flow at `at`, if it is open.
    pub(super) fn open_flow(
        &self,
        open: &OpenFlows,
        cookie: SocketCookie,
        at: BootTime,
    ) -> Option<CutFlow> {
        if !open.contains(cookie) {
            return None;
        }
        let snapshot = self.last_snapshot.as_ref();
        let seen = snapshot.and_then(|s| s.not_exempt().find(|f| f.cookie == cookie).zip(Some(s)));
        match seen {
            Some((flow, snapshot)) => Some(cut(flow, at.since(snapshot.taken_at))),
            None => open.opened_how(cookie).map(|how| unseen(how, at)),
        }
    }

    /// The flows that are cut: those that `ended` with the containers, and those that are open at `now`, by the last
    /// snapshot and the events since. The first few of them, and their number.
    pub(super) fn cut<'a>(
        &self,
        open: &OpenFlows,
        ended: impl Iterator<Item = &'a CutFlow>,
        now: BootTime,
    ) -> (Vec<CutFlow>, u32) {
        let seen = self.last_snapshot.iter().flat_map(|snapshot| {
            let since_snapshot = now.since(snapshot.taken_at);
            left(snapshot, open).map(move |f| cut(f, since_snapshot))
        });
        let nothing = Snapshot {
            taken_at: now,
            flows: vec![],
            listens: None,
        };
        let snapshot = self.last_snapshot.as_ref().unwrap_or(&nothing);
        let unseen = announced(snapshot, open).map(|how| unseen(how, now));
        let mut all: Vec<_> = ended.cloned().chain(seen).chain(unseen).collect();
        let total = u32::try_from(all.len()).unwrap_or(u32::MAX);
        all.truncate(MAX_CUT);
        (all, total)
    }
}

/// The last known state of a flow that no snapshot has shown.
const UNSEEN: FlowState = FlowState::Backlog;

/// The flows of a snapshot that are still open.
fn left<'a>(snapshot: &'a Snapshot, open: &'a OpenFlows) -> impl Iterator<Item = &'a Flow> {
    snapshot.not_exempt().filter(|f| open.contains(f.cookie))
}

/// The open flows that events have announced and the snapshot does not show.
fn announced<'a>(
    snapshot: &'a Snapshot,
    open: &'a OpenFlows,
) -> impl Iterator<Item = Announced> + 'a {
    let shown: HashSet<_> = snapshot.not_exempt().map(|f| f.cookie).collect();
    open.announced()
        .filter(move |(cookie, _)| !shown.contains(cookie))
        .map(|(_, how)| how)
}

fn unseen(how: Announced, now: BootTime) -> CutFlow {
    CutFlow {
        remote: how.remote,
        peer: None,
        local: how.local,
        state: UNSEEN,
        age_ms: Some(millis(now.since(how.at))),
        age_at_least_ms: None,
        bytes_in: 0,
        bytes_out: 0,
    }
}

fn cut(flow: &Flow, since_snapshot: Duration) -> CutFlow {
    let (age_ms, age_at_least_ms) = match flow.age_to_show() {
        Age::Known(age) => (Some(millis(age + since_snapshot)), None),
        Age::AtLeast(age) => (None, Some(millis(age + since_snapshot))),
    };
    CutFlow {
        remote: flow.remote,
        peer: None,
        local: flow.local,
        state: flow.state,
        age_ms,
        age_at_least_ms,
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
        let mut stats = DrainStats::default();
        stats.drain_ended(&OpenFlows::default(), Duration::ZERO);
        assert_eq!(
            stats.changes,
            [],
            "there is no picture before the first snapshot"
        );
        for (ms, phase) in [(1, Phase::Settle), (2, Phase::Settle), (3, Phase::Drain)] {
            stats.change(counts(1), Duration::from_millis(ms), phase);
        }
        assert_eq!(
            stats.changes,
            [
                FlowsChange {
                    at_ms: 1,
                    phase: Phase::Settle,
                    flows: counts(1)
                },
                FlowsChange {
                    at_ms: 3,
                    phase: Phase::Drain,
                    flows: counts(1)
                },
            ]
        );
    }

    #[test]
    fn the_list_of_pictures_is_bounded_and_ends_with_the_newest() {
        let mut stats = DrainStats::default();
        for n in 0..1000 {
            stats.change(counts(n), Duration::from_millis(n.into()), Phase::Drain);
        }
        assert_eq!(stats.changes.len(), MAX_CHANGES);
        assert_eq!(stats.changes[0].flows, counts(0));
        assert_eq!(stats.changes[MAX_CHANGES - 1].flows, counts(999));
    }

    const EARLY: BootTime = BootTime::from_nanos(1);

    #[test]
    fn the_busiest_late_peers_come_first_and_their_number_is_bounded() {
        let mut stats = DrainStats::default();
        for n in 0..10_000_u32 {
            stats.arrival(SocketAddr::new(IpAddr::from(n.to_be_bytes()), 1), EARLY);
        }
        stats.arrival("[::ffff:0.0.0.7]:1".parse().expect("an address"), EARLY);
        assert_eq!(stats.arrived, 10_001);
        assert_eq!(stats.late.len(), MAX_COUNTED_PEERS);
        let peers = stats.late_peers(BootTime::default());
        assert_eq!(peers.len(), MAX_LATE_PEERS);
        assert_eq!(
            peers[0],
            LatePeer {
                address: IpAddr::from([0, 0, 0, 7]),
                peer: None,
                flows: 2
            }
        );
    }
}
