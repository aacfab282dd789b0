//! `ebb drains`.

use std::{
    cmp::Reverse,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use clap::{Args, ValueEnum};
use ebb_core::{drain_report::Report, format::duration_within as within};
use ebb_protocol::{filter::OwnerRef, views::DrainList};

use super::{
    follow::{StdinFlag, follow},
    output::{OutputFormat, TableFlags, print_notes},
};

/// The legend of the table.
pub(super) const LEGEND: &str = "\
Columns:
  NAMESPACE, NAME  the pod
  UNTIL          what it waits for: zero, idle or settled
  HELD           how long it has held the pod's stop, or would have, if ebb only observed it
  LEFT           the time until its deadline, while it is under way
  OPEN AT START  inbound connections when it began, by state (docs/until.md)
  OPEN NOW       those that are open now, or were when it ended
  CUT            connections that were open when it ended, which the stop that followed cut
  WHY            settling or draining; then why it ended: drained, deadline, manual, not-terminating, untracked, shutdown.
                 observed: ebb held nothing (ebb.dev/drain: observe). exited: its containers exited first
With -o wide:
  STARTED        when it began
  CALLS          stops of containers and preStop hooks that wait for it now
  ARRIVED        connections that opened during it
  ENDED          connections that ended before it did
  LAG            from the end of the last connection, as the kernel stamped it, to the end of the drain
  UID            the UID of the pod";

#[derive(Args)]
pub(super) struct DrainsFlags {
    /// List only the drains of this pod: its name, NAMESPACE/NAME or UID; or of the pods of this owner, such as deploy/web.
    /// Of the owner, only the name is known: deploy/web and sts/web are the same here.
    pub(super) pod: Option<String>,
    /// After the list, print each row and note that is new or has changed, until Ctrl-C. With -o json, each row is an object. This
    /// costs no dumps: the agent reports each change.
    #[arg(short, long)]
    pub(super) watch: bool,
    #[command(flatten)]
    pub(super) table: TableFlags,
    /// List only drains that are under way or ended within this time, such as 1h.
    #[arg(long, value_name = "DURATION", value_parser = within(Duration::ZERO..=LONGEST_SINCE))]
    since: Option<Duration>,
    /// The order: those under way and then the newest first, or by the pod's name, or the largest number first.
    #[arg(long, value_enum, default_value_t, value_name = "COLUMN")]
    sort_by: DrainSort,
    #[command(flatten)]
    stdin: StdinFlag,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum DrainSort {
    #[default]
    Newest,
    Name,
    Held,
    Cut,
}

impl DrainsFlags {
    /// Sorts a list that was put together from those of several agents, as one agent and then `--sort-by` do.
    pub(super) fn sort(&self, list: &mut DrainList) {
        list.drains.sort_by_cached_key(|r| {
            let is_over = r.reason.is_some();
            (
                is_over,
                Reverse(if is_over { ended(r) } else { started(r) }),
            )
        });
        sort(&mut list.drains, self.sort_by);
    }

    /// Says on standard error that no drain is the named pod's, because a wrong name looks the same.
    pub(super) fn note_if_empty(&self, list: &DrainList) {
        print_notes(self.if_empty(list).as_slice());
    }

    fn if_empty(&self, list: &DrainList) -> Option<String> {
        let pod = self.pod.as_ref().filter(|_| list.drains.is_empty())?;
        Some(format!(
            "no drain of {pod} is listed: it has had none that is remembered, a flag leaves them out, or the name is \
             not the whole name of a pod"
        ))
    }
}

/// Sorts drains, which are sorted from the newest. Unknown numbers come last.
fn sort(drains: &mut [Report], by: DrainSort) {
    match by {
        DrainSort::Newest => {}
        DrainSort::Name => drains
            .sort_by(|a, b| (&a.pod.namespace, &a.pod.name).cmp(&(&b.pod.namespace, &b.pod.name))),
        DrainSort::Held => drains.sort_by_key(|r| Reverse(r.held_ms)),
        DrainSort::Cut => drains.sort_by_key(|r| Reverse(r.cut_total)),
    }
}

/// The upper limit of `--since`: the history is lost with a boot of the node.
const LONGEST_SINCE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

pub(super) async fn run(flags: &DrainsFlags) -> Result<()> {
    let client = flags.table.view.agent.client();
    if !flags.watch {
        let list = filtered(client.get_json("/v1/drains").await?, flags);
        flags.table.print(&list)?;
        // `kubectl ebb` reads the JSON of each node, and says it of all of them.
        if flags.table.view.output != OutputFormat::Json {
            flags.note_if_empty(&list);
        }
        return Ok(());
    }
    // That of no snapshot: the first answer comes at once.
    let mut version = u64::MAX;
    follow(&flags.table, &flags.stdin, async || {
        // The agent answers as soon as it has a newer snapshot, or after some seconds.
        let path = format!("/v1/drains?after={version}");
        let list: DrainList = client.get_json(&path).await?;
        version = list.version;
        Ok(filtered(list, flags))
    })
    .await
}

/// The drains that the flags ask for.
fn filtered(mut list: DrainList, flags: &DrainsFlags) -> DrainList {
    let now = SystemTime::now();
    let owner = flags.pod.as_deref().and_then(OwnerRef::parse);
    list.drains.retain(|r| {
        let is_wanted = |pod: &String| match &owner {
            Some(owner) => r.workload.as_ref() == Some(&owner.name),
            None => r.pod.name == *pod || r.pod.to_string() == *pod || r.pod.uid.as_str() == pod,
        };
        flags.table.view.scope.includes(&r.pod.namespace)
            && flags.pod.as_ref().is_none_or(is_wanted)
            && flags.since.is_none_or(|since| is_since(r, since, now))
    });
    sort(&mut list.drains, flags.sort_by);
    list
}

/// Whether the drain is under way or ended at most `since` before `now`.
fn is_since(r: &Report, since: Duration, now: SystemTime) -> bool {
    if r.reason.is_none() {
        return true;
    }
    // The agent writes this time, so it parses; if not, the drain is shown.
    ended(r)
        .is_none_or(|ended| now.duration_since(ended).is_ok_and(|ago| ago <= since) || ended > now)
}

fn started(r: &Report) -> Option<SystemTime> {
    humantime::parse_rfc3339(&r.started_at).ok()
}

/// When the drain ended, if it has.
fn ended(r: &Report) -> Option<SystemTime> {
    started(r).map(|started| started + Duration::from_millis(r.held_ms))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use ebb_core::drain_report::{ReleaseReason, testing::report};
    use ebb_protocol::views::SCHEMA;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        drains: DrainsFlags,
    }

    fn flags(given: &[&str]) -> DrainsFlags {
        Flags::parse_from([&["ebb"], given].concat()).drains
    }

    fn list(drains: Vec<Report>) -> DrainList {
        DrainList {
            schema: SCHEMA.into(),
            version: 1,
            drains,
        }
    }

    #[test]
    fn a_name_that_no_drain_has_is_said_and_an_empty_list_of_all_is_not() {
        let over = || report(Some(ReleaseReason::Drained));
        let note = |given: &[&str]| {
            let flags = flags(given);
            flags.if_empty(&filtered(list(vec![over()]), &flags))
        };
        assert_eq!(note(&["web"]), None);
        assert!(note(&["wbe"]).is_some_and(|note| note.starts_with("no drain of wbe")));
        assert!(note(&["deploy/web"]).is_some());
        assert_eq!(note(&["-n", "elsewhere"]), None);
    }

    #[test]
    fn drains_are_sorted_by_the_column_of_the_flag() {
        let drain = |name: &str, held_ms, cut_total| {
            let mut r = report(Some(ReleaseReason::Deadline));
            r.pod.name = name.into();
            Report {
                held_ms,
                cut_total,
                ..r
            }
        };
        let names = |by: &str| {
            let drains = vec![
                drain("b", 1, Some(2)),
                drain("c", 3, None),
                drain("a", 2, Some(3)),
            ];
            let sorted = filtered(list(drains), &flags(&["--sort-by", by]));
            let names = sorted.drains.into_iter().map(|r| r.pod.name);
            names.collect::<String>()
        };
        assert_eq!(names("newest"), "bca");
        assert_eq!(names("name"), "abc");
        assert_eq!(names("held"), "cab");
        assert_eq!(names("cut"), "abc");
    }

    #[test]
    fn drains_that_ended_long_ago_are_left_out() {
        let ended = |at: &str| Report {
            started_at: at.into(),
            held_ms: 60_000,
            ..report(Some(ReleaseReason::Drained))
        };
        let now = humantime::parse_rfc3339("2026-01-02T03:10:00Z").unwrap();
        let hour = Duration::from_secs(3600);
        assert!(is_since(&ended("2026-01-02T02:09:00.000Z"), hour, now));
        assert!(!is_since(&ended("2026-01-02T02:08:59.000Z"), hour, now));
        // The clock was set back meanwhile.
        assert!(is_since(&ended("2026-01-02T04:00:00.000Z"), hour, now));
        let under_way = Report {
            started_at: "2026-01-01T00:00:00.000Z".into(),
            ..report(None)
        };
        assert!(is_since(&under_way, hour, now));
    }
}
