//! `--watch` of the lists: prints the whole list, and then each row that is new or has changed.

use std::{collections::HashMap, time::Duration};

use anyhow::Result;
use clap::Args;
use ebb_core::format::{duration_within as within, one_line};
use ebb_protocol::{
    client::AgentError,
    service::stop_on_signal,
    table::TableStyle,
    views::{DrainList, FlowList, PodList},
};
use tokio::time::sleep;

use super::output::{Document, OutputFormat, TableFlags, write_out};

/// Flags of the lists that can be watched.
#[derive(Args)]
pub(super) struct WatchFlags {
    /// After the list, print each row that is new or has changed, until Ctrl-C. A pod or connection that is gone gets no
    /// row, and a watch of one pod ends with the pod. With -o json, each row is an object.
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
}

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
    is_begun: bool,
}

impl Printed {
    /// The text of the rows that are new or have changed, with the names of the columns the first time.
    fn next(&mut self, list: &impl FollowedList, flags: &TableFlags) -> Result<String> {
        let rows = list.rows();
        let is_new = |row: &RowState| self.states.get(&row.id) != Some(&row.state);
        let new: Vec<usize> = (0..rows.len()).filter(|n| is_new(&rows[*n])).collect();
        let format = flags.view.output;
        let objects = match format {
            OutputFormat::Table | OutputFormat::Wide | OutputFormat::Name => vec![],
            OutputFormat::Json | OutputFormat::Yaml | OutputFormat::Jsonl => list.lines()?,
        };
        let mut text = String::new();
        match format {
            OutputFormat::Table | OutputFormat::Wide => {
                let style = TableStyle {
                    wide: format == OutputFormat::Wide,
                    no_headers: false,
                };
                let table = list.text(style).table;
                let lines: Vec<&str> = table.lines().collect();
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
        Ok(text)
    }
}

/// Prints what `look` returns, and what changes in it, until a signal or until the reader is gone.
///
/// If the agent is away, says so once, and goes on when it is back, as after an upgrade.
pub(super) async fn follow<L: FollowedList>(
    flags: &TableFlags,
    mut look: impl AsyncFnMut() -> Result<L, AgentError>,
) -> Result<()> {
    let stop = stop_on_signal()?;
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
        if !write_out(&printed.next(&list, flags)?)? {
            return Ok(());
        }
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
        follow(flags, async || {
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
    use ebb_protocol::views::SCHEMA;

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
        let mut next = |drains| printed.next(&list(drains), &flags).unwrap();
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
    fn each_format_has_one_object_or_line_per_change() {
        let first = |given: &[&str]| {
            let drains = list(vec![held(1, None), report(Some(ReleaseReason::Drained))]);
            let mut printed = Printed::default();
            printed.next(&drains, &flags(given)).unwrap()
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
