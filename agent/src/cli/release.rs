//! `ebb release`.

use anyhow::Result;
use clap::Args;

use super::AgentFlags;
use crate::api::server::ReleaseRequest;

#[derive(Args)]
pub(super) struct Flags {
    /// The pod: its name, NAMESPACE/NAME or UID.
    pod: String,
    #[command(flatten)]
    agent: AgentFlags,
}

pub(super) async fn run(flags: &Flags) -> Result<()> {
    let request = ReleaseRequest {
        pod: flags.pod.clone(),
    };
    let () = flags
        .agent
        .client()
        .post_json("/v1/release", &request)
        .await?;
    Ok(())
}
