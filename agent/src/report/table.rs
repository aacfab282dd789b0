//! Aligned tables for people.

use std::fmt::{Display, Write as _};

use super::{
    text::{bytes, duration, push_address, push_bytes, push_duration},
    view::{AuditView, DrainList, FlowView, PodList, PodView, UntrackedPod},
};
use crate::{
    drain::report::{Phase, Report},
    flow::{Direction, FlowCounts, FlowState},
};

/// How a column is aligned.
#[derive(Clone, Copy)]
pub(super) enum Align {
    Left,
    Right,
}
pub(super) use Align::{Left, Right};

/// A table under construction. A node has tables of 100,000 rows: the cells are kept end to end in one string.
pub(super) struct Table<const N: usize> {
    columns: [(&'static str, Align); N],
    text: String,
    /// Of each cell: how long it is in `text`, and how wide, in characters.
    cells: Vec<(u32, u32)>,
    /// The widest cell of each column.
    widths: [usize; N],
}

impl<const N: usize> Table<N> {
    pub(super) fn new(columns: [(&'static str, Align); N]) -> Self {
        let mut table = Self {
            columns,
            text: String::new(),
            cells: Vec::new(),
            widths: [0; N],
        };
        for (name, _) in columns {
            table.cell(|text| text.push_str(name));
        }
        table
    }

    pub(super) fn row(&mut self, cells: [&dyn Display; N]) {
        for cell in cells {
            self.cell(|text| {
                // Writing to a string does not fail.
                let _ = write!(text, "{cell}");
            });
        }
    }

    /// Appends the next cell, which `write` writes.
    fn cell(&mut self, write: impl FnOnce(&mut String)) {
        let start = self.text.len();
        write(&mut self.text);
        let cell = &self.text[start..];
        let width = cell.chars().count();
        let widest = &mut self.widths[self.cells.len() % N];
        *widest = (*widest).max(width);
        // A cell is far from 4 GiB.
        self.cells.push((cell.len() as u32, width as u32));
    }

    pub(super) fn render(&self) -> String {
        let line = self.widths.iter().sum::<usize>() + 2 * N + 1;
        let mut out = String::with_capacity(line * (self.cells.len() / N));
        let mut rest = self.text.as_str();
        for row in self.cells.chunks(N) {
            for (((length, width), (_, align)), widest) in
                row.iter().zip(&self.columns).zip(self.widths)
            {
                let (cell, later) = rest.split_at(*length as usize);
                rest = later;
                let blank = widest - *width as usize;
                match align {
                    Left => {
                        out.push_str(cell);
                        blanks(&mut out, blank);
                    }
                    Right => {
                        blanks(&mut out, blank);
                        out.push_str(cell);
                    }
                }
                out.push_str("  ");
            }
            out.truncate(out.trim_end_matches(' ').len());
            out.push('\n');
        }
        out
    }
}

fn blanks(out: &mut String, mut n: usize) {
    const BLANKS: &str = "                                ";
    while n > 0 {
        let some = n.min(BLANKS.len());
        out.push_str(&BLANKS[..some]);
        n -= some;
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
        t.row(pod_row(p).each_ref().map(|cell| cell as _));
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
pub(super) fn number(n: Option<u32>) -> String {
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
pub fn flows(flows: impl Iterator<Item = FlowView>, untracked: &[UntrackedPod]) -> String {
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
    for f in flows {
        flow_row(&mut t, &f);
    }
    let mut out = t.render();
    for u in untracked {
        let _ = writeln!(out, "{}: flows can't be seen: {}", u.pod, u.why);
    }
    out
}

fn flow_row(t: &mut Table<10>, f: &FlowView) {
    t.cell(|text| {
        text.push_str(&f.pod.namespace);
        text.push('/');
        text.push_str(&f.pod.name);
    });
    t.cell(|text| {
        text.push_str(match f.direction {
            Direction::Inbound => "in",
            Direction::Outbound => "out",
        });
    });
    t.cell(|text| text.push_str(f.state.name()));
    t.cell(|text| push_address(text, f.remote));
    t.cell(|text| push_address(text, f.local));
    t.cell(|text| match f.age_ms {
        None => text.push('?'),
        Some(age) => {
            if f.older_than_agent == Some(true) {
                text.push('>');
            }
            push_duration(text, age);
        }
    });
    t.cell(|text| push_duration(text, f.quiet_ms));
    t.cell(|text| push_bytes(text, f.bytes_in));
    t.cell(|text| push_bytes(text, f.bytes_out));
    t.cell(|text| match f.exempt {
        None => text.push_str("yes"),
        Some(why) => {
            text.push_str("no: ");
            text.push_str(why.name());
        }
    });
}

/// `ebb audit`: one line, and one for each workload that was wrong.
pub fn audit(found: &AuditView) -> String {
    let a = &found.audit;
    let mut out = format!(
        "{} flows of {} workloads compared, {} flows of drift\n",
        a.flows, a.workloads, a.drift
    );
    for d in &a.drifted {
        let _ = writeln!(
            out,
            "corrected: cgroup {}, network namespace {}: {:+} inbound",
            d.cgroup.0, d.netns.0, d.inbound
        );
    }
    let rest = [
        (u64::from(a.moving), "workloads never stood still"),
        (a.uncounted, "flows can't be counted"),
        (u64::from(a.unseen), "network namespaces can't be seen"),
    ];
    for (n, what) in rest.iter().filter(|(n, _)| *n > 0) {
        let _ = writeln!(out, "{n} {what}");
    }
    out
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
        t.row(drain_row(r).each_ref().map(|cell| cell as _));
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
        t.row([&"wide cell", &7, &""]);
        assert_eq!(t.render(), "A          LONG  Z\nwide cell     7\n");
    }

    #[test]
    fn unknown_is_a_question_mark_and_never_a_zero() {
        let list = PodList {
            schema: super::super::view::SCHEMA.into(),
            pods: vec![PodView {
                pod: crate::ids::PodName {
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
