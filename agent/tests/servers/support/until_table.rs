//! The table in docs/until.md: the states of connections, and what a drain does to them.

use anyhow::{Result, ensure};
use ebb_core::flow::FlowState;

const UNTIL: &str = include_str!("../../../../docs/until.md");

/// What a drain with `until: idle` does to a connection.
pub(crate) enum Effect {
    /// The drain waits for it.
    Held,
    /// It is cut, and no client loses anything.
    CutHarmlessly,
    /// It is cut in the middle of something, without this remedy.
    Lost(&'static str),
}

/// Demands that the table has this row.
pub(crate) fn has_row(what: &str, state: FlowState, effect: &Effect) -> Result<()> {
    let effect = match effect {
        Effect::Held => "held".to_owned(),
        Effect::CutHarmlessly => "cut, nothing lost".to_owned(),
        Effect::Lost(remedy) => format!("**lost**: {remedy}"),
    };
    let row = format!("| {what} | `{state}` | {effect} |");
    ensure!(
        UNTIL.contains(&row),
        "docs/until.md does not have this row:\n{row}"
    );
    Ok(())
}
