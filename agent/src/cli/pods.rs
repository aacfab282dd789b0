//! `ebb pods`.

use anyhow::Result;

use super::ViewFlags;
use crate::report::{table, view::PodList};

pub(super) async fn run(flags: &ViewFlags) -> Result<()> {
    let list: PodList = flags.agent.client().get_json("/v1/pods").await?;
    flags.print(&list, table::pods)
}
