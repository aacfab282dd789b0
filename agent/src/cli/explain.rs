//! `ebb explain`.

use anyhow::Result;
use clap::Args;

use super::ViewFlags;
use crate::report::{explain, view::Explanation};

#[derive(Args)]
pub(super) struct Flags {
    /// The pod: its name, NAMESPACE/NAME or UID. One that is gone by its whole name.
    pod: String,
    #[command(flatten)]
    view: ViewFlags,
}

pub(super) async fn run(flags: &Flags) -> Result<()> {
    let query = serde_urlencoded::to_string([("pod", &flags.pod)])?;
    let path = format!("/v1/explain?{query}");
    let explanation: Explanation = flags.view.agent.client().get_json(&path).await?;
    flags.view.print(&explanation, explain::text)
}
