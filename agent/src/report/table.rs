//! Aligned tables for people.

use std::fmt::Write as _;

use super::{
    text::{bytes, duration},
    view::{DrainList, FlowList, FlowView, PodList, PodView},
};
use crate::{
    drain::report::{Phase, Report},
    flow::{Direction, FlowCounts, FlowState},
};

/// How a column is aligned.
#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}
use Align::{Left, Right};

/// A table under construction.
struct Table<const N: usize> {
    columns: [(&'static str, Align); N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    const fn new(columns: [(&'static str, Align); N]) -> Self {
        Self {
            columns,
            rows: Vec::new(),
        }
    }

    fn render(&self) -> String {
        let width = |i: usize| {
            let cells = self.rows.iter().map(|r| r[i].chars().count());
            cells.chain([self.columns[i].0.len()]).max().unwrap_or(0)
        };
        let widths: [usize; N] = std::array::from_fn(width);
        let mut out = String::new();
        let heads = self.columns.map(|(name, _)| name.to_owned());
        for row in std::iter::once(&heads).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, (_, align)), w) in row.iter().zip(&self.columns).zip(widths) {
                // Writing to a string does not fail.
                let _ = match align {
                    Left => write!(line, "{cell:<w$}  "),
                    Right => write!(line, "{cell:>w$}  "),
                };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// `ebb pods`.
pub fn pods(list: &PodList) -> String {
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("POD", Left),
        ("NETWORK", Left),
        ("LIVE", Right),
        ("IDLE", Right),
        ("PEERS", Right),
        ("OLDEST", Right),
        ("FLOWS", Left),
    ]);
    for p in &list.pods {
        t.rows.push(pod_row(p));
    }
    let mut out = t.render();
    for p in &list.pods {
        for w in &p.warnings {
            let _ = writeln!(out, "{}: {w}", p.pod);
        }
    }
    out
}

/// `?` for what is not known.
fn number(n: Option<u32>) -> String {
    n.map_or_else(|| "?".into(), |n| n.to_string())
}

fn pod_row(p: &PodView) -> [String; 8] {
    [
        p.pod.namespace.clone(),
        p.pod.name.clone(),
        p.network.name().into(),
        number(p.flows.map(|f| f.live())),
        number(p.flows.map(|f| f.idle)),
        number(p.peers),
        p.oldest_ms.map_or_else(|| "-".into(), duration),
        match (&p.flows, &p.untracked) {
            (Some(f), _) => by_state(f),
            (None, Some(why)) => format!("untracked: {why}"),
            (None, None) => "untracked".into(),
        },
    ]
}

/// `2 active, 1 awaiting`; `-` for none.
pub fn by_state(counts: &FlowCounts) -> String {
    let parts: Vec<_> = FlowState::ALL
        .iter()
        .filter(|s| counts.of(**s) > 0)
        .map(|s| format!("{} {s}", counts.of(*s)))
        .collect();
    if parts.is_empty() {
        "-".into()
    } else {
        parts.join(", ")
    }
}

/// `ebb flows`.
pub fn flows(list: &FlowList) -> String {
    let mut t = Table::new([
        ("POD", Left),
        ("DIR", Left),
        ("STATE", Left),
        ("PEER", Left),
        ("LOCAL", Left),
        ("AGE", Right),
        ("QUIET", Right),
        ("IN", Right),
        ("OUT", Right),
        ("HOLDS", Left),
    ]);
    for f in &list.flows {
        t.rows.push(flow_row(f));
    }
    let mut out = t.render();
    for u in &list.untracked {
        let _ = writeln!(out, "{}: flows can't be seen: {}", u.pod, u.why);
    }
    out
}

fn flow_row(f: &FlowView) -> [String; 10] {
    let age = f.age_ms.map_or_else(|| "?".into(), duration);
    [
        f.pod.clone(),
        match f.direction {
            Direction::Inbound => "in".into(),
            Direction::Outbound => "out".into(),
        },
        f.state.name().into(),
        f.remote.to_string(),
        f.local.to_string(),
        if f.older_than_agent && f.age_ms.is_some() {
            format!(">{age}")
        } else {
            age
        },
        duration(f.quiet_ms),
        bytes(f.bytes_in),
        bytes(f.bytes_out),
        match f.exempt {
            None => "yes".into(),
            Some(why) => format!("no: {}", why.name()),
        },
    ]
}

/// `ebb drains`.
pub fn drains(list: &DrainList) -> String {
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("POD", Left),
        ("PHASE", Left),
        ("HELD", Right),
        ("DEADLINE", Right),
        ("AT START", Left),
        ("NOW", Left),
        ("ARRIVED", Right),
        ("ENDED", Right),
        ("CUT", Right),
        ("LAG", Right),
    ]);
    for r in &list.drains {
        t.rows.push(drain_row(r));
    }
    let mut out = t.render();
    for r in &list.drains {
        let _ = write!(out, "{}", footnotes(r));
    }
    out
}

fn drain_row(r: &Report) -> [String; 11] {
    let flows = |f: Option<FlowCounts>| f.map_or_else(|| "?".into(), |f| by_state(&f));
    [
        r.pod.namespace.clone(),
        r.pod.name.clone(),
        match (r.phase, r.reason) {
            (_, Some(reason)) => reason.name().into(),
            (Phase::Settle, None) => "settling".into(),
            (Phase::Drain | Phase::Released, None) => "draining".into(),
        },
        duration(r.held_ms),
        duration(r.deadline_ms),
        flows(r.flows_at_start),
        flows(r.flows_now),
        number(r.arrived),
        number(r.ended),
        number(r.cut_total),
        r.release_lag_us
            .map_or_else(|| "-".into(), |us| format!("{us}µs")),
    ]
}

/// What does not fit in a row: who was cut, who still connected, what went wrong.
fn footnotes(r: &Report) -> String {
    let pod = &r.pod;
    let mut out = String::new();
    for c in &r.cut {
        let _ = writeln!(
            out,
            "{pod}: cut {} {} after {} ({} in, {} out)",
            c.remote,
            c.state,
            c.age_ms.map_or_else(|| "?".into(), duration),
            bytes(c.bytes_in),
            bytes(c.bytes_out)
        );
    }
    for p in &r.late_peers {
        let _ = writeln!(
            out,
            "{pod}: {} still connected, {} times",
            p.address, p.flows
        );
    }
    for line in r.detail.iter().chain(&r.warnings) {
        let _ = writeln!(out, "{pod}: {line}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_do_not_trail() {
        let mut t = Table::new([("A", Left), ("LONG", Right), ("Z", Left)]);
        t.rows.push(["wide cell".into(), "7".into(), String::new()]);
        assert_eq!(t.render(), "A          LONG  Z\nwide cell     7\n");
    }

    #[test]
    fn unknown_is_a_question_mark_and_never_a_zero() {
        let list = PodList {
            schema: super::super::view::SCHEMA.into(),
            pods: vec![PodView {
                pod: crate::drain::report::PodName {
                    uid: crate::ids::PodUid::new("u"),
                    namespace: "default".into(),
                    name: "web".into(),
                },
                network: super::super::view::Network::Untracked,
                ips: vec![],
                containers: vec![],
                flows: None,
                peers: None,
                exempt: None,
                oldest_ms: None,
                untracked: Some("runsc sandbox".into()),
                warnings: vec![],
            }],
        };
        let text = pods(&list);
        assert!(text.contains("untracked: runsc sandbox"), "{text}");
        assert!(!text.lines().nth(1).unwrap().contains('0'), "{text}");
    }
}
