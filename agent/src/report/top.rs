//! The picture of `ebb top`: the busiest pods of the node on one screen.

use std::cmp::Reverse;

use super::{
    table::{Left, Right, Table, by_state, number},
    text::duration,
    view::{DrainList, PodList, PodView},
};
use crate::drain::report::{Phase, Report};

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Characters in a line.
    pub columns: usize,
    /// Lines.
    pub rows: usize,
}

/// A line about all of the node, then its pods: those in a drain, then by live flows, then by idle ones. `now` and
/// `problem`, what is wrong with the picture, come first. What a terminal of this size has no room for is left out
/// and counted.
pub fn picture(
    now: &str,
    problem: Option<&str>,
    pods: &PodList,
    drains: &DrainList,
    size: Option<Size>,
) -> String {
    let under_way = |pod: &PodView| {
        let mut all = drains.drains.iter();
        all.find(|r| r.reason.is_none() && r.pod.uid == pod.pod.uid)
    };
    let mut rows: Vec<_> = pods.pods.iter().map(|pod| (pod, under_way(pod))).collect();
    rows.sort_by_key(|(pod, drain)| {
        let flows = pod.flows.map(|f| (f.live(), f.idle));
        Reverse((drain.is_some(), flows))
    });
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("POD", Left),
        ("LIVE", Right),
        ("IDLE", Right),
        ("PEERS", Right),
        ("OLDEST", Right),
        ("DRAIN", Left),
        ("FLOWS", Left),
    ]);
    for (pod, drain) in &rows {
        t.row(row(pod, *drain).each_ref().map(|cell| cell as _));
    }
    let mut text = format!("{now}  {}\n", summary(pods, &rows));
    if let Some(problem) = problem {
        text += &format!("{problem}\n");
    }
    text += &t.render();
    match size {
        Some(size) => fitted(&text, size),
        None => text,
    }
}

fn summary(pods: &PodList, rows: &[(&PodView, Option<&Report>)]) -> String {
    let seen = || pods.pods.iter().filter_map(|p| p.flows);
    let live: u32 = seen().map(|f| f.live()).sum();
    let idle: u32 = seen().map(|f| f.idle).sum();
    let draining = rows.iter().filter(|(_, drain)| drain.is_some()).count();
    let untracked = match rows.len() - seen().count() {
        0 => String::new(),
        n => format!(" ({n} untracked)"),
    };
    format!(
        "{} pods{untracked}, {draining} draining, {live} live and {idle} idle flows",
        rows.len()
    )
}

fn row(p: &PodView, drain: Option<&Report>) -> [String; 8] {
    [
        p.pod.namespace.clone(),
        p.pod.name.clone(),
        number(p.flows.map(|f| f.live())),
        number(p.flows.map(|f| f.idle)),
        number(p.peers),
        p.oldest_ms.map_or_else(|| "-".into(), duration),
        drain.map_or_else(|| "-".into(), progress),
        p.flows.map_or_else(|| "untracked".into(), |f| by_state(&f)),
    ]
}

/// `draining, 8.2s of 25.0s`.
fn progress(drain: &Report) -> String {
    let phase = match drain.phase {
        Phase::Settle => "settling",
        Phase::Drain | Phase::Released => "draining",
    };
    let (held, deadline) = (duration(drain.held_ms), duration(drain.deadline_ms));
    format!("{phase}, {held} of {deadline}")
}

/// As much of it as fits; the last line then says how many do not.
fn fitted(text: &str, size: Size) -> String {
    let narrow = |line: &str| line.chars().take(size.columns).collect::<String>() + "\n";
    let lines = text.lines().count();
    if lines <= size.rows {
        return text.lines().map(narrow).collect();
    }
    let shown = size.rows.saturating_sub(1);
    let more = format!("… and {} more", lines - shown);
    let lines = text.lines().take(shown).chain([more.as_str()]);
    lines.map(narrow).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        drain::report::{ReleaseReason, testing::report},
        flow::FlowCounts,
        ids::{PodName, PodUid},
        report::view::{Network, SCHEMA},
    };

    fn pod(name: &str, flows: Option<(u32, u32)>) -> PodView {
        PodView {
            pod: PodName {
                uid: PodUid::new(name),
                namespace: "shop".into(),
                name: name.into(),
            },
            network: Network::Pod,
            ips: vec![],
            containers: vec![],
            flows: flows.map(|(active, idle)| FlowCounts {
                active,
                idle,
                ..FlowCounts::default()
            }),
            peers: flows.map(|_| 1),
            exempt: None,
            oldest_ms: flows.map(|_| 61_000),
            untracked: flows.is_none().then(|| "runsc sandbox".into()),
            warnings: vec![],
        }
    }

    fn lists() -> (PodList, DrainList) {
        let pods = PodList {
            schema: SCHEMA.into(),
            pods: vec![
                pod("api", Some((2, 7))),
                pod("cache", None),
                pod("going", Some((0, 1))),
                pod("web", Some((40, 0))),
            ],
        };
        let drain_of = |uid: &str, reason| {
            let mut drain = report(reason);
            drain.pod.uid = PodUid::new(uid);
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

    #[test]
    fn what_drains_comes_first_then_what_is_busiest_and_what_is_unknown_last() {
        let (pods, drains) = lists();
        let text = picture("now", None, &pods, &drains, None);
        let expected = "\
now  4 pods (1 untracked), 1 draining, 42 live and 8 idle flows
NAMESPACE  POD    LIVE  IDLE  PEERS  OLDEST  DRAIN                    FLOWS
shop       going     0     1      1   1m01s  settling, 8.2s of 25.0s  1 idle
shop       web      40     0      1   1m01s  -                        40 active
shop       api       2     7      1   1m01s  -                        2 active, 7 idle
shop       cache     ?     ?      ?       -  -                        untracked
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_terminal_gets_what_fits_and_is_told_what_does_not() {
        let (pods, drains) = lists();
        let size = Size {
            columns: 16,
            rows: 5,
        };
        let text = picture("now", Some("the agent is gone"), &pods, &drains, Some(size));
        let expected = "\
now  4 pods (1 u
the agent is gon
NAMESPACE  POD  
shop       going
… and 3 more
";
        assert_eq!(text, expected);
        for rows in 0..8 {
            let size = Size { columns: 80, rows };
            let text = picture("now", None, &pods, &drains, Some(size));
            assert!(text.lines().count() <= rows.max(1), "{rows}: {text}");
        }
    }
}
