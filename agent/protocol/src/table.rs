//! Aligned text tables.

use std::fmt::{Display, Write as _};

use ebb_core::{
    advice::Spread,
    drain_report::{Phase, Report},
    flow::{Direction, FlowCounts, FlowState},
    format::{bytes, duration, push_address, push_bytes, push_duration},
};

use serde::{Deserialize, Serialize};

use crate::views::{
    AdviceList, DrainList, FlowView, PodList, PodView, UntrackedPod, WorkloadAdvice,
};

/// How much of a table is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableStyle {
    /// Show the columns that need more room, too.
    pub wide: bool,
    /// Leave out the line with the names of the columns.
    pub no_headers: bool,
}

/// A table as text, and what does not fit in its rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenderedTable {
    /// The rows.
    pub table: String,
    /// Details and warnings, one per line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// How a column is aligned.
#[derive(Clone, Copy)]
pub enum Align {
    /// To the left.
    Left,
    /// To the right, for numbers.
    Right,
}
pub use Align::{Left, Right};

/// A table under construction. Because tables may have 100,000 rows, one string holds all cells, one after the other.
pub struct Table<const N: usize> {
    columns: [(&'static str, Align); N],
    text: String,
    /// Of each cell: its length in `text`, in bytes, and its width, in characters.
    cells: Vec<(u32, u32)>,
    /// The widest cell of each column.
    widths: [usize; N],
}

impl<const N: usize> Table<N> {
    /// A table with these columns and no rows.
    pub fn new(columns: [(&'static str, Align); N]) -> Self {
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

    /// Appends a row.
    pub fn row(&mut self, cells: [&dyn Display; N]) {
        for cell in cells {
            self.cell(|text| {
                // Writing to a string does not fail.
                let _ = write!(text, "{cell}");
            });
        }
    }

    /// Appends the next cell: the text that `write` appends.
    fn cell(&mut self, write: impl FnOnce(&mut String)) {
        let start = self.text.len();
        write(&mut self.text);
        let cell = &self.text[start..];
        let width = cell.chars().count();
        let widest = &mut self.widths[self.cells.len() % N];
        *widest = (*widest).max(width);
        // A cell is always shorter than 4 GiB.
        self.cells.push((cell.len() as u32, width as u32));
    }

    /// The table as text: a line with the column names, and one line per row.
    pub fn render(&self) -> String {
        self.render_columns(N, false)
    }

    /// All columns in a wide table, else the first `shown`.
    fn render_styled(&self, shown: usize, style: TableStyle) -> String {
        let shown = if style.wide { N } else { shown };
        self.render_columns(shown, style.no_headers)
    }

    /// The first `shown` columns, with or without the line with their names.
    fn render_columns(&self, shown: usize, no_headers: bool) -> String {
        let line = self.widths.iter().sum::<usize>() + 2 * N + 1;
        let mut out = String::with_capacity(line * (self.cells.len() / N));
        let mut rest = self.text.as_str();
        for row in self.cells.chunks(N) {
            let cells = row.iter().zip(&self.columns).zip(self.widths);
            for (place, (((length, width), (_, align)), widest)) in cells.enumerate() {
                let (cell, later) = rest.split_at(*length as usize);
                rest = later;
                if place >= shown {
                    continue;
                }
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
        if no_headers {
            let header = out.find('\n').map_or(0, |end| end + 1);
            out.drain(..header);
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

/// How many columns, from the left, `ebb pods`, `ebb flows`, `ebb drains` and `ebb advise` show without `-o wide`.
const POD_COLUMNS: usize = 9;
const FLOW_COLUMNS: usize = 12;
const DRAIN_COLUMNS: usize = 9;
const ADVICE_COLUMNS: usize = 10;

/// `ebb pods`.
pub fn pods(list: &PodList, style: TableStyle) -> RenderedTable {
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("NAME", Left),
        ("NETWORK", Left),
        ("LIVE", Right),
        ("IDLE", Right),
        ("NEW/S", Right),
        ("PEERS", Right),
        ("OLDEST", Right),
        ("FLOWS", Left),
        ("EXEMPT", Right),
        ("IPS", Left),
        ("UID", Left),
    ]);
    for p in &list.pods {
        t.row(pod_row(p).each_ref().map(|cell| cell as _));
    }
    let warnings = |p: &PodView| {
        let pod = p.pod.to_string();
        let lines = p.warnings.iter().map(move |w| format!("{pod}: {w}"));
        lines.collect::<Vec<_>>()
    };
    RenderedTable {
        table: t.render_styled(POD_COLUMNS, style),
        notes: list.pods.iter().flat_map(warnings).collect(),
    }
}

/// The number, or `?` if it is not known.
pub fn number(n: Option<u32>) -> String {
    n.map_or_else(|| "?".into(), |n| n.to_string())
}

/// `1200`, `17`, `0.4`; `-` for zero, or `?` if it is not known.
pub fn per_second(rate: Option<f64>) -> String {
    match rate {
        None => "?".into(),
        Some(0.0) => "-".into(),
        Some(rate) if rate < 9.95 => format!("{rate:.1}"),
        Some(rate) => format!("{rate:.0}"),
    }
}

fn pod_row(p: &PodView) -> [String; 12] {
    let ips: Vec<_> = p.ips.iter().map(ToString::to_string).collect();
    [
        p.pod.namespace.clone(),
        p.pod.name.clone(),
        p.network.name().into(),
        number(p.flows.map(|f| f.live())),
        number(p.flows.map(|f| f.idle)),
        per_second(p.new_per_second),
        number(p.peers),
        oldest(p),
        match (&p.flows, &p.untracked) {
            (Some(f), _) => by_state(f),
            (None, Some(why)) => format!("untracked: {why}"),
            (None, None) => "untracked".into(),
        },
        number(p.exempt),
        ips.join(","),
        p.pod.uid.to_string(),
    ]
}

/// `1m31s`; `>1m31s` for a lower bound; `?` if nothing is known.
pub fn age(known_ms: Option<u64>, at_least_ms: Option<u64>) -> String {
    let mut text = String::new();
    push_age(&mut text, known_ms, at_least_ms);
    text
}

fn push_age(text: &mut String, known_ms: Option<u64>, at_least_ms: Option<u64>) {
    match (known_ms, at_least_ms) {
        (Some(age), _) => push_duration(text, age),
        (None, Some(age)) => {
            text.push('>');
            push_duration(text, age);
        }
        (None, None) => text.push('?'),
    }
}

/// The age of the pod's oldest flow; `-` if there is none, `?` if ebb cannot see its flows.
pub fn oldest(p: &PodView) -> String {
    match p.oldest_ms {
        Some(_) if p.oldest_is_at_least => age(None, p.oldest_ms),
        Some(_) => age(p.oldest_ms, None),
        None if p.flows.is_none() => "?".into(),
        None => "-".into(),
    }
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
pub fn flows(
    flows: impl Iterator<Item = FlowView>,
    untracked: &[UntrackedPod],
    style: TableStyle,
) -> RenderedTable {
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("NAME", Left),
        ("DIR", Left),
        ("STATE", Left),
        ("PEER", Left),
        ("LOCAL", Left),
        ("AGE", Right),
        ("QUIET", Right),
        ("IN", Right),
        ("OUT", Right),
        ("HOLDS", Left),
        ("PEER NAME", Left),
        ("CONTAINER", Left),
    ]);
    for f in flows {
        flow_row(&mut t, &f);
    }
    RenderedTable {
        table: t.render_styled(FLOW_COLUMNS, style),
        notes: untracked.iter().map(untracked_note).collect(),
    }
}

/// That ebb cannot see the flows of the pod, and why.
pub fn untracked_note(u: &UntrackedPod) -> String {
    format!("{}: its flows can't be seen: {}", u.pod, u.why)
}

fn flow_row(t: &mut Table<13>, f: &FlowView) {
    t.cell(|text| text.push_str(&f.pod.namespace));
    t.cell(|text| text.push_str(&f.pod.name));
    t.cell(|text| {
        text.push_str(match f.direction {
            Direction::Inbound => "in",
            Direction::Outbound => "out",
        });
    });
    t.cell(|text| text.push_str(f.state.name()));
    t.cell(|text| push_address(text, f.remote));
    t.cell(|text| push_address(text, f.local));
    t.cell(|text| push_age(text, f.age_ms, f.age_at_least_ms));
    t.cell(|text| push_duration(text, f.quiet_ms));
    t.cell(|text| push_bytes(text, f.bytes_in));
    t.cell(|text| push_bytes(text, f.bytes_out));
    t.cell(|text| push_holds(text, f));
    t.cell(|text| text.push_str(f.peer.as_deref().unwrap_or("-")));
    t.cell(|text| text.push_str(f.container.as_deref().unwrap_or("-")));
}

/// Whether a drain waits for the flow: `yes`, or `no: in-pod`.
pub fn holds(f: &FlowView) -> String {
    let mut text = String::new();
    push_holds(&mut text, f);
    text
}

fn push_holds(text: &mut String, f: &FlowView) {
    match f.exempt {
        None if f.holds => text.push_str("yes"),
        None => {
            text.push_str("no: ");
            text.push_str(f.state.name());
        }
        Some(why) => {
            text.push_str("no: ");
            text.push_str(why.name());
        }
    }
}

/// `ebb drains`.
pub fn drains(list: &DrainList, style: TableStyle) -> RenderedTable {
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("NAME", Left),
        ("UNTIL", Left),
        ("HELD", Right),
        ("LEFT", Right),
        ("OPEN AT START", Left),
        ("OPEN NOW", Left),
        ("CUT", Right),
        ("WHY", Left),
        ("STARTED", Left),
        ("CALLS", Right),
        ("ARRIVED", Right),
        ("ENDED", Right),
        ("LAG", Right),
        ("UID", Left),
    ]);
    for r in &list.drains {
        t.row(drain_row(r).each_ref().map(|cell| cell as _));
    }
    let named = |r: &Report| {
        let pod = r.pod.to_string();
        let lines = notes(r).into_iter();
        lines.map(move |line| format!("{pod}: {line}"))
    };
    RenderedTable {
        table: t.render_styled(DRAIN_COLUMNS, style),
        notes: list.drains.iter().flat_map(named).collect(),
    }
}

fn drain_row(r: &Report) -> [String; 15] {
    let flows = |f: Option<FlowCounts>| f.map_or_else(|| "?".into(), |f| by_state(&f));
    let is_over = r.reason.is_some();
    [
        r.pod.namespace.clone(),
        r.pod.name.clone(),
        r.until.to_string(),
        duration(r.held_ms),
        match is_over {
            true => "-".into(),
            false => duration(r.deadline_ms.saturating_sub(r.held_ms)),
        },
        flows(r.flows_at_start),
        flows(r.flows_now),
        match is_over {
            true => number(r.cut_total),
            false => "-".into(),
        },
        match (r.phase, r.reason) {
            (_, Some(reason)) if r.observed => format!("observed: {reason}"),
            (_, None) if r.observed => "observed".into(),
            (_, Some(reason)) => reason.name().into(),
            (Phase::Settle, None) => "settling".into(),
            (Phase::Drain | Phase::Released, None) => "draining".into(),
        },
        r.started_at.clone(),
        r.holds.to_string(),
        number(r.arrived),
        number(r.ended),
        r.release_lag_us
            .map_or_else(|| "-".into(), |us| format!("{us}µs")),
        r.pod.uid.to_string(),
    ]
}

/// `ebb advise`.
pub fn advice(list: &AdviceList, style: TableStyle) -> RenderedTable {
    let mut t = Table::new([
        ("NAMESPACE", Left),
        ("WORKLOAD", Left),
        ("DRAINS", Right),
        ("SETTLE", Right),
        ("DRAIN", Right),
        ("CUT", Right),
        ("LASTS", Right),
        ("GRACE", Right),
        ("ENOUGH", Right),
        ("ADVICE", Left),
        ("OBSERVED", Right),
        ("CUT SHORT", Right),
    ]);
    for w in &list.workloads {
        t.row(advice_row(w).each_ref().map(|cell| cell as _));
    }
    let notes = list.workloads.iter().flat_map(|w| {
        let all = w.advice.recommendations.iter();
        all.map(move |r| format!("{w}: set {}, because {}", r.set, r.why))
    });
    let nothing = "ebb knows of no drain yet: there is nothing to advise";
    RenderedTable {
        table: t.render_styled(ADVICE_COLUMNS, style),
        notes: match list.workloads.is_empty() {
            true => vec![nothing.into()],
            false => notes.collect(),
        },
    }
}

fn advice_row(w: &WorkloadAdvice) -> [String; 12] {
    let a = &w.advice;
    let ms = |ms: Option<u64>| ms.map_or_else(|| "?".into(), duration);
    let spread = |s: Option<Spread>| {
        s.map_or_else(
            || "?".into(),
            |s| format!("{} / {}", duration(s.p50_ms), duration(s.p99_ms)),
        )
    };
    let lasts = |ms: Option<u64>| ms.map_or_else(|| ">1d".into(), duration);
    let sets: Vec<_> = a.recommendations.iter().map(|r| r.set.as_str()).collect();
    [
        w.namespace.clone(),
        w.workload.clone(),
        a.drains.to_string(),
        spread(a.settle),
        spread(a.drain),
        a.cut.to_string(),
        a.lifetimes.map_or_else(
            || "?".into(),
            |l| format!("{} / {}", lasts(l.p50_ms), lasts(l.p99_ms)),
        ),
        ms(a.grace_ms),
        ms(a.enough_grace_ms),
        match (sets.is_empty(), a.enough_grace_ms) {
            (false, _) => sets.join("; "),
            (true, Some(_)) => "nothing to change".into(),
            (true, None) => a.basis.clone(),
        },
        a.observed.to_string(),
        a.cut_short.to_string(),
    ]
}

/// What does not fit in a row: cut flows, peers that still connected, details and warnings.
pub fn notes(r: &Report) -> Vec<String> {
    let cut = r.cut.iter().map(|c| {
        format!(
            "cut {} {} after {} ({} in, {} out)",
            c.peer_text(),
            c.state,
            age(c.age_ms, c.age_at_least_ms),
            bytes(c.bytes_in),
            bytes(c.bytes_out)
        )
    });
    let late = r.late_peers.iter().map(|p| match p.flows {
        1 => format!("{} still connected once", p.peer_text()),
        n => format!("{} still connected, {n} times", p.peer_text()),
    });
    let said = r.detail.iter().chain(&r.warnings).cloned();
    let notified = r.notified.phrases().into_iter();
    cut.chain(late).chain(notified).chain(said).collect()
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
    fn drains_have_plain_headings_and_details_are_notes() {
        use ebb_core::drain_report::{CutFlow, ReleaseReason, testing::report};
        let mut over = report(Some(ReleaseReason::Deadline));
        over.cut = vec![CutFlow {
            remote: "10.0.0.7:5000".parse().unwrap(),
            peer: Some("shop/client-0".into()),
            local: "10.0.0.1:80".parse().unwrap(),
            state: FlowState::Active,
            age_ms: None,
            age_at_least_ms: Some(9_000),
            bytes_in: 1,
            bytes_out: 2,
        }];
        over.cut_total = Some(1);
        let list = DrainList {
            schema: crate::views::SCHEMA.into(),
            version: 1,
            drains: vec![report(None), over],
        };
        let rendered = drains(&list, TableStyle::default());
        let lines: Vec<_> = rendered.table.lines().collect();
        let heading = lines[0]
            .split("  ")
            .map(str::trim)
            .filter(|w| !w.is_empty());
        assert_eq!(
            heading.collect::<Vec<_>>(),
            [
                "NAMESPACE",
                "NAME",
                "UNTIL",
                "HELD",
                "LEFT",
                "OPEN AT START",
                "OPEN NOW",
                "CUT",
                "WHY"
            ]
        );
        assert!(lines[1].contains(" 16.8s "), "8.2 s of 25 s: {}", lines[1]);
        assert!(lines[2].ends_with("deadline"), "{}", lines[2]);
        assert_eq!(lines.len(), 3);
        let cut = "cut 10.0.0.7:5000 (shop/client-0) active after >9.0s (1 in, 2 out)";
        assert!(
            rendered.notes.len() == 1 && rendered.notes[0].ends_with(cut),
            "{:?}",
            rendered.notes
        );
    }

    #[test]
    fn unknown_is_a_question_mark_and_never_a_zero() {
        let list = PodList {
            schema: crate::views::SCHEMA.into(),
            pods: vec![PodView {
                pod: ebb_core::ids::PodName {
                    uid: ebb_core::ids::PodUid::new("u"),
                    namespace: "default".into(),
                    name: "web".into(),
                },
                network: crate::views::Network::Untracked,
                ips: vec![],
                labels: std::collections::BTreeMap::new(),
                containers: vec![],
                flows: None,
                peers: None,
                exempt: None,
                new_per_second: None,
                oldest_ms: None,
                oldest_is_at_least: false,
                untracked: Some("runsc sandbox".into()),
                warnings: vec![],
            }],
        };
        let text = pods(&list, TableStyle::default()).table;
        assert!(text.contains("untracked: runsc sandbox"), "{text}");
        assert!(!text.contains("UID"), "{text}");
        let wide = TableStyle {
            wide: true,
            no_headers: true,
        };
        let row = pods(&list, wide).table;
        assert!(
            row.starts_with("default") && row.trim_end().ends_with(" u"),
            "{row}"
        );
        assert!(!text.lines().nth(1).unwrap().contains('0'), "{text}");
    }
}
