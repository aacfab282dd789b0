//! `ebb advise`.

use anyhow::Result;
use clap::Args;
use ebb_protocol::{
    filter::OwnerRef,
    table::{RenderedTable, TableStyle, advice},
    views::AdviceList,
};

use super::output::{Document, TableFlags, each};

/// The legend of the table.
pub(super) const LEGEND: &str = "\
Columns, of each workload whose drains the agent remembers (the last 256 of the node):
  NAMESPACE, WORKLOAD  the owner of the pods: a Deployment, StatefulSet or the like
  DRAINS  how many drains the row rests on
  SETTLE  how long settling took: half of the drains, and 99 of 100, took no longer
  DRAIN   the same for the whole drain. A drain that was cut short counts with the time that it had
  CUT     connections that were cut
  LASTS   how long its connections last: half of them, and 99 of 100, no longer (bounds of a histogram)
  GRACE   the grace period of its pods
  ENOUGH  a grace period that would have been enough: the longest drain plus the reserve. If drains were cut short,
          99 of 100 connections would have ended in that time, too. Rounded up to 5 s
  ADVICE  the field or annotation to set, and why, below the table
With -o wide:
  OBSERVED   drains of the row that ebb only observed (ebb.dev/drain: observe)
  CUT SHORT  drains of the row that ended before their pods had drained";

#[derive(Args)]
pub(super) struct AdviseFlags {
    /// Advise only about this workload: its name, NAMESPACE/NAME, or as deploy/web, where only the name counts. A pod
    /// without a controller stands for itself.
    workload: Option<String>,
    #[command(flatten)]
    pub(super) table: TableFlags,
}

pub(super) async fn run(flags: &AdviseFlags) -> Result<()> {
    let client = flags.table.view.agent.client();
    let mut list: AdviceList = client.get_json("/v1/advice").await?;
    let owner = flags.workload.as_deref().and_then(OwnerRef::parse);
    list.workloads.retain(|w| {
        let is_called = |name: &String| match &owner {
            Some(owner) => w.workload == owner.name,
            None => w.workload == *name || w.to_string() == *name,
        };
        flags.table.view.scope.includes(&w.namespace)
            && flags.workload.as_ref().is_none_or(is_called)
    });
    flags.table.print(&list)
}

impl Document for AdviceList {
    fn lines(&self) -> serde_json::Result<Vec<String>> {
        each(&self.workloads)
    }

    fn names(&self) -> Vec<String> {
        self.workloads.iter().map(ToString::to_string).collect()
    }

    fn text(&self, style: TableStyle) -> RenderedTable {
        advice(self, style)
    }
}
