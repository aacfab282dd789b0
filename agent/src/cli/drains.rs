//! `ebb drains`.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::Args;
use ebb_core::{drain_report::Report, format::duration_within as within};
use ebb_protocol::{filter::OwnerRef, views::DrainList};

use super::{follow::follow, output::TableFlags};

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
    pod: Option<String>,
    /// After the list, print each row that is new or has changed, until Ctrl-C. With -o json, each row is an object. This
    /// costs no dumps: the agent reports each change.
    #[arg(short, long)]
    pub(super) watch: bool,
    #[command(flatten)]
    pub(super) table: TableFlags,
    /// List only drains that are under way or ended within this time, such as 1h.
    #[arg(long, value_name = "DURATION", value_parser = within(Duration::ZERO..=LONGEST_SINCE))]
    since: Option<Duration>,
}

/// The upper limit of `--since`: the history is lost with a boot of the node.
const LONGEST_SINCE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

pub(super) async fn run(flags: &DrainsFlags) -> Result<()> {
    let client = flags.table.view.agent.client();
    if !flags.watch {
        let list = client.get_json("/v1/drains").await?;
        return flags.table.print(&filtered(list, flags));
    }
    // That of no snapshot: the first answer comes at once.
    let mut version = u64::MAX;
    follow(&flags.table, async || {
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
    list
}

/// Whether the drain is under way or ended at most `since` before `now`.
fn is_since(r: &Report, since: Duration, now: SystemTime) -> bool {
    if r.reason.is_none() {
        return true;
    }
    // The agent writes this time, so it parses; if not, the drain is shown.
    let Ok(started) = humantime::parse_rfc3339(&r.started_at) else {
        return true;
    };
    let ended = started + Duration::from_millis(r.held_ms);
    now.duration_since(ended).is_ok_and(|ago| ago <= since) || ended > now
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_core::drain_report::{ReleaseReason, testing::report};

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
