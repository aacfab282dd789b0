//! `ebb drains`.

use anyhow::Result;

use super::ViewFlags;
use crate::report::{table, view::DrainList};

pub(super) async fn run(flags: &ViewFlags) -> Result<()> {
    let list: DrainList = flags.agent.client().get_json("/v1/drains").await?;
    flags.print(&list, table::drains)
}
