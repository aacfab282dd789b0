//! `ebb explain`.

mod text;

use anyhow::Result;
use clap::Args;
use ebb_protocol::views::Explanation;

pub(super) use self::text::{released, text};
use super::output::ViewFlags;

#[derive(Args)]
pub(super) struct ExplainFlags {
    /// The pod: its name, NAMESPACE/NAME or UID. A pod that is gone is found only by its whole name or UID.
    pub(super) pod: String,
    #[command(flatten)]
    pub(super) view: ViewFlags,
}

pub(super) async fn run(flags: &ExplainFlags) -> Result<()> {
    let query = serde_urlencoded::to_string([("pod", flags.view.scope.pod(&flags.pod)?)])?;
    let path = format!("/v1/explain?{query}");
    let explanation: Explanation = flags.view.agent.client().get_json(&path).await?;
    flags.view.print(&explanation)
}
