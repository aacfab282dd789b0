//! Converts pods and flows into the JSON types of `ebb-protocol`.

use std::sync::Arc;

use ebb_core::{
    clock::millis,
    flow::{Age, Flow, Snapshot},
    ids::PodName,
    scope::Scope,
};
use ebb_protocol::views::{ContainerView, FlowView, Network, PodView};

use crate::pods::Pod;

pub(super) fn pod_view(
    pod: &Pod,
    seen: Result<&Snapshot, String>,
    new_per_second: Option<f64>,
    warnings: Vec<String>,
) -> PodView {
    let snapshot = seen.as_ref().ok().copied();
    let not_exempt = || snapshot.into_iter().flat_map(Snapshot::not_exempt);
    let peers: std::collections::HashSet<_> = not_exempt().map(|f| f.remote.ip()).collect();
    let ages = || not_exempt().map(Flow::age_to_show);
    let oldest = ages().map(Age::at_least).max();
    // A connection of unknown age may be the oldest, whatever its lower bound.
    let oldest_is_at_least = ages().any(|age| age.known().is_none());
    PodView {
        pod: pod.name.clone(),
        network: match pod.scope {
            Scope::Netns { .. } => Network::Pod,
            Scope::HostNetwork(_) => Network::Host,
            Scope::Untracked(_) => Network::Untracked,
        },
        ips: pod.ips.clone(),
        labels: pod.labels.clone(),
        containers: pod
            .containers
            .iter()
            .map(|c| ContainerView {
                name: c.name.clone(),
                id: c.id.clone(),
                running: c.running,
            })
            .collect(),
        flows: snapshot.map(Snapshot::counts),
        peers: snapshot.map(|_| count(peers.len())),
        exempt: snapshot.map(|s| count(s.flows.iter().filter(|f| f.exempt.is_some()).count())),
        new_per_second,
        oldest_ms: oldest.map(millis),
        oldest_is_at_least,
        untracked: seen.err(),
        warnings,
    }
}

/// `peer` has the peer's address, and `container` is the container whose process created the socket, if these are known.
pub(super) fn flow_view(
    pod: &Arc<PodName>,
    flow: &Flow,
    peer: Option<Arc<str>>,
    container: Option<Arc<str>>,
) -> FlowView {
    FlowView {
        pod: Arc::clone(pod),
        direction: flow.direction,
        state: flow.state,
        live: flow.state.is_live(),
        holds: flow.holds(),
        exempt: flow.exempt,
        local: flow.local,
        remote: flow.remote,
        peer,
        age_ms: flow.age_to_show().known().map(millis),
        age_at_least_ms: match flow.age_to_show() {
            Age::Known(_) => None,
            Age::AtLeast(age) => Some(millis(age)),
        },
        quiet_ms: millis(flow.quiet_for),
        bytes_in: flow.bytes_in,
        bytes_out: flow.bytes_out,
        container,
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ebb_core::{
        clock::BootTime,
        flow::{Direction, FlowState},
        ids::SocketCookie,
    };

    use super::*;
    use crate::pods::table::tests::pod;

    fn flow(age: Age) -> Flow {
        Flow {
            cookie: SocketCookie(1),
            direction: Direction::Inbound,
            local: ([10, 0, 0, 2], 80).into(),
            remote: ([10, 0, 0, 9], 5000).into(),
            state: FlowState::Active,
            exempt: None,
            age,
            quiet_for: Duration::ZERO,
            unanswered_for: None,
            bytes_in: 0,
            bytes_out: 0,
            cgroup: None,
        }
    }

    #[test]
    fn the_oldest_age_is_a_lower_bound_if_any_age_is() {
        let ms = Duration::from_millis;
        let oldest = |ages: &[Age]| {
            let snapshot = Snapshot {
                taken_at: BootTime::now(),
                flows: ages.iter().copied().map(flow).collect(),
                listens: None,
            };
            let view = pod_view(&pod("u1", "web", &[]), Ok(&snapshot), None, vec![]);
            (view.oldest_ms, view.oldest_is_at_least)
        };
        let (new, older_than_the_agent) = (Age::Known(ms(12_000)), Age::AtLeast(ms(50)));
        assert_eq!(oldest(&[]), (None, false));
        assert_eq!(oldest(&[new]), (Some(12_000), false));
        assert_eq!(oldest(&[new, older_than_the_agent]), (Some(12_000), true));
    }
}
