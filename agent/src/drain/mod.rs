//! Deciding when a terminating pod may be stopped.
//!
//! [`policy`] says what to wait for, [`machine`] decides (pure), [`driver`] owns all drains of the node
//! and gives out holds, [`journal`] remembers beginnings across restarts, [`report`] is what is told.

pub mod driver;
pub mod journal;
pub mod machine;
pub mod policy;
pub mod report;
