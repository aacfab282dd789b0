//! Lists for the unit tests of `ebb top`.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use ebb_core::{
    drain_report::{Phase, ReleaseReason, testing::report},
    flow::{Direction, FlowCounts, FlowState},
    ids::{PodName, PodUid},
};
use ebb_protocol::views::{DrainList, FlowList, FlowView, Network, PodList, PodView, SCHEMA};

use super::rows::Answers;

pub(super) fn pod_name(name: &str) -> PodName {
    PodName {
        uid: PodUid::new(name),
        namespace: "shop".into(),
        name: name.into(),
    }
}

/// A pod with so many active and idle flows, or an untracked one.
pub(super) fn pod(name: &str, flows: Option<(u32, u32)>) -> PodView {
    PodView {
        pod: pod_name(name),
        network: Network::Pod,
        ips: vec![],
        labels: BTreeMap::from([("app".into(), name.into())]),
        containers: vec![],
        flows: flows.map(|(active, idle)| FlowCounts {
            active,
            idle,
            ..FlowCounts::default()
        }),
        peers: flows.map(|_| 1),
        exempt: None,
        new_per_second: flows.map(|(_, idle)| f64::from(idle) * 1.5),
        oldest_ms: flows.map(|_| 61_000),
        oldest_is_at_least: false,
        untracked: flows.is_none().then(|| "runsc sandbox".into()),
        warnings: vec![],
    }
}

/// Four pods. `going` drains, and `api` has drained.
pub(super) fn lists() -> (PodList, DrainList) {
    let pods = PodList {
        schema: SCHEMA.into(),
        pods: vec![
            pod("api", Some((2, 7))),
            pod("cache", None),
            pod("going", Some((0, 1))),
            pod("web", Some((40, 0))),
        ],
    };
    let drain_of = |name: &str, reason| {
        let mut drain = report(reason);
        drain.pod = pod_name(name);
        drain.phase = Phase::Settle;
        drain
    };
    let drains = DrainList {
        schema: SCHEMA.into(),
        version: 1,
        drains: vec![
            drain_of("going", None),
            drain_of("api", Some(ReleaseReason::Drained)),
        ],
    };
    (pods, drains)
}

/// A flow of `web` with this peer.
pub(super) fn flow(remote: SocketAddr, age_ms: u64) -> FlowView {
    FlowView {
        pod: Arc::new(pod_name("web")),
        direction: Direction::Inbound,
        state: FlowState::Active,
        live: true,
        holds: true,
        exempt: None,
        local: "10.0.0.2:8080".parse().unwrap(),
        remote,
        peer: None,
        age_ms: Some(age_ms),
        age_at_least_ms: None,
        quiet_ms: 56,
        bytes_in: 48,
        bytes_out: 6_900_000,
        container: Some("app".into()),
    }
}

/// All three lists. `web` has `flows` flows, the first of which is the oldest.
pub(super) fn answers(flows: u16) -> Answers {
    let (pods, drains) = lists();
    let flows = (0..flows).map(|n| {
        let remote = SocketAddr::from(([10, 1, (n >> 8) as u8, n as u8], 1024 + n % 60_000));
        flow(remote, 100_000 - u64::from(n))
    });
    let flows = FlowList {
        schema: SCHEMA.into(),
        flows: flows.collect(),
        untracked: vec![],
    };
    Answers {
        pods: Some(pods),
        drains: Some(drains),
        flows: Some((PodUid::new("web"), flows)),
    }
}
