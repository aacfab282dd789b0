//! The cells of each list, and how wide its columns are. Pure.

use std::iter;

use ebb_core::{
    drain_report::Report,
    flow::{Direction, FlowCounts, FlowState},
    format::{bytes, duration},
};
use ebb_protocol::{
    table::{age, by_state, holds, number, oldest, per_second},
    views::FlowView,
};

use super::{
    details::state,
    rows::{PodRow, left_ms},
};

/// What a cell says by its colour, or without colours by its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    /// A name or a heading.
    Strong,
    /// Nothing to see, or unknown.
    Faint,
    /// It is in the middle of something.
    Live,
    /// A drain is under way.
    Draining,
    /// Connections were cut, or something does not work.
    Bad,
}

/// A text with its tone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) text: String,
    pub(super) tone: Tone,
}

impl Cell {
    pub(super) fn new(text: impl Into<String>, tone: Tone) -> Self {
        Self {
            text: text.into(),
            tone,
        }
    }

    pub(super) fn plain(text: impl Into<String>) -> Self {
        Self::new(text, Tone::Plain)
    }

    /// A number, faint if it is zero or not known.
    fn count(text: String, tone: Tone) -> Self {
        let nothing = matches!(text.as_str(), "0" | "?" | "-");
        Self::new(text, if nothing { Tone::Faint } else { tone })
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// What a column does where its cells do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// A number or a word that is always shown whole, to the right.
    Number,
    /// The same to the left.
    Word,
    /// A name, which loses its middle.
    Name,
    /// The rest of the line, or less.
    Rest,
}

/// A column of a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) title: &'static str,
    pub(super) fit: Fit,
    /// The least width, so that columns do not move with each row that scrolls by.
    least: usize,
}

const fn column(title: &'static str, fit: Fit, least: usize) -> Column {
    Column { title, fit, least }
}

pub(super) const POD_COLUMNS: [Column; 10] = [
    column("NAMESPACE", Fit::Name, 9),
    column("NAME", Fit::Name, 4),
    column("LIVE", Fit::Number, 5),
    column("IDLE", Fit::Number, 5),
    column("NEW/S", Fit::Number, 5),
    column("PEERS", Fit::Number, 5),
    column("OLDEST", Fit::Number, 7),
    column("DRAIN", Fit::Word, 8),
    column("LEFT", Fit::Number, 6),
    column("FLOWS", Fit::Rest, 0),
];

pub(super) fn pod(row: &PodRow<'_>) -> [Cell; 10] {
    let pod = row.pod;
    let (drain, left) = match row.drain {
        None => (Cell::new("-", Tone::Faint), Cell::new("-", Tone::Faint)),
        Some(drain) => (Cell::new(state(drain), Tone::Draining), left(drain)),
    };
    let flows = match (&pod.flows, &pod.untracked) {
        (Some(flows), _) => Cell::count(by_state(flows), Tone::Plain),
        (None, Some(why)) => Cell::new(format!("untracked: {why}"), Tone::Faint),
        (None, None) => Cell::new("untracked", Tone::Faint),
    };
    [
        Cell::plain(&pod.pod.namespace),
        Cell::new(&pod.pod.name, Tone::Strong),
        Cell::count(number(pod.flows.map(|f| f.live())), Tone::Live),
        Cell::count(number(pod.flows.map(|f| f.idle)), Tone::Plain),
        Cell::count(per_second(pod.new_per_second), Tone::Plain),
        Cell::count(number(pod.peers), Tone::Plain),
        Cell::count(oldest(pod), Tone::Plain),
        drain,
        left,
        flows,
    ]
}

pub(super) const DRAIN_COLUMNS: [Column; 10] = [
    column("NAMESPACE", Fit::Name, 9),
    column("NAME", Fit::Name, 4),
    column("WHY", Fit::Word, 8),
    column("UNTIL", Fit::Word, 5),
    column("HELD", Fit::Number, 6),
    column("LEFT", Fit::Number, 6),
    column("START", Fit::Number, 5),
    column("NOW", Fit::Number, 5),
    column("CUT", Fit::Number, 4),
    column("OPEN NOW", Fit::Rest, 0),
];

/// The time left until the deadline. None if ebb holds nothing.
fn left(r: &Report) -> Cell {
    match r.reason.is_some() || r.observed {
        true => Cell::new("-", Tone::Faint),
        false => Cell::new(duration(left_ms(r)), Tone::Draining),
    }
}

pub(super) fn drain(r: &Report) -> [Cell; 10] {
    let total = |flows: Option<FlowCounts>| number(flows.map(|f| f.total()));
    let why = match r.reason {
        None => Cell::new(state(r), Tone::Draining),
        Some(reason) if r.observed => Cell::plain(format!("observed: {reason}")),
        Some(reason) => Cell::plain(reason.name()),
    };
    let cut = match r.reason {
        None => "-".into(),
        Some(_) => number(r.cut_total),
    };
    let open = r.flows_now.map_or_else(|| "?".into(), |f| by_state(&f));
    [
        Cell::plain(&r.pod.namespace),
        Cell::new(&r.pod.name, Tone::Strong),
        why,
        Cell::plain(r.until.to_string()),
        Cell::plain(duration(r.held_ms)),
        left(r),
        Cell::count(total(r.flows_at_start), Tone::Plain),
        Cell::count(total(r.flows_now), Tone::Live),
        Cell::count(cut, Tone::Bad),
        Cell::count(open, Tone::Plain),
    ]
}

