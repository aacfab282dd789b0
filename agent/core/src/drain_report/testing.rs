//! A report for the tests of code that reads reports.

use super::{DeadlineCause, Phase, ReleaseReason, Report};
use crate::{
    flow::FlowCounts,
    ids::{PodName, PodUid},
    notification::Notified,
    policy::Until,
};

/// The report of pod shop/web (`u1`), which had 41 flows.
pub fn report(reason: Option<ReleaseReason>) -> Report {
    Report {
        pod: PodName {
            uid: PodUid::new("u1"),
            namespace: "shop".into(),
            name: "web".into(),
        },
        workload: None,
        started_at: "2026-01-01T00:00:00Z".into(),
        observed: false,
        traceparent: None,
        phase: Phase::Released,
        reason,
        detail: None,
        until: Until::Zero,
        held_ms: 8200,
        deadline_ms: 25_000,
        deadline_cause: DeadlineCause::Grace,
        holds: 1,
        flows_at_start: Some(FlowCounts {
            active: 40,
            idle: 1,
            ..FlowCounts::default()
        }),
        flows_now: None,
        changes: vec![],
        arrived: Some(2),
        ended: Some(43),
        idle_closed: 0,
        cut: vec![],
        cut_total: Some(0),
        late_peers: vec![],
        still_arriving: false,
        settle: None,
        settled_ms: None,
        release_lag_us: None,
        released_by: None,
        dumps_ended: 1,
        dumps: std::collections::BTreeMap::new(),
        lookups: 0,
        notified: Notified::NOTHING,
        warnings: vec![],
    }
}
