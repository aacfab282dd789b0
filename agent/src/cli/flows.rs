//! `ebb flows`.

use anyhow::Result;
use clap::Args;

use super::ViewFlags;
use crate::report::{table, view::FlowList};

#[derive(Args)]
pub(super) struct Flags {
    /// Only this pod: its name, NAMESPACE/NAME or UID.
    pod: Option<String>,
    /// Also flows that the pods opened themselves.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    view: ViewFlags,
}

pub(super) async fn run(flags: &Flags) -> Result<()> {
    let mut query = vec![("all", flags.all.to_string())];
    query.extend(flags.pod.clone().map(|pod| ("pod", pod)));
    let path = format!("/v1/flows?{}", serde_urlencoded::to_string(query)?);
    let list: FlowList = flags.view.agent.client().get_json(&path).await?;
    flags.view.print(&list, table::flows)
}
