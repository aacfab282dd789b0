//! The CRI proxy at the level of its protocols, with a stand-in for the runtime that can misbehave at will.

#![expect(clippy::unwrap_used, reason = "tests")]

mod crowd;
mod hold;
mod memory;
mod passing;
mod runtime_changes;
mod stopping;
mod successor;
mod support;
