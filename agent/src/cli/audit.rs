//! `ebb audit`.

use anyhow::Result;
use clap::Args;

use super::ViewFlags;
use crate::{
    api::server::AuditRequest,
    report::{table, view::AuditView},
};

#[derive(Args)]
pub(super) struct Flags {
    /// Only this pod: its name, NAMESPACE/NAME or UID.
    pod: Option<String>,
    #[command(flatten)]
    view: ViewFlags,
}

pub(super) async fn run(flags: &Flags) -> Result<()> {
    let request = AuditRequest {
        pod: flags.pod.clone(),
    };
    let client = flags.view.agent.client();
    let found: AuditView = client.post_json("/v1/audit", &request).await?;
    flags.view.print(&found, table::audit)
}
