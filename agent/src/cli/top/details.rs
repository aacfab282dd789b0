//! The pages of text: one connection, and the report of a drain. Pure.

use ebb_core::{
    drain_report::{Phase, Report},
    flow::{Direction, Exempt, FlowCounts, FlowState},
    format::{bytes, duration},
    ids::PodName,
};
use ebb_protocol::{
    table::{age, by_state, holds, notes, number},
    views::FlowView,
};

use super::{
    cells::{Cell, Tone},
    rows::FlowId,
};
use crate::cli::explain::released;

/// A line of text in pieces.
pub(super) type TextLine = Vec<Cell>;

/// Where the values of fields begin.
const VALUES: usize = 22;

/// `name   value`.
fn field(name: &str, value: impl Into<String>) -> TextLine {
    vec![
        Cell::new(format!("{name:<VALUES$}"), Tone::Faint),
        Cell::plain(value),
    ]
}

/// The lines, with those that are wider than `width` continued below, at the column of the last cell.
pub(super) fn wrapped(lines: Vec<TextLine>, width: usize) -> Vec<TextLine> {
    let mut all = vec![];
    for mut line in lines {
        let last = line.pop().unwrap_or_else(|| Cell::plain(""));
        let indent = line.iter().map(|c| c.text.chars().count()).sum::<usize>();
        let mut rest = last.text.as_str();
        loop {
            let part = part_of(rest, width.saturating_sub(indent));
            line.push(Cell::new(&rest[..part], last.tone));
            all.push(line);
            rest = rest[part..].trim_start();
            if rest.is_empty() {
                break;
            }
            line = vec![Cell::plain(" ".repeat(indent))];
        }
    }
    all
}

/// How many bytes of the text fit in `width` characters, to the end of a word if one fits.
fn part_of(text: &str, width: usize) -> usize {
    let Some((end, next)) = text.char_indices().nth(width.max(1)) else {
        return text.len();
    };
    let space = text[..end + next.len_utf8()].rfind(' ');
    space.filter(|at| *at > 0).unwrap_or(end)
}

fn heading(text: &str) -> TextLine {
    vec![Cell::new(text, Tone::Strong)]
}

/// All about one connection. `flow` is absent if it has ended.
pub(super) fn flow(pod: &PodName, id: &FlowId, flow: Option<&FlowView>) -> Vec<TextLine> {
    let Some(flow) = flow else {
        let ended = format!("The connection with {} has ended.", id.remote());
        return vec![
            field("pod", pod.to_string()),
            vec![],
            vec![Cell::plain(ended)],
        ];
    };
    let opened_by = match flow.direction {
        Direction::Inbound => "the peer (inbound)",
        Direction::Outbound => "the pod (outbound)",
    };
    let state = format!("{}: {}", flow.state, meaning(flow.state));
    let why = flow.exempt.map_or("", exemption);
    let peer = match &flow.peer {
        Some(name) => format!("{} ({name})", flow.remote),
        None => flow.remote.to_string(),
    };
    vec![
        field("pod", pod.to_string()),
        field("container", flow.container.as_deref().unwrap_or("unknown")),
        field("opened by", opened_by),
        field("peer", peer),
        field("the pod's end", flow.local.to_string()),
        field("state", state),
        field("age", age(flow.age_ms, flow.age_at_least_ms)),
        field("since the last byte", duration(flow.quiet_ms)),
        field("bytes from the peer", bytes(flow.bytes_in)),
        field("bytes to the peer", bytes(flow.bytes_out)),
        field("holds a drain", format!("{}{why}", holds(flow))),
        vec![],
        vec![Cell::new("Enter: the last drain of the pod", Tone::Faint)],
    ]
}

const fn meaning(state: FlowState) -> &'static str {
    match state {
        FlowState::Backlog => "the application has not accepted it yet",
        FlowState::Active => "bytes move or wait in a queue",
        FlowState::Awaiting => "the peer sent last, the pod has not answered",
        FlowState::Idle => "the pod sent last, and no byte has moved for a while",
        FlowState::Flushing => "the pod closed it, the peer has not acknowledged all",
        FlowState::HalfClosed => "the peer closed its side, the pod has not",
        FlowState::Lost => "the peer does not answer any more",
    }
}

const fn exemption(why: Exempt) -> &'static str {
    match why {
        Exempt::Outbound => " (the pod dialled it)",
        Exempt::InPod => " (both ends are in the pod)",
        Exempt::Probe => " (the kubelet dialled it)",
        Exempt::IgnoredPort => " (the policy excludes its port)",
        Exempt::WaitPort => " (to ebb's own listener in the pod)",
    }
}

