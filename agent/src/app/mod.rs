//! Start and stop of the agent.

mod checks;
pub(crate) mod cleanup;
pub(crate) mod run_dir;
pub mod start;
