//! `--watch` of the lists: prints the whole list, and then each row and note that is new or has changed.

use std::{collections::HashMap, io, mem, thread, time::Duration};

use anyhow::Result;
use clap::Args;
use ebb_core::format::{duration_within as within, one_line};
use ebb_protocol::{
    client::AgentError,
    service::stop_on_signal,
    table::{RenderedTable, TableStyle},
    views::{DrainList, FlowList, PodList},
};
use tokio::time::sleep;

use super::output::{Document, OutputFormat, TableFlags, print_notes, write_out};

/// Flags of the lists that can be watched.
#[derive(Args)]
pub(super) struct WatchFlags {
    /// After the list, print each row and note that is new or has changed, until Ctrl-C. A pod or connection that is gone
    /// gets no row, and a watch of one pod ends with the pod. With -o json, each row is an object.
    #[arg(short, long)]
    pub(super) watch: bool,
    /// With --watch: the time between two lists. Each costs as much as the list: a dump of the node's connections per
    /// pod.
    #[arg(
        long,
        default_value = "2s",
        requires = "watch",
        value_name = "DURATION",
        value_parser = within(Duration::from_millis(500)..=Duration::from_secs(3600))
    )]
    interval: Duration,
    #[command(flatten)]
    stdin: StdinFlag,
}

/// For `kubectl ebb`: without a terminal, a runtime does not end a program whose client is gone, but it closes the
/// program's standard input.
#[derive(Args)]
pub(super) struct StdinFlag {
    /// With --watch: end when standard input ends.
    #[arg(long = UNTIL_STDIN_ENDS, hide = true, requires = "watch")]
    until_stdin_ends: bool,
}

/// The flag of [`StdinFlag`], without its dashes.
pub(super) const UNTIL_STDIN_ENDS: &str = "until-stdin-ends";

/// One row of a list.
pub(super) struct RowState {
    /// What tells it from other rows.
    id: String,
    /// What must differ for the row to be printed again: no times or rates, which always do.
    state: String,
    /// The pod, as `namespace/name`.
    pod: String,
}

/// A list that can be watched. Its text has one line per row, in the order of [`Self::rows`] and [`Document::lines`].
pub(super) trait FollowedList: Document {
    fn rows(&self) -> Vec<RowState>;
}

impl FollowedList for PodList {
    fn rows(&self) -> Vec<RowState> {
        let row = |p: &ebb_protocol::views::PodView| RowState {
            id: p.pod.uid.to_string(),
            state: format!(
                "{:?} {:?} {:?} {:?} {:?} {:?}",
                p.flows, p.peers, p.exempt, p.containers, p.untracked, p.warnings
            ),
            pod: p.pod.to_string(),
        };
        self.pods.iter().map(row).collect()
    }
}

impl FollowedList for FlowList {
    fn rows(&self) -> Vec<RowState> {
        let row = |f: &ebb_protocol::views::FlowView| RowState {
            id: format!("{} {} {}", f.pod.uid, f.local, f.remote),
            state: format!("{:?} {} {:?}", f.state, f.holds, f.exempt),
            pod: f.pod.to_string(),
        };
        self.flows.iter().map(row).collect()
    }
}

impl FollowedList for DrainList {
    fn rows(&self) -> Vec<RowState> {
        let row = |r: &ebb_core::drain_report::Report| RowState {
            id: format!("{} {}", r.pod.uid, r.started_at),
            state: format!(
                "{:?} {:?} {:?} {} {:?} {:?}",
                r.phase, r.reason, r.flows_now, r.holds, r.arrived, r.ended
            ),
            pod: r.pod.to_string(),
        };
        self.drains.iter().map(row).collect()
    }
}

/// What has been printed.
#[derive(Default)]
struct Printed {
    states: HashMap<String, String>,
    /// The notes of the last list, and how many times it had each: two drains of a pod may have the same.
    notes: HashMap<String, u32>,
    is_begun: bool,
}