/// The report of a drain. `report` is absent if the pod has none.
pub(super) fn report(pod: &PodName, report: Option<&Report>) -> Vec<TextLine> {
    let Some(r) = report else {
        return vec![
            field("pod", pod.to_string()),
            vec![],
            vec![Cell::plain("No drain of it is known.")],
        ];
    };
    let counts = |f: Option<FlowCounts>| f.map_or_else(|| "?".into(), |f| by_state(&f));
    let cut = Cell::new(
        number(r.cut_total),
        match r.cut_total {
            Some(1..) => Tone::Bad,
            _ => Tone::Plain,
        },
    );
    let mut lines = vec![
        field("pod", format!("{} ({})", r.pod, r.pod.uid)),
        field("began at", r.started_at.clone()),
        field("now", progress(r)),
        field("until", r.until.to_string()),
        field(
            if r.observed {
                "would have held"
            } else {
                "held"
            },
            held(r),
        ),
        field("calls that wait", r.holds.to_string()),
    ];
    lines.extend(r.settle.map(|settle| field("settling", settle.to_string())));
    lines.extend([
        field("open at the start", counts(r.flows_at_start)),
        field("open now", counts(r.flows_now)),
        field("opened meanwhile", number(r.arrived)),
        field("ended by themselves", number(r.ended)),
    ]);
    if r.reason.is_some() {
        lines.push(vec![
            Cell::new(format!("{:<VALUES$}", "cut"), Tone::Faint),
            cut,
        ]);
    }
    let lag = r.release_lag_us.map(|us| format!("{us} µs"));
    lines.extend(lag.map(|lag| field("last close to release", lag)));
    let notes = notes(r);
    if !notes.is_empty() {
        lines.extend([vec![], heading("Details")]);
        lines.extend(notes.into_iter().map(|note| vec![Cell::plain(note)]));
    }
    if !r.changes.is_empty() {
        lines.extend([vec![], heading("      AT  PHASE     OPEN")]);
    }
    lines.extend(r.changes.iter().map(|change| {
        let (at, open) = (duration(change.at_ms), by_state(&change.flows));
        vec![Cell::plain(format!(
            "{at:>8}  {:<8}  {open}",
            phase(change.phase)
        ))]
    }));
    lines
}

fn progress(r: &Report) -> String {
    r.reason.map_or_else(
        || state(r).to_owned(),
        |reason| match r.observed {
            true => format!("observed ({reason}): ebb held nothing"),
            false => format!("released ({reason}): {}", released(reason.name())),
        },
    )
}

/// What a drain under way is doing, as a word.
pub(super) const fn state(r: &Report) -> &'static str {
    match r.observed {
        true => "observed",
        false => phase(r.phase),
    }
}

/// `8.2s of 25.0s, …`.
fn held(r: &Report) -> String {
    let (held, deadline) = (duration(r.held_ms), duration(r.deadline_ms));
    format!("{held} of {deadline}, {}", r.deadline_cause.phrase())
}

/// The phase as a word.
const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Settle => "settling",
        Phase::Drain => "draining",
        Phase::Released => "released",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::drain_report::{CutFlow, FlowsChange, ReleaseReason, testing};

    fn text(lines: &[TextLine]) -> String {
        let line = |line: &TextLine| line.iter().map(|c| c.text.as_str()).collect::<String>();
        lines.iter().map(|l| line(l) + "\n").collect()
    }

    #[test]
    fn long_values_continue_below_their_beginning() {
        let lines = vec![field("why", "one two three"), vec![], heading("abcdef")];
        let folded = wrapped(lines.clone(), VALUES + 8);
        let blank = " ".repeat(VALUES);
        assert_eq!(
            text(&folded),
            format!("{:<VALUES$}one two\n{blank}three\n\nabcdef\n", "why")
        );
        // Narrower than the names of fields.
        let folded = text(&wrapped(lines.clone(), 3));
        assert!(folded.ends_with("\n\nabc\ndef\n"), "{folded}");
        assert_eq!(wrapped(lines.clone(), 100), lines_with_cells(lines));
    }

    /// Wrapping gives an empty line a cell.
    fn lines_with_cells(mut lines: Vec<TextLine>) -> Vec<TextLine> {
        for line in lines.iter_mut().filter(|line| line.is_empty()) {
            line.push(Cell::plain(""));
        }
        lines
    }

    #[test]
    fn a_report_has_what_was_cut_and_how_the_connections_ended() {
        let flows = FlowCounts {
            active: 2,
            ..FlowCounts::default()
        };
        let r = Report {
            cut: vec![CutFlow {
                remote: "10.0.0.9:4000".parse().unwrap(),
                peer: None,
                local: "10.0.0.2:80".parse().unwrap(),
                state: FlowState::Active,
                age_ms: Some(61_000),
                age_at_least_ms: None,
                bytes_in: 10,
                bytes_out: 2048,
            }],
            cut_total: Some(1),
            changes: vec![FlowsChange {
                at_ms: 1500,
                phase: Phase::Drain,
                flows,
            }],
            ..testing::report(Some(ReleaseReason::Deadline))
        };
        let text = text(&report(&r.pod, Some(&r)));
        for part in [
            "pod                   shop/web (u1)\n",
            "now                   released (deadline): its deadline had come\n",
            "held                  8.2s of 25.0s, its grace period minus the reserve\n",
            "cut                   1\n",
            "10.0.0.9:4000 active after 1m01s",
            "    1.5s  draining  2 active\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let under_way = testing::report(None);
        let lines = report(&under_way.pod, Some(&under_way));
        assert!(!super::tests::text(&lines).contains("\ncut "));
    }
}
