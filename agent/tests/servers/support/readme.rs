//! The table in README.md of what connections look like.

use anyhow::{Result, ensure};

const README: &str = include_str!("../../../../README.md");

/// What becomes of a connection if its pod drains with `until: idle`.
pub(crate) enum Fate {
    /// It is waited for.
    Held,
    /// It is cut, and nobody misses it.
    CutHarmlessly,
    /// It is cut in the middle of something, unless one does this.
    Lost(&'static str),
}

/// Demands that the table says of `what` on a connection that it looks `state`, and so becomes of it.
pub(crate) fn says(what: &str, state: ebb::flow::FlowState, fate: &Fate) -> Result<()> {
    let fate = match fate {
        Fate::Held => "held".to_owned(),
        Fate::CutHarmlessly => "cut, nothing lost".to_owned(),
        Fate::Lost(remedy) => format!("**lost**: {remedy}"),
    };
    let row = format!("| {what} | `{state}` | {fate} |");
    ensure!(README.contains(&row), "README.md has not this row:\n{row}");
    Ok(())
}
