//! Tests of the CRI proxy at the protocol level, with a scripted runtime and a scripted agent.

#![expect(clippy::unwrap_used, reason = "tests")]

mod agent_away;
mod forwarding;
mod hold;
mod logging;
mod many_calls;
mod memory;
mod metrics;
mod runtime_changes;
mod stopping;
mod stopping_holds;
mod successor;
mod support;
