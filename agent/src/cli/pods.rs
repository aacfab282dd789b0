//! `ebb pods`.

use std::cmp::Reverse;

use anyhow::Result;
use clap::{Args, ValueEnum};
use ebb_protocol::{
    client::AgentError,
    filter::{LabelSelector, OwnerRef, PodQuery},
    views::{PodList, PodView},
};

use super::{follow::WatchFlags, output::TableFlags};

/// The legend of the table.
pub(super) const LEGEND: &str = "\
Columns:
  NAMESPACE, NAME  the pod
  NETWORK  pod: a network namespace of its own. host: the node's. untracked: ebb can't see its connections
  LIVE     inbound connections in the middle of something
  IDLE     inbound connections that only wait, as between two requests
  NEW/S    new inbound connections per second
  PEERS    different addresses of these connections' clients
  OLDEST   the age of the oldest of them; > before a lower bound
  FLOWS    these connections by state (docs/until.md)
With -o wide:
  EXEMPT   connections that do not hold a drain
  IPS      its addresses
  UID      its UID, which commands take for its name";

#[derive(Args)]
pub(super) struct PodsFlags {
    /// List only this pod: its name, NAMESPACE/NAME or UID; or the pods of this owner, such as deploy/web, sts/db, ds/log,
    /// job/import or cj/report.
    pub(super) pod: Option<String>,
    #[command(flatten)]
    pub(super) table: TableFlags,
    /// List only pods with these labels: app=web,tier!=cache,!debug,zone in (a,b).
    #[arg(short = 'l', long, value_name = "LABELS", value_parser = selector)]
    selector: Option<String>,
    /// The order: by name, or the largest number first.
    #[arg(long, value_enum, default_value_t, value_name = "COLUMN")]
    sort_by: PodSort,
    #[command(flatten)]
    pub(super) watch: WatchFlags,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum PodSort {
    #[default]
    Name,
    Live,
    Idle,
    New,
    Peers,
    Oldest,
}

impl PodsFlags {
    /// Sorts a list that was put together from those of several agents.
    pub(super) fn sort(&self, list: &mut PodList) {
        let name = |p: &PodView| (p.pod.namespace.clone(), p.pod.name.clone());
        list.pods.sort_by_cached_key(name);
        sort(&mut list.pods, self.sort_by);
    }
}

/// Checks a label selector. The agent parses it again.
pub(super) fn selector(text: &str) -> Result<String, String> {
    text.parse::<LabelSelector>().map(|_| text.to_owned())
}

pub(super) async fn run(flags: &PodsFlags) -> Result<()> {
    let is_owner = |name: &String| OwnerRef::parse(name).is_some();
    let query = PodQuery {
        pod: flags.pod.clone().filter(|name| !is_owner(name)),
        owner: flags.pod.clone().filter(is_owner),
        namespace: flags.table.view.scope.namespace.clone(),
        labels: flags.selector.clone(),
    };
    let path = format!("/v1/pods?{}", serde_urlencoded::to_string(query)?);
    let client = flags.table.view.agent.client();
    let look = async || {
        let mut list: PodList = client.get_json(&path).await?;
        sort(&mut list.pods, flags.sort_by);
        Ok(list)
    };
    match flags.watch.watch {
        true => flags.watch.follow(&flags.table, look).await,
        false => flags.table.print(&look().await.map_err(|e: AgentError| e)?),
    }
}

/// Sorts pods, which are sorted by name. Unknown numbers come last.
fn sort(pods: &mut [PodView], by: PodSort) {
    match by {
        PodSort::Name => {}
        PodSort::Live => pods.sort_by_key(|p| Reverse(p.flows.map(|f| f.live()))),
        PodSort::Idle => pods.sort_by_key(|p| Reverse(p.flows.map(|f| f.idle))),
        PodSort::Peers => pods.sort_by_key(|p| Reverse(p.peers)),
        PodSort::Oldest => pods.sort_by_key(|p| Reverse(p.oldest_ms)),
        PodSort::New => pods.sort_by(|a, b| {
            let rate = |p: &PodView| p.new_per_second.unwrap_or(-1.0);
            rate(b).total_cmp(&rate(a))
        }),
    }
}
