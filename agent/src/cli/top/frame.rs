//! One frame of `ebb top` as text, for a file or a pipe.

use ebb_core::{drain_report::Report, format::duration};
use ebb_protocol::{
    table::{Left, Right, Table, by_state, number, oldest, per_second},
    views::{DrainList, PodList},
};

use super::{
    details::state,
    rows::{PodRow, busiest_first, pod_rows},
};

/// A summary of the node, with the time `now`, then its pods: draining ones first, then by live flows, then by idle
/// flows. `problem` says why the lists are old.
pub(super) fn frame(
    now: &str,
    problem: Option<&str>,
    pods: &PodList,
    drains: &DrainList,
) -> String {
    let mut rows: Vec<_> = pod_rows(pods, Some(drains)).collect();
    rows.sort_by(busiest_first);
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("NAME", Left),
        ("LIVE", Right),
        ("IDLE", Right),
        ("NEW/S", Right),
        ("PEERS", Right),
        ("OLDEST", Right),
        ("DRAIN", Left),
        ("FLOWS", Left),
    ]);
    for pod in &rows {
        t.row(row(pod).each_ref().map(|cell| cell as _));
    }
    let mut text = format!("{now}  {}\n", summary(&rows));
    if let Some(problem) = problem {
        text += &format!("{problem}\n");
    }
    text + &t.render()
}

/// `4 pods (1 untracked), 1 draining, 42 live and 8 idle flows`.
pub(super) fn summary(rows: &[PodRow<'_>]) -> String {
    let seen = || rows.iter().filter_map(|row| row.pod.flows);
    let live: u32 = seen().map(|f| f.live()).sum();
    let idle: u32 = seen().map(|f| f.idle).sum();
    let draining = rows.iter().filter(|row| row.drain.is_some()).count();
    let untracked = match rows.len() - seen().count() {
        0 => String::new(),
        n => format!(" ({n} untracked)"),
    };
    format!(
        "{} pods{untracked}, {draining} draining, {live} live and {idle} idle flows",
        rows.len()
    )
}

fn row(row: &PodRow<'_>) -> [String; 9] {
    let p = row.pod;
    [
        p.pod.namespace.clone(),
        p.pod.name.clone(),
        number(p.flows.map(|f| f.live())),
        number(p.flows.map(|f| f.idle)),
        per_second(p.new_per_second),
        number(p.peers),
        oldest(p),
        row.drain.map_or_else(|| "-".into(), progress),
        p.flows.map_or_else(|| "untracked".into(), |f| by_state(&f)),
    ]
}

/// `draining, 8.2s of 25.0s`.
fn progress(drain: &Report) -> String {
    let (held, deadline) = (duration(drain.held_ms), duration(drain.deadline_ms));
    format!("{}, {held} of {deadline}", state(drain))
}

#[cfg(test)]
mod tests {
    use super::{super::testing::lists, *};

    #[test]
    fn draining_pods_come_first_then_the_busiest_and_untracked_pods_last() {
        let (pods, drains) = lists();
        let text = frame("now", Some("not refreshed"), &pods, &drains);
        let expected = "\
now  4 pods (1 untracked), 1 draining, 42 live and 8 idle flows
not refreshed
NAMESPACE  NAME   LIVE  IDLE  NEW/S  PEERS  OLDEST  DRAIN                    FLOWS
shop       going     0     1    1.5      1   1m01s  settling, 8.2s of 25.0s  1 idle
shop       web      40     0      -      1   1m01s  -                        40 active
shop       api       2     7     10      1   1m01s  -                        2 active, 7 idle
shop       cache     ?     ?      ?      ?       ?  -                        untracked
";
        assert_eq!(text, expected);
    }
}
