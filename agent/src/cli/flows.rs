//! `ebb flows`.

use anyhow::Result;
use clap::Args;

use super::{Output, ViewFlags, print, print_json};
use crate::report::view::FlowList;

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
    let query = serde_urlencoded::to_string(query)?;
    let client = flags.view.agent.client();
    match flags.view.output {
        Output::Table => print(&client.get_text(&format!("/v1/flows/table?{query}")).await?),
        Output::Json => {
            let list: FlowList = client.get_json(&format!("/v1/flows?{query}")).await?;
            print_json(&list)
        }
    }
}