pub(super) const FLOW_COLUMNS: [Column; 10] = [
    column("STATE", Fit::Word, 8),
    column("PEER", Fit::Name, 9),
    column("PEER NAME", Fit::Name, 9),
    column("PORT", Fit::Number, 5),
    column("AGE", Fit::Number, 6),
    column("QUIET", Fit::Number, 6),
    column("IN", Fit::Number, 4),
    column("OUT", Fit::Number, 4),
    column("HOLDS", Fit::Word, 5),
    column("CONTAINER", Fit::Rest, 0),
];

pub(super) fn flow(flow: &FlowView) -> [Cell; 10] {
    let state = match flow.state {
        FlowState::Idle | FlowState::Lost => Tone::Plain,
        _ => Tone::Live,
    };
    let held = if flow.holds { Tone::Plain } else { Tone::Faint };
    let dialled = match flow.direction {
        Direction::Inbound => "",
        Direction::Outbound => "→ ",
    };
    [
        Cell::new(flow.state.name(), state),
        Cell::new(format!("{dialled}{}", flow.remote), Tone::Strong),
        Cell::count(flow.peer.as_deref().unwrap_or("-").into(), Tone::Plain),
        Cell::plain(flow.local.port().to_string()),
        Cell::plain(age(flow.age_ms, flow.age_at_least_ms)),
        Cell::plain(duration(flow.quiet_ms)),
        Cell::count(bytes(flow.bytes_in), Tone::Plain),
        Cell::count(bytes(flow.bytes_out), Tone::Plain),
        Cell::new(holds(flow), held),
        Cell::plain(flow.container.as_deref().unwrap_or("-")),
    ]
}

/// The space between columns.
pub(super) const fn gap(total: usize) -> usize {
    if total < 120 { 1 } else { 2 }
}

/// The width of each column, so that all fit in `total`. Where they don't, the longest names lose most.
pub(super) fn widths<const N: usize>(
    columns: &[Column; N],
    rows: &[[Cell; N]],
    total: usize,
) -> [usize; N] {
    let mut widths = [0; N];
    for (i, column) in columns.iter().enumerate() {
        let cells = rows.iter().map(|row| row[i].width());
        let widest = cells.chain(iter::once(column.title.len())).max();
        widths[i] = widest.unwrap_or_default().max(column.least);
    }
    let is = |i: usize, fit| columns[i].fit == fit;
    let used = |widths: &[usize; N], with_rest: bool| -> usize {
        let shown = (0..N).filter(|i| with_rest || !is(*i, Fit::Rest));
        shown.map(|i| widths[i] + gap(total)).sum::<usize>() - gap(total)
    };
    while used(&widths, false) > total {
        let names = (0..N).filter(|i| is(*i, Fit::Name) && widths[*i] > columns[*i].least);
        let Some(longest) = names.max_by_key(|i| widths[*i]) else {
            break;
        };
        widths[longest] -= 1;
    }
    let left = total.saturating_sub(used(&widths, false) + gap(total));
    for i in (0..N).filter(|i| is(*i, Fit::Rest)) {
        // Less than the title tells nothing.
        widths[i] = if left < columns[i].title.len() {
            0
        } else {
            widths[i].min(left)
        };
    }
    widths
}

/// The text with an ellipsis for its middle where it is wider than `width`.
pub(super) fn elided(text: &str, width: usize) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= width {
        return text.to_owned();
    }
    let Some(kept) = width.checked_sub(1) else {
        return String::new();
    };
    // The end tells pods of a Deployment, and ports, apart.
    let end = kept.div_ceil(2);
    let start = chars[..kept - end].iter();
    let end = chars[chars.len() - end..].iter();
    start.chain(iter::once(&'…')).chain(end).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_is_too_wide_loses_its_middle() {
        assert_eq!(elided("web-7f9c5d-abcde", 16), "web-7f9c5d-abcde");
        assert_eq!(elided("web-7f9c5d-abcde", 9), "web-…bcde");
        assert_eq!(elided("web", 1), "…");
        assert_eq!(elided("web", 0), "");
    }

    #[test]
    fn an_observed_drain_is_called_so_and_has_no_time_left() {
        use ebb_core::drain_report::{ReleaseReason, testing};
        let cells = |reason, observed| {
            let [_, _, why, _, _, left, ..] = drain(&Report {
                observed,
                ..testing::report(reason)
            });
            (why.text, left.text)
        };
        let texts = |why: &str, left: &str| (why.to_owned(), left.to_owned());
        assert_eq!(cells(None, true), texts("observed", "-"));
        assert_ne!(cells(None, false).1, "-");
        let exited = Some(ReleaseReason::Exited);
        assert_eq!(cells(exited, true), texts("observed: exited", "-"));
    }

    #[test]
    fn the_longest_names_are_shortened_until_the_numbers_fit() {
        let columns = [
            column("NAMESPACE", Fit::Name, 9),
            column("NAME", Fit::Name, 4),
            column("LIVE", Fit::Number, 5),
            column("FLOWS", Fit::Rest, 0),
        ];
        let row = ["kube-system", &"n".repeat(60), "40000", "40000 active"].map(Cell::plain);
        let rows = [row];
        assert_eq!(widths(&columns, &rows, 200), [11, 60, 5, 12]);
        // The rest gets what is left, or nothing.
        assert_eq!(widths(&columns, &rows, 92), [11, 60, 5, 12]);
        assert_eq!(widths(&columns, &rows, 88), [11, 60, 5, 9]);
        assert_eq!(widths(&columns, &rows, 80), [11, 60, 5, 0]);
        assert_eq!(widths(&columns, &rows, 40), [11, 22, 5, 0]);
        assert_eq!(widths(&columns, &rows, 10), [9, 4, 5, 0]);
    }
}
