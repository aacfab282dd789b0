//! Lookups, which replace a dump if they agree with the events since the last one.

use std::collections::HashSet;

use super::flows::OpenFlows;
use crate::{
    flow::{Age, Direction, Flow, Snapshot},
    ids::SocketCookie,
};

/// Makes a snapshot from the lookups `found` and from `last`, the snapshot before. `None` if the lookups contradict the
/// events.
///
/// It has all flows. No event was outstanding, so each flow that had opened by then was in the last dump or was
/// announced by an event. Either it counts as open and was looked up, or it has closed. If a flow has closed just now,
/// the event is right.
pub(super) fn complete(
    found: Snapshot,
    cookies: &HashSet<SocketCookie>,
    last: &Snapshot,
    flows: &OpenFlows,
) -> Option<Snapshot> {
    if !flows.agree(found.taken_at, cookies) {
        return None;
    }
    let (exempt, holding): (Vec<_>, Vec<_>) = last.flows.iter().partition(|f| f.exempt.is_some());
    let known_exempt: HashSet<_> = exempt.iter().map(|f| f.cookie).collect();
    let now = found
        .flows
        .into_iter()
        .filter(|f| flows.contains(f.cookie) && !known_exempt.contains(&f.cookie))
        .map(|flow| {
            let before = holding.iter().find(|f| f.cookie == flow.cookie).copied();
            let age = match (before, flows.opened_how(flow.cookie)) {
                (Some(before), _) => before.age.after(found.taken_at.since(last.taken_at)),
                (None, Some(opened)) => Age::Known(found.taken_at.since(opened.at)),
                (None, None) => flow.age,
            };
            identified(flow, before, age)
        });
    let flows = now.chain(exempt.iter().copied().cloned()).collect();
    Some(Snapshot {
        taken_at: found.taken_at,
        flows,
        listens: None,
    })
}

/// A lookup shows the state of a flow; its direction and its cgroup are those of the snapshot before.
fn identified(flow: Flow, before: Option<&Flow>, age: Age) -> Flow {
    Flow {
        direction: before.map_or(Direction::Inbound, |f| f.direction),
        age,
        exempt: None,
        cgroup: before.map_or(flow.cgroup, |f| f.cgroup),
        ..flow
    }
}

/// The cookies of these flows.
pub(super) fn cookies(of: &Snapshot) -> HashSet<SocketCookie> {
    of.flows.iter().map(|f| f.cookie).collect()
}
