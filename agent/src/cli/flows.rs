//! `ebb flows`.

use std::cmp::Reverse;

use anyhow::Result;
use clap::{Args, ValueEnum};
use ebb_core::flow::FlowState;
use ebb_protocol::{
    filter::{FlowQuery, FlowSort},
    table::{RenderedTable, TableStyle, untracked_note},
    views::FlowList,
};

use super::{
    follow::WatchFlags,
    output::{Document, OutputFormat, TableFlags, print_table},
    pods::selector,
};

/// The legend of the table.
pub(super) const LEGEND: &str = "\
Columns:
  NAMESPACE, NAME  the pod
  DIR    in: the pod accepted the connection. out: the pod dialled it (--all)
  STATE  backlog, active, awaiting, idle, flushing, half-closed, lost (docs/until.md)
  PEER   address and port of the other end
  LOCAL  address and port of the pod's end
  AGE    time since it was opened; > before a lower bound, if the agent did not see that
  QUIET  time since the last byte
  IN     bytes from the peer
  OUT    bytes to the peer, acknowledged
  HOLDS  whether a drain of the pod waits for it, or why not
  PEER NAME  who has the peer's address: a pod of this node, or node: the node itself or a pod on its network
With -o wide:
  CONTAINER  the container whose process made the socket";

#[derive(Args)]
pub(super) struct FlowsFlags {
    /// List only the flows of this pod: its name, NAMESPACE/NAME or UID; or of the pods of this owner, such as deploy/web.
    pub(super) pod: Option<String>,
    /// Also list the flows that pods opened themselves.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    pub(super) table: TableFlags,
    /// List only flows of pods with these labels: app=web,tier!=cache,!debug,zone in (a,b).
    #[arg(short = 'l', long, value_name = "LABELS", value_parser = selector, conflicts_with = "pod")]
    selector: Option<String>,
    /// List only flows in these states, separated by commas.
    #[arg(long, value_name = "STATES", value_delimiter = ',', value_parser = state)]
    state: Vec<FlowState>,
    /// List only flows with this peer: an address, a network such as 10.0.0.0/8, several of both with commas between them,
    /// or a pod of this node. `kubectl ebb` takes the whole name of any pod of the cluster.
    #[arg(long, value_name = "PEER")]
    pub(super) peer: Option<String>,
    /// List only flows with this port at the pod's end.
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// The order: by pod, state and address, or the largest value first.
    #[arg(long, value_enum, default_value_t, value_name = "COLUMN")]
    sort_by: SortFlag,
    #[command(flatten)]
    pub(super) watch: WatchFlags,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum SortFlag {
    #[default]
    Pod,
    Peer,
    Age,
    Quiet,
    In,
    Out,
}

impl SortFlag {
    const fn order(self) -> Option<FlowSort> {
        Some(match self {
            Self::Pod => return None,
            Self::Peer => FlowSort::Peer,
            Self::Age => FlowSort::Age,
            Self::Quiet => FlowSort::Quiet,
            Self::In => FlowSort::In,
            Self::Out => FlowSort::Out,
        })
    }
}

impl FlowsFlags {
    /// Sorts a list that was put together from those of several agents, which are sorted.
    pub(super) fn sort(&self, list: &mut FlowList) {
        let flows = &mut list.flows;
        match self.sort_by {
            SortFlag::Pod => flows.sort_by(|a, b| {
                (&a.pod.namespace, &a.pod.name).cmp(&(&b.pod.namespace, &b.pod.name))
            }),
            SortFlag::Peer => flows.sort_by_key(|f| f.remote),
            // Unknown ages come last.
            SortFlag::Age => flows.sort_by_key(|f| Reverse(f.age_ms.or(f.age_at_least_ms))),
            SortFlag::Quiet => flows.sort_by_key(|f| Reverse(f.quiet_ms)),
            SortFlag::In => flows.sort_by_key(|f| Reverse(f.bytes_in)),
            SortFlag::Out => flows.sort_by_key(|f| Reverse(f.bytes_out)),
        }
    }
}

fn state(text: &str) -> Result<FlowState, String> {
    let state = FlowState::ALL.into_iter().find(|s| s.name() == text);
    state.ok_or_else(|| {
        let names = FlowState::ALL.map(FlowState::name).join(", ");
        format!("the states are {names}")
    })
}

pub(super) async fn run(flags: &FlowsFlags) -> Result<()> {
    let output = flags.table.view.output;
    let states: Vec<_> = flags.state.iter().map(|s| s.name()).collect();
    let query = FlowQuery {
        pod: flags.pod.clone(),
        all: flags.all,
        namespace: flags.table.view.scope.namespace.clone(),
        labels: flags.selector.clone(),
        state: (!states.is_empty()).then(|| states.join(",")),
        peer: flags.peer.clone(),
        port: flags.port,
        sort: flags.sort_by.order(),
        wide: output == OutputFormat::Wide,
        no_headers: flags.table.no_headers,
    };
    let query = serde_urlencoded::to_string(query)?;
    let client = flags.table.view.agent.client();
    if flags.watch.watch {
        let path = format!("/v1/flows?{query}");
        let look = async || client.get_json::<FlowList>(&path).await;
        return flags.watch.follow(&flags.table, look).await;
    }
    match output {
        OutputFormat::Table | OutputFormat::Wide => {
            let path = format!("/v1/flows/table?{query}");
            print_table(&client.get_json(&path).await?)
        }
        _ => {
            let list: FlowList = client.get_json(&format!("/v1/flows?{query}")).await?;
            flags.table.print(&list)
        }
    }
}

impl Document for FlowList {
    fn lines(&self) -> serde_json::Result<Vec<String>> {
        self.flows.iter().map(serde_json::to_string).collect()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.flows.iter().map(|f| f.pod.to_string()).collect();
        names.sort();
        names.dedup();
        names
    }

    fn text(&self, style: TableStyle) -> RenderedTable {
        ebb_protocol::table::flows(self.flows.iter().cloned(), &self.untracked, style)
    }

    fn left_out(&self) -> Vec<String> {
        self.untracked.iter().map(untracked_note).collect()
    }
}

#[cfg(test)]
mod tests {
    use ebb_core::ids::{PodName, PodUid};
    use ebb_protocol::views::{SCHEMA, UntrackedPod};

    use super::*;

    #[test]
    fn a_pod_that_ebb_cannot_see_is_named_beside_each_format_that_has_no_place_for_it() {
        let list = FlowList {
            schema: SCHEMA.into(),
            flows: vec![],
            untracked: vec![UntrackedPod {
                pod: PodName {
                    uid: PodUid::new("u1"),
                    namespace: "shop".into(),
                    name: "web".into(),
                },
                why: "runsc sandbox".into(),
            }],
        };
        let note = "shop/web: its flows can't be seen: runsc sandbox";
        let rendered = |format: OutputFormat| format.render(&list, true).unwrap();
        for format in [
            OutputFormat::Table,
            OutputFormat::Wide,
            OutputFormat::Jsonl,
            OutputFormat::Name,
        ] {
            let rendered = rendered(format);
            assert_eq!(
                (rendered.table.as_str(), rendered.notes),
                ("", vec![note.into()])
            );
        }
        for format in [OutputFormat::Json, OutputFormat::Yaml] {
            let rendered = rendered(format);
            assert!(rendered.table.contains("runsc") && rendered.notes.is_empty());
        }
    }
}