impl Printed {
    /// The text of the rows that are new or have changed, with the names of the columns the first time, and the notes
    /// that are new.
    fn next(&mut self, list: &impl FollowedList, flags: &TableFlags) -> Result<RenderedTable> {
        let rows = list.rows();
        let is_new = |row: &RowState| self.states.get(&row.id) != Some(&row.state);
        let new: Vec<usize> = (0..rows.len()).filter(|n| is_new(&rows[*n])).collect();
        let format = flags.view.output;
        let objects = match format {
            OutputFormat::Table | OutputFormat::Wide | OutputFormat::Name => vec![],
            OutputFormat::Json | OutputFormat::Yaml | OutputFormat::Jsonl => list.lines()?,
        };
        let mut text = String::new();
        // An object per row has no place for them, as a line per row has none.
        let mut notes = list.left_out();
        match format {
            OutputFormat::Table | OutputFormat::Wide => {
                let style = TableStyle {
                    wide: format == OutputFormat::Wide,
                    no_headers: false,
                };
                let rendered = list.text(style);
                notes = rendered.notes;
                let lines: Vec<&str> = rendered.table.lines().collect();
                let heading = (!self.is_begun && !flags.no_headers).then_some(0);
                for n in heading.into_iter().chain(new.iter().map(|n| n + 1)) {
                    text.extend([lines.get(n).copied().unwrap_or_default(), "\n"]);
                }
            }
            OutputFormat::Name => {
                for n in new {
                    text.extend([rows[n].pod.as_str(), "\n"]);
                }
            }
            OutputFormat::Jsonl => {
                for n in new {
                    text.extend([objects[n].as_str(), "\n"]);
                }
            }
            OutputFormat::Json | OutputFormat::Yaml => {
                for n in new {
                    let object: serde_json::Value = serde_json::from_str(&objects[n])?;
                    text += &match format {
                        OutputFormat::Json => serde_json::to_string_pretty(&object)? + "\n",
                        _ => format!("---\n{}", serde_saphyr::to_string(&object)?),
                    };
                }
            }
        }
        self.is_begun = true;
        self.states = rows.into_iter().map(|row| (row.id, row.state)).collect();
        Ok(RenderedTable {
            table: text,
            notes: self.new_notes(notes),
        })
    }

    /// Those of a list's notes that the last list did not have.
    fn new_notes(&mut self, notes: Vec<String>) -> Vec<String> {
        let mut last = mem::take(&mut self.notes);
        let mut new = Vec::new();
        for note in notes {
            *self.notes.entry(note.clone()).or_default() += 1;
            match last.get_mut(&note) {
                Some(left @ 1..) => *left -= 1,
                _ => new.push(note),
            }
        }
        new
    }
}

/// Prints what `look` returns, and what changes in it, until a signal or until the reader is gone.
///
/// If the agent is away, says so once, and goes on when it is back, as after an upgrade.
pub(super) async fn follow<L: FollowedList>(
    flags: &TableFlags,
    stdin: &StdinFlag,
    mut look: impl AsyncFnMut() -> Result<L, AgentError>,
) -> Result<()> {
    let stop = stop_on_signal()?;
    if stdin.until_stdin_ends {
        let stop = stop.clone();
        // A thread of its own, because a read of standard input can't be cancelled: the process ends without it.
        thread::spawn(move || {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            stop.cancel();
        });
    }
    let mut printed = Printed::default();
    let mut is_away = false;
    loop {
        let list = match stop.run_until_cancelled(look()).await {
            None => return Ok(()),
            Some(Ok(list)) => list,
            // A refusal, or no agent at all.
            Some(Err(e)) if !printed.is_begun || is_refusal(&e) => return Err(e.into()),
            Some(Err(e)) => {
                if !is_away {
                    eprintln!("ebb: {}; trying again", one_line(&e));
                }
                is_away = true;
                if stop.run_until_cancelled(sleep(RETRY)).await.is_none() {
                    return Ok(());
                }
                continue;
            }
        };
        is_away = false;
        let new = printed.next(&list, flags)?;
        if !write_out(&new.table)? {
            return Ok(());
        }
        print_notes(&new.notes);
    }
}

/// How long to wait before asking an agent again that is away.
const RETRY: Duration = Duration::from_secs(1);

fn is_refusal(e: &AgentError) -> bool {
    matches!(
        e,
        AgentError::Problem { .. } | AgentError::UnknownPath { .. } | AgentError::Refused { .. }
    )
}

impl WatchFlags {
    /// Watches a list that the agent makes anew for each look.
    pub(super) async fn follow<L: FollowedList>(
        &self,
        flags: &TableFlags,
        mut look: impl AsyncFnMut() -> Result<L, AgentError>,
    ) -> Result<()> {
        let mut is_first = true;
        follow(flags, &self.stdin, async || {
            if !std::mem::replace(&mut is_first, false) {
                sleep(self.interval).await;
            }
            look().await
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use ebb_core::drain_report::{ReleaseReason, Report, testing::report};
    use ebb_protocol::views::{SCHEMA, UntrackedPod};

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        table: TableFlags,
    }

    fn flags(given: &[&str]) -> TableFlags {
        Flags::parse_from([&["ebb"], given].concat()).table
    }

    fn list(drains: Vec<Report>) -> DrainList {
        DrainList {
            schema: SCHEMA.into(),
            version: 1,
            drains,
        }
    }

    fn held(held_ms: u64, reason: Option<ReleaseReason>) -> Report {
        Report {
            held_ms,
            ..report(reason)
        }
    }

    #[test]
    fn only_rows_that_are_new_or_have_changed_are_printed_again() {
        let mut printed = Printed::default();
        let flags = flags(&[]);
        let mut next = |drains| printed.next(&list(drains), &flags).unwrap().table;
        let first = next(vec![held(1_000, None)]);
        assert_eq!(first.lines().count(), 2, "{first}");
        assert!(first.starts_with("NAMESPACE"), "{first}");
        // Time passes, which is no change.
        assert_eq!(next(vec![held(2_000, None)]), "");
        let mut other = held(1, None);
        other.pod.uid = ebb_core::ids::PodUid::new("u2");
        let row = next(vec![held(3_000, None), other.clone()]);
        assert_eq!(row.lines().count(), 1, "{row}");
        let over = held(4_000, Some(ReleaseReason::Drained));
        let row = next(vec![over, other]);
        assert!(
            row.trim_end().ends_with("drained") && row.lines().count() == 1,
            "{row}"
        );
        assert_eq!(next(vec![]), "");
    }

    #[test]
    fn a_note_is_printed_once_for_each_row_that_has_it() {
        let mut printed = Printed::default();
        let flags = flags(&[]);
        let mut next = |drains| printed.next(&list(drains), &flags).unwrap().notes;
        assert_eq!(next(vec![held(1_000, None)]), [""; 0]);
        let cut = Report {
            detail: Some("cut short".into()),
            ..held(2_000, Some(ReleaseReason::Deadline))
        };
        let note = "shop/web: cut short";
        assert_eq!(next(vec![cut.clone()]), [note]);
        assert_eq!(next(vec![cut.clone()]), [""; 0]);
        // The next drain of a pod with this name ends in the same way.
        assert_eq!(next(vec![cut.clone(), cut.clone()]), [note]);
        assert_eq!(next(vec![cut]), [""; 0]);
    }

    #[test]
    fn a_pod_that_ebb_cannot_see_is_named_in_each_format() {
        let untracked = FlowList {
            schema: SCHEMA.into(),
            flows: vec![],
            untracked: vec![UntrackedPod {
                pod: report(None).pod,
                why: "runsc sandbox".into(),
            }],
        };
        for format in ["table", "wide", "json", "yaml", "jsonl", "name"] {
            let mut printed = Printed::default();
            let flags = flags(&["-o", format, "--no-headers"]);
            let first = printed.next(&untracked, &flags).unwrap();
            assert_eq!(first.table, "", "{format}");
            assert!(first.notes[0].ends_with("runsc sandbox"), "{format}");
            let again = printed.next(&untracked, &flags).unwrap();
            assert_eq!(again.notes, [""; 0], "{format}");
        }
    }

    #[test]
    fn each_format_has_one_object_or_line_per_change() {
        let first = |given: &[&str]| {
            let drains = list(vec![held(1, None), report(Some(ReleaseReason::Drained))]);
            let mut printed = Printed::default();
            printed.next(&drains, &flags(given)).unwrap().table
        };
        let json = first(&["-o", "json"]);
        let objects = serde_json::Deserializer::from_str(&json).into_iter::<Report>();
        assert_eq!(objects.filter_map(Result::ok).count(), 2, "{json}");
        assert!(json.contains("\n  \"phase\""), "{json}");
        assert_eq!(first(&["-o", "jsonl"]).lines().count(), 2);
        assert_eq!(first(&["-o", "yaml"]).matches("---\n").count(), 2);
        assert_eq!(first(&["-o", "name"]), "shop/web\nshop/web\n");
        assert_eq!(first(&["--no-headers"]).lines().count(), 2);
    }
}
